"""drawn10: ten kinds of upright things, drawn on demand.

A stand-in for photos that needs no download. The picture has an up and a down only in the
object: the background is smooth colour noise, itself turned at random, the object's place, size
and mirror image are random, and all kinds take their colours from one distribution. So whoever
tells which way up such a picture is has recognised something in it.

Objects are large and backgrounds dim on purpose: with busier backgrounds, smaller objects or
wholly random colours a small network learned nothing in a dozen epochs.

Coordinates: an object is described in a unit square, x to the right, y down, and stands on y = 1.
"""

import colorsys
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from data.records import Record, Source, Split

GENERATOR_VERSION = 1
"""Raised by hand when the same index would give another picture."""

COUNTS: dict[Split, int] = {"train": 3334, "test": 1000}
"""Pictures per split; 3,334 leaves 3,000 for training once a tenth has gone to validation."""

CANVAS_PX = 128
"""Side on which pictures are drawn; preparation shrinks them in floating point."""

Colour = tuple[int, int, int]
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Palette:
    """Colours of one object: two bright ones, and a light or dark one for the details."""

    main: Colour
    second: Colour
    detail: Colour


class Pen:
    """Draws in an object's unit square; mirrors, scales and rounds to whole pixels.

    Whole pixels, because rounding hides the last bit in which two machines' arithmetic differs.
    """

    def __init__(
        self, canvas: Image.Image, *, box: tuple[float, float, float, float], mirrored: bool
    ) -> None:
        """Start drawing into `box` (left, top, width and height, in pixels)."""
        self._draw = ImageDraw.Draw(canvas)
        self._left, self._top, self._width, self._height = box
        self._side = min(self._width, self._height)
        self._mirrored = mirrored

    def polygon(self, points: Points, fill: Colour) -> None:
        """Fill the polygon with corners `points`."""
        self._draw.polygon([self._place(x, y) for x, y in points], fill=fill)

    def box(self, x0: float, y0: float, x1: float, y1: float, fill: Colour) -> None:
        """Fill a rectangle."""
        self._draw.rectangle(self._corners(x0, y0, x1, y1), fill=fill)

    def rounded(self, x0: float, y0: float, x1: float, y1: float, fill: Colour) -> None:
        """Fill a rectangle with round corners, a quarter of its short side each."""
        radius = round(0.25 * min(x1 - x0, y1 - y0) * self._side)
        self._draw.rounded_rectangle(self._corners(x0, y0, x1, y1), radius, fill=fill)

    def ellipse(self, x0: float, y0: float, x1: float, y1: float, fill: Colour) -> None:
        """Fill the ellipse that fits the rectangle."""
        self._draw.ellipse(self._corners(x0, y0, x1, y1), fill=fill)

    def dome(self, x0: float, y0: float, x1: float, y1: float, fill: Colour) -> None:
        """Fill the upper half of the ellipse that fits the rectangle."""
        self._draw.pieslice(self._corners(x0, y0, x1, y1), 180, 360, fill=fill)

    def ring(self, x0: float, y0: float, x1: float, y1: float, width: float, fill: Colour) -> None:
        """Draw the outline of an ellipse, `width` wide."""
        self._draw.ellipse(
            self._corners(x0, y0, x1, y1), outline=fill, width=max(1, round(width * self._side))
        )

    def stroke(self, points: Points, width: float, fill: Colour) -> None:
        """Draw a line through `points` with round ends, `width` wide."""
        placed = [self._place(x, y) for x, y in points]
        wide = max(1, round(width * self._side))
        self._draw.line(placed, fill=fill, width=wide, joint="curve")
        for x, y in (placed[0], placed[-1]):
            self._draw.circle((x, y), wide // 2, fill=fill)

    def _place(self, x: float, y: float) -> tuple[int, int]:
        if self._mirrored:
            x = 1 - x
        return round(self._left + x * self._width), round(self._top + y * self._height)

    def _corners(self, x0: float, y0: float, x1: float, y1: float) -> tuple[int, int, int, int]:
        (left, top), (right, bottom) = self._place(x0, y0), self._place(x1, y1)
        return min(left, right), top, max(left, right), bottom


class Dice:
    """Random proportions of one object."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng

    def between(self, low: float, high: float) -> float:
        """Return a number in `[low, high)`."""
        return float(self._rng.uniform(low, high))

    def chance(self, probability: float) -> bool:
        """Return True with the given probability."""
        return bool(self._rng.random() < probability)

    def count(self, low: int, high: int) -> int:
        """Return a whole number in `[low, high]`."""
        return int(self._rng.integers(low, high + 1))


def _house(pen: Pen, colours: Palette, dice: Dice) -> None:
    eaves = dice.between(0.38, 0.5)
    if dice.chance(0.7):
        pen.box(0.70, 0.06, 0.82, eaves, colours.main)
    pen.box(0.10, eaves, 0.90, 1.0, colours.main)
    pen.polygon([(0.0, eaves + 0.02), (0.5, 0.02), (1.0, eaves + 0.02)], colours.second)
    door = dice.between(0.40, 0.62)
    pen.box(door, 0.66, door + 0.18, 1.0, colours.second)
    pen.box(0.18, eaves + 0.14, 0.34, eaves + 0.30, colours.detail)
    if door < 0.5:
        pen.box(0.68, eaves + 0.14, 0.84, eaves + 0.30, colours.detail)


def _tree(pen: Pen, colours: Palette, dice: Dice) -> None:
    pen.box(0.43, 0.55, 0.57, 1.0, colours.second)
    if dice.chance(0.5):
        for top, bottom, half in ((0.36, 0.80, 0.40), (0.18, 0.56, 0.32), (0.0, 0.34, 0.23)):
            pen.polygon([(0.5 - half, bottom), (0.5, top), (0.5 + half, bottom)], colours.main)
        pen.ellipse(0.46, 0.0, 0.54, 0.08, colours.detail)
        return
    pen.ellipse(0.08, 0.25, 0.58, 0.70, colours.main)
    pen.ellipse(0.42, 0.22, 0.94, 0.68, colours.main)
    pen.ellipse(0.22, 0.0, 0.78, 0.55, colours.main)
    for _ in range(dice.count(2, 5)):
        x, y = dice.between(0.22, 0.72), dice.between(0.15, 0.55)
        pen.ellipse(x, y, x + 0.08, y + 0.08, colours.detail)


def _car(pen: Pen, colours: Palette, dice: Dice) -> None:
    roof, bonnet = dice.between(0.20, 0.28), dice.between(0.76, 0.90)
    pane = roof + 0.06
    pen.polygon([(0.10, 0.54), (0.22, roof), (0.62, roof), (bonnet, 0.54)], colours.main)
    pen.polygon([(0.19, 0.50), (0.27, pane), (0.40, pane), (0.40, 0.50)], colours.detail)
    pen.polygon([(0.45, 0.50), (0.45, pane), (0.59, pane), (bonnet - 0.11, 0.50)], colours.detail)
    pen.rounded(0.0, 0.49, 1.0, 0.80, colours.main)
    pen.box(0.93, 0.56, 1.0, 0.63, colours.second)
    for x in (0.13, 0.63):
        pen.ellipse(x, 0.66, x + 0.25, 0.91, colours.second)
        pen.ellipse(x + 0.08, 0.74, x + 0.17, 0.83, colours.detail)


def _boat(pen: Pen, colours: Palette, dice: Dice) -> None:
    mast, deck = dice.between(0.42, 0.52), dice.between(0.66, 0.74)
    foot = deck - 0.06
    pen.box(mast, 0.0, mast + 0.04, deck, colours.detail)
    pen.polygon([(mast + 0.07, 0.04), (mast + 0.07, foot), (0.97, foot)], colours.second)
    pen.polygon([(mast - 0.03, 0.14), (mast - 0.03, foot), (0.08, foot)], colours.second)
    pen.polygon([(0.0, deck), (1.0, deck), (0.82, 1.0), (0.16, 1.0)], colours.main)
    pen.box(0.03, deck, 0.97, deck + 0.05, colours.detail)


def _mushroom(pen: Pen, colours: Palette, dice: Dice) -> None:
    half = dice.between(0.10, 0.16)
    pen.rounded(0.5 - half, 0.45, 0.5 + half, 1.0, colours.second)
    pen.ellipse(0.5 - half - 0.05, 0.86, 0.5 + half + 0.05, 1.0, colours.second)
    brim = dice.between(0.50, 0.60)
    pen.dome(0.02, 0.04, 0.98, 2 * brim - 0.04, colours.main)
    for x, y, size in ((0.22, 0.30, 0.13), (0.46, 0.13, 0.15), (0.66, 0.31, 0.13)):
        x, y = x + dice.between(-0.04, 0.04), y + dice.between(-0.04, 0.04)
        pen.ellipse(x, y, x + size, y + size, colours.detail)


def _person(pen: Pen, colours: Palette, dice: Dice) -> None:
    for hip, foot in ((0.43, dice.between(0.28, 0.40)), (0.57, dice.between(0.60, 0.72))):
        pen.stroke([(hip, 0.60), (foot, 0.94)], 0.12, colours.second)
    for shoulder, out in ((0.36, -1), (0.64, 1)):
        hand = (shoulder + out * dice.between(0.16, 0.28), dice.between(0.36, 0.60))
        pen.stroke([(shoulder, 0.33), hand], 0.09, colours.main)
    pen.rounded(0.32, 0.27, 0.68, 0.66, colours.main)
    pen.ellipse(0.37, 0.0, 0.63, 0.26, colours.second)
    pen.dome(0.35, -0.01, 0.65, 0.22, colours.detail)
    pen.box(0.32, 0.57, 0.68, 0.62, colours.detail)


def _cup(pen: Pen, colours: Palette, dice: Dice) -> None:
    taper = dice.between(0.06, 0.16)
    left, right = 0.06 + taper, 0.80 - taper
    pen.ellipse(0.0, 0.84, 0.88, 1.0, colours.second)
    pen.ring(0.56, dice.between(0.26, 0.34), 0.98, 0.70, 0.08, colours.main)
    pen.polygon([(0.06, 0.20), (0.80, 0.20), (right, 0.86), (left, 0.86)], colours.main)
    pen.ellipse(left, 0.80, right, 0.94, colours.main)
    pen.ellipse(0.06, 0.10, 0.80, 0.30, colours.main)
    pen.ellipse(0.11, 0.13, 0.75, 0.27, colours.detail)
    band = dice.between(0.42, 0.56)
    pen.box(0.16, band, 0.70, band + 0.10, colours.second)


def _chair(pen: Pen, colours: Palette, dice: Dice) -> None:
    seat = dice.between(0.50, 0.58)
    for x in (0.16, 0.74):
        pen.box(x, 0.0, x + 0.10, seat, colours.main)
    if dice.chance(0.5):
        pen.box(0.26, 0.03, 0.74, 0.14, colours.second)
        pen.box(0.26, 0.22, 0.74, 0.33, colours.second)
    else:
        pen.rounded(0.22, 0.02, 0.78, 0.36, colours.second)
    for x in (0.24, 0.70):
        pen.box(x, seat, x + 0.06, 0.88, colours.detail)
    for x in (0.06, 0.84):
        pen.box(x, seat + 0.10, x + 0.10, 1.0, colours.main)
    pen.polygon(
        [(0.16, seat), (0.84, seat), (0.96, seat + 0.13), (0.04, seat + 0.13)], colours.main
    )


def _lamp(pen: Pen, colours: Palette, dice: Dice) -> None:
    rim = dice.between(0.40, 0.50)
    top = dice.between(0.14, 0.24)
    pen.ellipse(0.38, rim - 0.10, 0.62, rim + 0.10, colours.detail)
    pen.box(0.465, rim, 0.535, 0.94, colours.second)
    pen.polygon([(0.5 - top, 0.0), (0.5 + top, 0.0), (0.94, rim), (0.06, rim)], colours.main)
    pen.box(0.08, rim - 0.06, 0.92, rim, colours.second)
    pen.ellipse(0.22, 0.88, 0.78, 1.0, colours.second)


def _flower(pen: Pen, colours: Palette, dice: Dice) -> None:
    pen.box(0.465, 0.40, 0.535, 1.0, colours.second)
    for tip, root in ((0.10, 0.90), (0.90, dice.between(0.84, 0.92))):
        middle = (tip + 0.5) / 2
        below, above = (middle, root + 0.02), (middle, root - 0.16)
        pen.polygon([(0.5, root + 0.04), below, (tip, root - 0.22), above], colours.second)
    petals = dice.count(5, 8)
    turn = dice.between(0, 2 * math.pi)
    for petal in range(petals):
        angle = turn + 2 * math.pi * petal / petals
        x, y = 0.5 + 0.19 * math.cos(angle), 0.31 + 0.19 * math.sin(angle)
        pen.ellipse(x - 0.12, y - 0.12, x + 0.12, y + 0.12, colours.main)
    pen.ellipse(0.39, 0.20, 0.61, 0.42, colours.detail)


THINGS: dict[str, Callable[[Pen, Palette, Dice], None]] = {
    "house": _house,
    "tree": _tree,
    "car": _car,
    "boat": _boat,
    "mushroom": _mushroom,
    "person": _person,
    "cup": _cup,
    "chair": _chair,
    "lamp": _lamp,
    "flower": _flower,
}
"""How to draw each kind, in the order of the labels."""

CLASS_NAMES = list(THINGS)


def label_of(index: int) -> int:
    """Return the class of picture `index`: kinds take turns, so that classes are balanced."""
    return index % len(CLASS_NAMES)


def draw(
    index: int, split: Split, side_px: int = CANVAS_PX, *, objects: bool = True
) -> Image.Image:
    """Draw one picture; the same arguments always give the same pixels.

    Args:
        index: Number of the picture within its split, from 0; its class is `label_of(index)`.
        split: The splits are drawn from separate random streams.
        side_px: Width and height, in pixels.
        objects: False leaves the object out. Nothing then tells which way up the picture is,
            which the tests use to show that the background gives nothing away.

    Returns:
        An RGB picture, `side_px` x `side_px`.
    """
    seed = np.random.SeedSequence([GENERATOR_VERSION, ("train", "test").index(split), index])
    rng = np.random.default_rng(seed)
    picture = _background(rng, side_px)
    if objects:
        width, height = rng.uniform(0.66, 0.92) * side_px * rng.uniform(0.88, 1.0, size=2)
        left, top = rng.uniform(0, side_px - width), rng.uniform(0, side_px - height)
        pen = Pen(picture, box=(left, top, width, height), mirrored=bool(rng.random() < 0.5))
        colours = _colours(rng)
        THINGS[CLASS_NAMES[label_of(index)]](pen, colours, Dice(rng))
    return picture


def _background(rng: np.random.Generator, side_px: int) -> Image.Image:
    coarse = rng.integers(10, 90, size=(4, 4, 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((side_px, side_px), Image.Resampling.BICUBIC)
    # An 8-bit resize marks rows and columns differently; a random turn makes the mark say nothing.
    return Image.fromarray(np.rot90(np.asarray(smooth), k=int(rng.integers(4))).copy())


def _colours(rng: np.random.Generator) -> Palette:
    hue = rng.uniform()
    detail = (240, 240, 235) if rng.random() < 0.5 else (30, 30, 40)
    return Palette(
        main=_from_hsv(hue, rng.uniform(0.5, 0.9), rng.uniform(0.8, 1.0)),
        second=_from_hsv(hue + rng.uniform(0.2, 0.8), rng.uniform(0.4, 0.8), rng.uniform(0.6, 0.9)),
        detail=detail,
    )


def _from_hsv(hue: float, saturation: float, value: float) -> Colour:
    red, green, blue = colorsys.hsv_to_rgb(hue % 1.0, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


class DrawnSource(Source):
    """The source behind `data.source=drawn10`."""

    spec = "drawn10"
    class_names = CLASS_NAMES
    counts = COUNTS

    def identity(self) -> dict[str, Any]:
        """Return the generator's version and the number of pictures."""
        return {"kind": self.spec, "version": GENERATOR_VERSION, "counts": COUNTS}

    def records(self, split: Split, start: int = 0) -> Iterator[Record]:
        """Yield the pictures of `split` in order, from number `start`."""
        for index in range(start, COUNTS[split]):
            yield Record(f"{split}/{index:05d}", draw(index, split), label_of(index))
