"""Figures of the report, as SVG for the inside of an HTML page. The only user of matplotlib.

Text stays text, ink and rules take the page's colours (so that a dark page has light figures), and
the same data give the same bytes. Series are told apart by colour, marker and dash at once, in
colours of Okabe and Ito's set for all kinds of colour vision (https://jfly.uni-koeln.de/color/).
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from xml.etree import ElementTree

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

BLUE, VERMILLION, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#aa3377"
"""Colours that stand out, 3:1 or more, on white and on black: three of Okabe and Ito's, one of Paul
Tol's."""

ROTATION_CHANCE = 0.25
"""Rotation accuracy of guessing."""

STYLES = ((BLUE, "o"), (VERMILLION, "s"), (GREEN, "^"), (PURPLE, "D"))
"""Colour and marker of a chart's first to fourth kind of line."""

_READERS = (
    ("top1", "probe, mean of tokens"),
    ("cls_top1", "probe, class token"),
    ("knn_top1", "k-NN, mean of tokens"),
)

# Placeholders for the page's own colours: values that no chart uses otherwise.
_INK, _FAINT, _RULE, _PAPER = "#010203", "#040506", "#070809", "#0a0b0c"
_PAGE_COLOURS = {
    _INK: "--ink",
    _FAINT: "--faint",
    _RULE: "--rule",
    _PAPER: "--paper",
    BLUE: "--accent",  # sky blue, of the same set, on a dark page
}

_STYLE_SHEET: Any = {
    "svg.fonttype": "none",  # text as text: it can be searched, selected and read aloud
    "font.size": 9.5,
    "text.color": _INK,
    "axes.edgecolor": _RULE,
    "axes.labelcolor": _FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "grid.color": _RULE,
    "grid.linewidth": 0.6,
    "xtick.color": _RULE,
    "ytick.color": _RULE,
    "xtick.labelcolor": _FAINT,
    "ytick.labelcolor": _FAINT,
    "ytick.left": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handlelength": 2.6,
}
_DOTTED = (0, (1, 2))


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A figure.

    Attributes:
        svg: An `<svg>` element without a size of its own; it carries `alt` as its label.
        alt: What a reader who does not see it should know.
        caption: What stands below it.
    """

    svg: str
    alt: str
    caption: str
    figure: Figure = field(repr=False, compare=False)

    def png(self) -> bytes:
        """Return the figure as a picture on white, for places that show no SVG."""
        stream = io.BytesIO()
        self.figure.savefig(stream, format="png", dpi=110, facecolor="white")
        return stream.getvalue()


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A score with its interval, fractions in [0, 1]."""

    label: str
    score: float
    low: float
    high: float
    control: bool = False


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of a chart.

    Attributes:
        label: In the legend.
        x: Ascending.
        y: As many.
        colour: Of line and markers.
        marker: Of matplotlib's, at each point; none for none.
        control: Whether it is there to be compared with: dashed, its markers hollow.
        spread: Half the length of a whisker at each point, where there are any.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str = BLUE
    marker: str | None = None
    control: bool = False
    spread: Sequence[float] = ()

    @property
    def course(self) -> str:
        """Where it begins and where it ends, in words."""
        return f"{self.label} from {self.y[0]:.3f} to {self.y[-1]:.3f}"


def score_chart(
    bars: Sequence[Bar], *, chance: float | None, whiskers: str = "95% intervals"
) -> Drawing:
    """Draw scores as dots with whiskers, one row each, from the top down.

    Args:
        bars: At least one.
        chance: Score of guessing.
        whiskers: What they are.
    """
    with matplotlib.rc_context(_STYLE_SHEET):
        figure = Figure(figsize=(4.9, 0.7 + 0.32 * len(bars)), layout="constrained")
        axes = figure.add_subplot()
        axes.grid(axis="x")
        for row, bar in enumerate(bars):
            colour = _FAINT if bar.control else BLUE
            axes.plot([bar.low, bar.high], [row, row], color=colour, linewidth=1.6)
            fill = _PAPER if bar.control else colour
            axes.plot([bar.score], [row], "o", markersize=6.5, color=colour, markerfacecolor=fill)
            # Beyond the whisker, where neither hides the other.
            axes.annotate(
                f"{bar.score:.2f}",
                (bar.high, row),
                xytext=(7, 0),
                textcoords="offset points",
                va="center",
                fontsize=8.5,
            )
        if chance is not None:
            axes.axvline(chance, color=_FAINT, linewidth=0.9, linestyle=_DOTTED)
        axes.set_yticks(range(len(bars)), [bar.label for bar in bars])
        axes.tick_params(axis="y", labelcolor=_INK)
        axes.set_ylim(len(bars) - 0.5, -0.5)
        axes.set_xlim(0, 1.08)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
        scores = ", ".join(
            f"{bar.label} {bar.score:.3f}" + (" (control)" if bar.control else "") for bar in bars
        )
        return _draw(
            figure,
            name="scores",
            alt=f"Top-1 on test, each with its interval: {scores}.",
            caption=f"Top-1 on test with {whiskers}. Hollow: controls."
            + (" Dotted: guessing." if chance is not None else ""),
        )


