"""The curves of label efficiency: top-1 over the number of labels, as the stages recorded it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from training.figures import STYLES, Drawing, Line, line_chart
from training.seeds import Spread
from training.store import StageResult

_TRAINED = {"finetune_2": "fine-tuning, last two blocks", "from_scratch": "from scratch"}
"""Stages that a curve may be trained with, and what it is called."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """How the score of one way of using labels grows with them.

    Attributes:
        name: The way, in words.
        scores: Top-1 on test, a fraction, by number of labels, ascending; of several seeds the
            mean.
        spread: Between seeds, for the numbers of labels that several were trained with.
        control: Whether it is there to be compared with.
    """

    name: str
    scores: Mapping[int, float]
    spread: Mapping[int, Spread]
    control: bool = False


def label_curves(
    results: Mapping[str, StageResult],
    variants: Mapping[str, Mapping[str, StageResult]] | None = None,
) -> list[Curve]:
    """Return the curves of the stages that are there: the probe's, then the trained ones.

    Args:
        results: Of a run's own stages, by name, any of them.
        variants: Of those of its variants, by the variant's name.
    """
    every = [results, *(variants or {}).values()]
    probed = [
        row
        for one in every
        if "label_efficiency" in one
        for row in one["label_efficiency"].scores["points"]
    ]
    curves = [
        _curve(name, [(row["labels"], row[score]) for row in probed], control=control)
        for name, score, control in (
            ("linear probe", "top1", False),
            ("linear probe, random backbone", "random_top1", True),
        )
        if probed
    ]
    for stage, name in _TRAINED.items():
        points = list(_trained(stage, every))
        if len({labels for labels, _ in points}) > 1:
            curves.append(_curve(name, points, control=stage == "from_scratch"))
    return curves


def label_chart(curves: Sequence[Curve], *, chance: float | None) -> Drawing:
    """Draw top-1 over the number of labels.

    Args:
        curves: At least one.
        chance: Score of guessing.
    """
    colours = dict(zip(dict.fromkeys(_kind(curve) for curve in curves), STYLES, strict=False))
    lines = [
        Line(
            label=curve.name,
            x=list(curve.scores),
            y=list(curve.scores.values()),
            colour=colours[_kind(curve)][0],
            marker=colours[_kind(curve)][1],
            control=curve.control,
            spread=[
                curve.spread[count].std if count in curve.spread else 0.0 for count in curve.scores
            ]
            if curve.spread
            else (),
        )
        for curve in curves
    ]
    several = any(curve.spread for curve in curves)
    return line_chart(
        lines,
        name="labels",
        title="top-1 on test",
        x_label="labels",
        x_counts=list(curves[0].scores),
        reference=(chance, "guessing") if chance is not None else None,
        wide=True,
        alt="Top-1 on test over the number of labels: "
        f"{'; '.join(line.course for line in lines)}. All values are in the table that follows.",
        caption="Top-1 on test over the number of labels. Dashed and hollow: controls."
        + (" Whiskers: standard deviation between seeds." if several else ""),
    )


def _trained(stage: str, every: Sequence[Mapping[str, StageResult]]) -> Iterator[tuple[int, float]]:
    for one in every:
        if stage in one and "labels" in one[stage].scores:
            yield one[stage].scores["labels"], one[stage].scores["top1"]


def _curve(name: str, points: Sequence[tuple[int, float]], *, control: bool) -> Curve:
    """Gather scores, of one seed or several, by number of labels."""
    counts = sorted({labels for labels, _ in points})
    by_count = {count: [score for labels, score in points if labels == count] for count in counts}
    spread = {count: Spread.of(found) for count, found in by_count.items() if len(found) > 1}
    return Curve(
        name=name,
        scores={
            count: spread[count].mean if count in spread else found[0]
            for count, found in by_count.items()
        },
        spread=spread,
        control=control,
    )


def _kind(curve: Curve) -> str:
    """A control of the same kind has the same colour."""
    return curve.name.partition(",")[0]
