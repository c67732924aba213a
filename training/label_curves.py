"""The curves of label efficiency: top-1 over the number of labels, as the stages recorded it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from training.figures import STYLES, Drawing, Line, line_chart
from training.store import StageResult


@dataclass(frozen=True, kw_only=True)
class Curve:
    """How the score of one way of using labels grows with them.

    Attributes:
        name: The way, in words.
        scores: Top-1 on test, a fraction, by number of labels, ascending.
        control: Whether it is there to be compared with.
    """

    name: str
    scores: Mapping[int, float]
    control: bool = False


def label_curves(results: Mapping[str, StageResult]) -> list[Curve]:
    """Return the curves of the stages that are there, those of pretraining first.

    Args:
        results: By stage name, any of them.
    """
    if "label_efficiency" not in results:
        return []
    points = results["label_efficiency"].scores["points"]
    return [
        Curve(name=name, scores={row["labels"]: row[key] for row in points}, control=control)
        for name, key, control in (
            ("linear probe", "top1", False),
            ("linear probe, random backbone", "random_top1", True),
        )
    ]


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
        )
        for curve in curves
    ]
    return line_chart(
        lines,
        name="labels",
        title="top-1 on test",
        x_label="labels",
        x_counts=sorted({count for curve in curves for count in curve.scores}),
        reference=(chance, "guessing") if chance is not None else None,
        wide=True,
        alt="Top-1 on test over the number of labels: "
        f"{'; '.join(line.course for line in lines)}. All values are in the table that follows.",
        caption="Top-1 on test over the number of labels. Dashed and hollow: controls.",
    )


def _kind(curve: Curve) -> str:
    """A control of the same kind has the same colour."""
    return curve.name.partition(",")[0]