def pretraining_charts(
    rows: Sequence[Mapping[str, float]], *, resumed: Sequence[float] = ()
) -> list[Drawing]:
    """Draw loss, rotation accuracy and learning rate over epochs, those that were recorded.

    Args:
        rows: The lines of `metrics.jsonl`.
        resumed: Epochs at which training went on after an interruption.
    """
    loss = [
        Line(label=label, x=x, y=y, colour=colour, marker=marker)
        for key, label, colour, marker in (
            ("train/loss", "train", BLUE, None),
            ("val/loss", "val", VERMILLION, "s"),
        )
        for x, y in _columns(rows, key)
    ]
    accuracy = [
        Line(label="val", x=x, y=y, colour=VERMILLION, marker="s")
        for x, y in _columns(rows, "val/rotation_accuracy")
    ]
    rate = [Line(label="learning rate", x=x, y=y) for x, y in _columns(rows, "train/lr")]
    charts = []
    if loss:
        charts.append(
            line_chart(
                loss,
                name="loss",
                title="loss, nats",
                reference=(math.log(4), "guessing"),
                alt=f"Pretraining loss over epochs: {'; '.join(line.course for line in loss)}. "
                f"Guessing costs {math.log(4):.3f}.",
                caption="Loss of the pretext task.",
                marks=resumed,
            )
        )
    if accuracy:
        charts.append(
            line_chart(
                accuracy,
                name="rotation-accuracy",
                title="rotation accuracy",
                reference=(ROTATION_CHANCE, "guessing"),
                alt=f"Rotation accuracy over epochs: {accuracy[0].course}. Guessing: 0.250.",
                caption="Share of turns told right, on val.",
                marks=resumed,
            )
        )
    if rate:
        values = rate[0].y
        charts.append(
            line_chart(
                rate,
                name="learning-rate",
                title="learning rate",
                alt=f"Learning rate over epochs: {max(values):.2g} at its peak, {values[-1]:.2g} "
                "at the end.",
                caption="Warm-up, then cosine.",
                marks=resumed,
            )
        )
    return charts


def transfer_chart(
    rows_by_name: Mapping[str, Sequence[Mapping[str, float]]], *, control: str
) -> Drawing | None:
    """Draw top-1 on val over epochs for up to four stages; none where it was not recorded.

    Args:
        rows_by_name: The lines of each one's `metrics.jsonl`, by the name to show.
        control: Name of the one that the others are compared with.
    """
    lines = [
        Line(label=name, x=x, y=y, colour=colour, marker=marker, control=name == control)
        for name, (colour, marker) in zip(rows_by_name, STYLES[: len(rows_by_name)], strict=True)
        for x, y in _columns(rows_by_name[name], "val/top1")
    ]
    if not lines:
        return None
    return line_chart(
        lines,
        name="transfer",
        title="top-1 on val",
        wide=True,
        alt=f"Top-1 on val over epochs: {'; '.join(line.course for line in lines)}.",
        caption="Top-1 on val while training. The weights of the best epoch are kept.",
    )


def layer_chart(layers: Sequence[Mapping[str, Any]], *, chance: float | None) -> Drawing:
    """Draw what each layer knows, and the same of a random backbone.

    Args:
        layers: Rows of the feature analysis, from the embedding to the last block; at least one.
        chance: Score of guessing.
    """
    lines = [
        Line(
            label=f"random: {label}" if prefix else label,
            x=range(len(layers)),
            y=[row[prefix + key] for row in layers],
            colour=colour,
            marker=marker,
            control=bool(prefix),
        )
        for prefix in ("", "random_")  # the legend fills a column with each
        for (key, label), (colour, marker) in zip(_READERS, STYLES[:3], strict=True)
        if all(prefix + key in row for row in layers)
    ]
    best = max(layers, key=lambda row: float(row["top1"]))
    return line_chart(
        lines,
        name="layers",
        title="top-1 on test",
        x_names=[str(row["name"]).removeprefix("block ") for row in layers],
        x_label="block",
        reference=(chance, "guessing") if chance is not None else None,
        wide=True,
        alt="Top-1 on test by layer, from the embedding to the last block. The probe on the mean "
        f"of the tokens is best at {best['name']}, with {best['top1']:.3f}. All values are in the "
        "table that follows.",
        caption="Top-1 on test by layer. Dashed and hollow: the same on a random backbone.",
    )


