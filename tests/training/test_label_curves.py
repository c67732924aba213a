"""The figure of label efficiency."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from training.figures import VERMILLION, Drawing
from training.label_curves import Curve, label_chart, label_curves
from training.store import StageResult

POINTS = [
    {"labels": 10, "top1": 0.2, "random_top1": 0.15},
    {"labels": 100, "top1": 0.5, "random_top1": 0.2},
    {"labels": 10_000, "top1": 0.8, "random_top1": 0.3},
]


def result(stage: str, **scores: object) -> StageResult:
    return StageResult(
        stage=stage,
        key="k",
        directory=Path(),
        status="computed",
        wall_seconds=1,
        digest="d",
        scores=scores,
    )


def places(drawing: Drawing, colour: str, *, dashed: bool) -> list[tuple[float, float]]:
    """Corners of the line of a colour, in the figure's own units."""
    (path,) = [
        path.attrib["d"]
        for path in ElementTree.fromstring(drawing.svg).iter("path")
        if f"stroke: {colour}" in path.get("style", "")
        and ("stroke-dasharray" in path.get("style", "")) is dashed
        and "clip-path" in path.attrib
    ]
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] (-?[\d.]+) (-?[\d.]+)", path)]


def test_the_probe_and_its_control_are_curves_over_the_labels() -> None:
    assert label_curves({}) == []
    probe, control = label_curves({"label_efficiency": result("label_efficiency", points=POINTS)})
    assert probe.scores == {10: 0.2, 100: 0.5, 10_000: 0.8}
    assert control.scores == {10: 0.15, 100: 0.2, 10_000: 0.3}
    assert (probe.control, control.control) == (False, True)


def test_ten_times_the_labels_are_as_far_everywhere() -> None:
    curves = label_curves({"label_efficiency": result("label_efficiency", points=POINTS)})
    drawing = label_chart(curves, chance=0.1)
    (x0, y0), (x1, y1), (x2, y2) = places(drawing, "var(--accent)", dashed=False)
    assert x2 - x1 == pytest.approx(2 * (x1 - x0), rel=1e-3)
    assert y0 - y1 == pytest.approx(y1 - y2, rel=1e-3)
    assert y0 > y1
    texts = [element.text for element in ElementTree.fromstring(drawing.svg).iter("text")]
    assert {"10", "100", "10,000", "labels", "guessing", "linear probe"} <= set(texts)
    assert "linear probe from 0.200 to 0.800" in drawing.alt


def test_a_control_has_the_colour_of_what_it_is_compared_with() -> None:
    curves = [
        Curve(name="a", scores={1: 0.1, 2: 0.2}, spread={}),
        Curve(name="a, random", scores={1: 0.1, 2: 0.1}, spread={}, control=True),
        Curve(name="b", scores={1: 0.3, 2: 0.4}, spread={}),
    ]
    drawing = label_chart(curves, chance=None)
    assert len(places(drawing, "var(--accent)", dashed=True)) == 2
    assert len(places(drawing, VERMILLION, dashed=False)) == 2
