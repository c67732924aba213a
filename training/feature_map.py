"""A map of features: the plane in which they differ most, one mark per image, told by class.

A class has a colour and a shape. The five colours are named by the page, light ones on a dark
page; any two of them can be told apart in all kinds of colour vision, and so can the shapes
without colour.

Dimension key: N = images, D = width of a feature.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import escape
from numpy.typing import NDArray

COLOURS = 5
"""Colours that the page names, `--class-0` to `--class-4`."""

MOST_CLASSES = 20
"""Classes with a mark of their own: as many as there are pairs of colour and shape."""

_SIDE, _MARGIN = 320.0, 8.0
"""Of a panel, in the units of its SVG."""

_SHAPES = (
    "m-2.7 0a2.7 2.7 0 1 0 5.4 0a2.7 2.7 0 1 0-5.4 0z",  # disc
    "m0-3.7l3.4 5.9h-6.8z",  # triangle
    "m-3.6-1h2.6v-2.6h2v2.6h2.6v2h-2.6v2.6h-2v-2.6h-2.6z",  # plus
    "m-2.4-2.4h4.8v4.8h-4.8zm1.3 1.3v2.2h2.2v-2.2z",  # frame
)


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One map.

    Attributes:
        svg: An `<svg>` element without a size of its own; it carries `alt` as its label.
        alt: What a reader who does not see it should know.
        caption: What stands below it.
    """

    svg: str
    alt: str
    caption: str


@dataclass(frozen=True, kw_only=True)
class FeatureMap:
    """Maps of several features of the same images.

    Attributes:
        panels: One for each.
        legend: The mark of each class, an `<svg>`, and the class's name.
        others: Classes that share the mark without colour.
    """

    panels: Sequence[Panel]
    legend: Sequence[tuple[str, str]]
    others: int


def draw_feature_map(
    features: Mapping[str, NDArray[np.float32]], labels: NDArray[np.int64], names: Sequence[str]
) -> FeatureMap:
    """Draw the first two principal components of each kind of features.

    Args:
        features: By title, `(N, D)` each, with N at least 3 and D at least 2.
        labels: `(N,)`, the classes, for all of them.
        names: Of the classes.
    """
    marks = [(_class(label), _shape(label)) for label in range(min(len(names), MOST_CLASSES))]
    return FeatureMap(
        panels=[_panel(title, found, labels, names) for title, found in features.items()],
        legend=[
            (
                f'<svg class="mark" viewBox="-5 -5 10 10" aria-hidden="true">'
                f'<path class="{colour}" d="M0 0{shape}"/></svg>',
                name,
            )
            for (colour, shape), name in zip(marks, names, strict=False)
        ],
        others=max(0, len(names) - MOST_CLASSES),
    )


def principal_plane(features: NDArray[np.float32]) -> tuple[NDArray[np.float64], float]:
    """Project features onto the two directions in which they vary most.

    Args:
        features: `(N, D)`.

    Returns:
        places: `(N, 2)`, centred. The sign of an axis is such that its largest weight is positive.
        share: Part of the variance that the plane holds, in [0, 1].
    """
    centred = features.astype(np.float64) - features.mean(axis=0, dtype=np.float64)
    variances, axes = np.linalg.eigh(centred.T @ centred)  # ascending
    axes = axes[:, :-3:-1]
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), [0, 1]])
    total = variances.sum()
    return centred @ axes, float(variances[-2:].sum() / total) if total > 0 else 0.0


def _panel(
    title: str, features: NDArray[np.float32], labels: NDArray[np.int64], names: Sequence[str]
) -> Panel:
    places, share = principal_plane(features)
    low, high = places.min(axis=0), places.max(axis=0)
    # One scale for both axes: distances in the plane are what they are.
    scale = (_SIDE - 2 * _MARGIN) / max(float((high - low).max()), 1e-12)
    points = _SIDE / 2 + (places - (low + high) / 2) * scale * (1, -1)
    paths = []
    for label in range(len(names)):
        # The class's marks as one path: a third of the bytes.
        shapes = "".join(f"M{x:.1f} {y:.1f}{_shape(label)}" for x, y in points[labels == label])
        if shapes:
            name = escape(names[label])
            paths.append(f'<path class="{_class(label)}" d="{shapes}"><title>{name}</title></path>')
    alt = (
        f"{title}: features of {len(labels):,} test images of {len(names)} classes in their "
        f"principal plane, which holds {share:.0%} of the variance. {_overlap(places, labels)}"
    )
    return Panel(
        svg=f'<svg viewBox="0 0 {_SIDE:.0f} {_SIDE:.0f}" role="img" aria-label="{escape(alt)}">'
        f"{''.join(paths)}</svg>",
        alt=alt,
        caption=f"{title}. The plane holds {share:.0%} of the variance.",
    )


def _overlap(places: NDArray[np.float64], labels: NDArray[np.int64]) -> str:
    """Say in words how far classes lie apart in the plane."""
    centres = {label: places[labels == label].mean(axis=0) for label in np.unique(labels).tolist()}
    between = sum(
        np.count_nonzero(labels == label) * float((centre**2).sum())
        for label, centre in centres.items()
    )
    total = float((places**2).sum())
    share = between / total if total > 0 else 0.0
    return f"The class explains {share:.0%} of the spread in the plane."


def _class(label: int) -> str:
    return f"class-{label % COLOURS}" if label < MOST_CLASSES else "class-other"


def _shape(label: int) -> str:
    return _SHAPES[label // COLOURS] if label < MOST_CLASSES else _SHAPES[0]