def line_chart(
    lines: Sequence[Line],
    *,
    name: str,
    title: str,
    alt: str,
    caption: str,
    x_label: str = "epoch",
    x_names: Sequence[str] = (),
    x_counts: Sequence[int] = (),
    reference: tuple[float, str] | None = None,
    marks: Sequence[float] = (),
    wide: bool = False,
) -> Drawing:
    """Draw lines over one axis.

    Args:
        lines: At least one.
        name: Of the figure, unique on its page.
        title: What the values are.
        alt: What a reader who does not see it should know.
        caption: What stands below it.
        x_label: What the axis counts.
        x_names: Names of the places 0, 1, 2, ... on the axis, where it counts nothing.
        x_counts: Counts that are named on the axis, which is logarithmic then.
        reference: A value to compare with, and what it is.
        marks: Places on the axis at which training was resumed.
        wide: Whether it stands alone.
    """
    with matplotlib.rc_context(_STYLE_SHEET):
        figure = Figure(figsize=(4.9, 3.3) if wide else (2.7, 2.3), layout="constrained")
        axes = figure.add_subplot()
        axes.grid(axis="y")
        for line in lines:
            _add_line(axes, line)
        if marks:
            _add_marks(axes, marks)
            alt += f" Resumed after an interruption at epoch {_listed(marks)}."
            caption += " Triangles: resumed after an interruption."
        if reference is not None:
            height, text = reference
            axes.axhline(height, color=_FAINT, linewidth=0.9, linestyle=_DOTTED)
            axes.annotate(
                text,
                (1, height),
                xycoords=("axes fraction", "data"),
                xytext=(0, 2),
                textcoords="offset points",
                ha="right",
                color=_FAINT,
                fontsize=8.5,
            )
        axes.set_title(title, loc="left", fontsize=9.5)  # level, where a y label would stand
        axes.set_xlabel(x_label)
        if x_names:
            axes.set_xticks(range(len(x_names)), x_names)
        elif x_counts:
            axes.set_xscale("log")
            axes.set_xticks(x_counts, [f"{count:,}" for count in x_counts])
            axes.minorticks_off()
        else:
            axes.xaxis.set_major_locator(MaxNLocator(6 if wide else 4, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        if len(lines) > 1:
            figure.legend(loc="outside lower left", ncols=2)
        return _draw(figure, name=name, alt=alt, caption=caption)


def _add_line(axes: Axes, line: Line) -> None:
    axes.plot(
        line.x,
        line.y,
        label=line.label,
        color=line.colour,
        linewidth=1.2 if line.control else 1.7,
        linestyle=(0, (4, 2.5)) if line.control else "-",
        # Markers that touch hide what they mark.
        marker=line.marker if len(line.x) <= 40 else None,
        markersize=4.5,
        markerfacecolor=_PAPER if line.control else line.colour,
    )
    for x, y, half in zip(line.x, line.y, line.spread, strict=False):
        axes.plot([x, x], [y - half, y + half], color=line.colour, linewidth=1.2)


def _add_marks(axes: Axes, places: Sequence[float]) -> None:
    axes.plot(
        places,
        [0] * len(places),
        "^",
        transform=axes.get_xaxis_transform(),
        color=_INK,
        markersize=6,
        clip_on=False,
        zorder=5,
    )
    for place in places:
        axes.axvline(place, color=_INK, linewidth=0.6, linestyle=_DOTTED)


def _listed(epochs: Sequence[float]) -> str:
    return ", ".join(f"{epoch:.2f}".rstrip("0").rstrip(".") for epoch in epochs)


def _columns(
    rows: Sequence[Mapping[str, float]], key: str
) -> list[tuple[list[float], list[float]]]:
    """Return one pair of epochs and values of the rows that have a value, or none.

    The loss of a skipped step is null.
    """
    found = [(row["epoch"], row[key]) for row in rows if row.get(key) is not None]
    return [([epoch for epoch, _ in found], [value for _, value in found])] if found else []


def _draw(figure: Figure, *, name: str, alt: str, caption: str) -> Drawing:
    stream = io.StringIO()
    # The salt makes the ids, which are random otherwise, a function of the content.
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(stream, format="svg")
    root = ElementTree.fromstring(stream.getvalue())
    parents = {child: parent for parent in root.iter() for child in parent}
    for element in list(root.iter()):
        element.tag = element.tag.rpartition("}")[2]
        if element.tag in {"metadata", "style"}:  # the style would apply to the whole page
            parents[element].remove(element)
            continue
        attributes = {key.rpartition("}")[2]: value for key, value in element.items()}
        if element.tag == "g":  # nothing refers to a group, and ids must be unique on the page
            attributes.pop("id", None)
        element.attrib = {key: _adapt(key, value, name) for key, value in attributes.items()}
    for size in ("width", "height"):  # the page decides; viewBox keeps the proportions
        root.attrib.pop(size)
    root.attrib |= {"role": "img", "aria-label": alt}
    svg = ElementTree.tostring(root, encoding="unicode")
    return Drawing(svg=svg, alt=alt, caption=caption, figure=figure)


def _adapt(key: str, value: str, name: str) -> str:
    """Give an attribute the page's colours and font, and ids that are unique on the page."""
    if key == "id":
        return f"{name}-{value}"
    if key == "href":
        return value.replace("#", f"#{name}-", 1)
    value = value.replace("url(#", f"url(#{name}-")
    if key == "style":
        value = re.sub(r"font: ([\d.]+px)[^;]*", r"font-size: \1", value)  # before matplotlib 3.11
        value = re.sub(r"font-family: [^;]*;? ?", "", value)
        for colour, variable in _PAGE_COLOURS.items():
            value = value.replace(colour, f"var({variable})")
    return value
