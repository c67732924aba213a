import re
import subprocess
import sys
from typing import Any
from xml.etree import ElementTree

import matplotlib
import pytest

from training import figures
from training.figures import BLUE, GREEN, PURPLE, VERMILLION, Bar, Drawing

TOLS_PURPLE = "#aa3377"
SAFE_COLOURS = {
    # Okabe and Ito's.
    *("#000000", "#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7"),
    TOLS_PURPLE,  # of Paul Tol's "bright" scheme
}

METRICS = [
    {"step": 5, "epoch": 0.5, "train/loss": 1.39, "train/lr": 1e-3},
    {"step": 10, "epoch": 1.0, "train/loss": 1.19, "train/lr": 2e-3},
    {"step": 10, "epoch": 1.0, "val/loss": 1.25, "val/rotation_accuracy": 0.31},
    {"step": 15, "epoch": 1.5, "train/loss": 1.09, "train/lr": 1e-3},
    {"step": 20, "epoch": 2.0, "train/loss": 0.59, "train/lr": 0.0},
    {"step": 20, "epoch": 2.0, "val/loss": 0.75, "val/rotation_accuracy": 0.71},
]
LAYERS: list[dict[str, Any]] = [
    {"layer": 0, "name": "embedding", "top1": 0.11, "cls_top1": 0.1, "knn_top1": 0.12},
    {"layer": 1, "name": "block 1", "top1": 0.31, "cls_top1": 0.2, "knn_top1": 0.22},
    {"layer": 2, "name": "block 2", "top1": 0.71, "cls_top1": 0.5, "knn_top1": 0.42},
]
for _row in LAYERS:
    _row |= {f"random_{key}": _row[key] ** 2 for key in ("top1", "cls_top1", "knn_top1")}
TRANSFER = {
    name: [{"step": 3 * k, "epoch": float(k), "val/top1": top * k} for k in (1, 2, 3)]
    for name, top in (("last block", 0.1), ("last two", 0.2), ("from scratch", 0.3))
}
BARS = [
    Bar(label="random", score=0.2, low=0.15, high=0.25, control=True),
    Bar(label="probe", score=0.6, low=0.5, high=0.7),
]


def drawings() -> dict[str, Drawing]:
    transfer = figures.transfer_chart(TRANSFER, control="from scratch")
    assert transfer is not None
    loss, accuracy, rate = figures.pretraining_charts(METRICS)
    return {
        "scores": figures.score_chart(BARS, chance=0.1),
        "loss": loss,
        "accuracy": accuracy,
        "rate": rate,
        "layers": figures.layer_chart(LAYERS, chance=0.1),
        "transfer": transfer,
    }


@pytest.fixture(scope="module")
def drawn() -> dict[str, Drawing]:
    return drawings()


def texts(drawing: Drawing) -> list[str]:
    return [e.text or "" for e in ElementTree.fromstring(drawing.svg).iter("text")]


def points_of(drawing: Drawing, colour: str, *, dashed: bool = False) -> list[tuple[float, float]]:
    """Corners of the longest line of a colour, in the figure's own units."""
    found = [
        re.findall(r"[ML] (-?[\d.]+) (-?[\d.]+)", path.attrib["d"])
        for path in ElementTree.fromstring(drawing.svg).iter("path")
        if f"stroke: {colour}" in path.get("style", "")
        and ("stroke-dasharray" in path.get("style", "")) is dashed
        and "clip-path" in path.attrib
    ]
    return [(float(x), float(y)) for x, y in max(found, key=len)]


def assert_proportional(heights: list[float], values: list[float]) -> None:
    """Heights run downwards, values upwards; equal differences must stay equal."""
    scale = (heights[0] - heights[-1]) / (values[-1] - values[0])
    assert scale > 0
    for height, value in zip(heights, values, strict=True):
        assert heights[0] - height == pytest.approx(scale * (value - values[0]), abs=0.01)


NAMES = ["scores", "loss", "accuracy", "rate", "layers", "transfer"]


@pytest.mark.parametrize("name", NAMES)
def test_a_figure_says_in_words_what_it_shows(name: str, drawn: dict[str, Drawing]) -> None:
    root = ElementTree.fromstring(drawn[name].svg)
    assert root.attrib["role"] == "img"
    assert root.attrib["aria-label"] == drawn[name].alt
    assert re.search(r"\d\.\d", drawn[name].alt)
    assert drawn[name].caption.endswith(".")


@pytest.mark.parametrize("name", NAMES)
def test_text_stays_text_in_the_pages_font(name: str, drawn: dict[str, Drawing]) -> None:
    assert any(text.isascii() and text for text in texts(drawn[name]))
    assert "font-family" not in drawn[name].svg
    assert "DejaVu" not in drawn[name].svg


@pytest.mark.parametrize("name", NAMES)
def test_a_figure_loads_nothing_and_keeps_its_style_to_itself(
    name: str, drawn: dict[str, Drawing]
) -> None:
    svg = drawn[name].svg
    assert "http" not in svg
    assert "<style" not in svg
    assert "<image" not in svg


@pytest.mark.parametrize("name", NAMES)
def test_a_figure_has_no_size_of_its_own(name: str, drawn: dict[str, Drawing]) -> None:
    root = ElementTree.fromstring(drawn[name].svg)
    assert not {"width", "height"} & set(root.attrib)
    assert root.attrib["viewBox"].startswith("0 0 ")


@pytest.mark.parametrize("name", NAMES)
def test_colours_are_the_pages_or_safe_for_all_kinds_of_colour_vision(
    name: str, drawn: dict[str, Drawing]
) -> None:
    styles = " ".join(
        element.get("style", "") for element in ElementTree.fromstring(drawn[name].svg).iter()
    )
    assert set(re.findall(r"#[0-9a-f]{6}", styles)) <= SAFE_COLOURS
    assert "var(--faint)" in styles


def test_the_four_colours_stand_out_on_white_and_on_black() -> None:
    def luminance(colour: str) -> float:
        """Relative luminance as WCAG 2 defines it."""
        channels = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    for colour in (BLUE, VERMILLION, GREEN, PURPLE):
        assert colour in SAFE_COLOURS
        assert 1.05 / (luminance(colour) + 0.05) >= 3
        assert (luminance(colour) + 0.05) / 0.05 >= 3


def test_all_figures_fit_on_one_page(drawn: dict[str, Drawing]) -> None:
    """No id occurs twice, and every reference finds its target."""
    page = ElementTree.fromstring(f"<p>{''.join(one.svg for one in drawn.values())}</p>")
    ids = [element.attrib["id"] for element in page.iter() if "id" in element.attrib]
    assert len(ids) == len(set(ids))
    attributes = [value for element in page.iter() for value in element.attrib.values()]
    wanted = {value[1:] for value in attributes if re.fullmatch(r"#(?![0-9a-f]{6}$).+", value)}
    wanted |= {name for value in attributes for name in re.findall(r"url\(#([^)]+)\)", value)}
    assert wanted
    assert wanted <= set(ids)


def test_the_same_data_give_the_same_bytes(drawn: dict[str, Drawing]) -> None:
    assert drawings() == drawn


def test_drawing_leaves_no_trace_in_matplotlibs_own_state() -> None:
    before = dict(matplotlib.rcParams)
    drawings()
    assert dict(matplotlib.rcParams) == before


def test_pyplot_is_not_involved() -> None:
    code = (
        "import sys; from training.figures import Bar, score_chart; "
        "score_chart([Bar(label='a', score=.5, low=.4, high=.6)], chance=None); "
        "print('matplotlib.pyplot' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_scores_lie_between_the_ends_of_their_intervals(drawn: dict[str, Drawing]) -> None:
    low, high = points_of(drawn["scores"], "var(--accent)")
    control_low, control_high = points_of(drawn["scores"], "var(--faint)")
    # 0.2 wide against 0.1 wide, and 0.35 apart.
    assert high[0] - low[0] == pytest.approx(2 * (control_high[0] - control_low[0]), abs=0.01)
    assert low[0] - control_low[0] == pytest.approx(
        3.5 * (control_high[0] - control_low[0]), abs=0.02
    )
    assert control_low[1] < low[1]  # in the order given, from the top
    assert {"random", "probe", "0.20", "0.60"} <= set(texts(drawn["scores"]))
    assert "random 0.200 (control), probe 0.600." in drawn["scores"].alt


def test_curves_follow_the_recorded_values(drawn: dict[str, Drawing]) -> None:
    train = points_of(drawn["loss"], "var(--accent)")
    assert_proportional([y for _, y in train], [1.39, 1.19, 1.09, 0.59])
    epochs = [x for x, _ in train]
    assert epochs[2] - epochs[0] == pytest.approx(2 * (epochs[1] - epochs[0]), abs=0.01)
    val = points_of(drawn["loss"], VERMILLION)
    assert_proportional([train[0][1], *(y for _, y in val)], [1.39, 1.25, 0.75])
    assert "train from 1.390 to 0.590; val from 1.250 to 0.750" in drawn["loss"].alt
    accuracy = points_of(drawn["accuracy"], VERMILLION)
    assert_proportional([y for _, y in accuracy], [0.31, 0.71])
    assert "from 0.310 to 0.710" in drawn["accuracy"].alt
    rate = points_of(drawn["rate"], "var(--accent)")
    assert_proportional([y for _, y in rate][:2], [1e-3, 2e-3])
    assert "0.002 at its peak, 0 at the end" in drawn["rate"].alt


def test_resumes_are_marked_at_their_epochs(drawn: dict[str, Drawing]) -> None:
    for plain, marked in zip(
        (drawn["loss"], drawn["accuracy"], drawn["rate"]),
        figures.pretraining_charts(METRICS, resumed=[1.25, 1.5]),
        strict=True,
    ):
        assert marked.alt == plain.alt + " Resumed after an interruption at epoch 1.25, 1.5."
        assert marked.caption == plain.caption + " Triangles: resumed after an interruption."
    loss = figures.pretraining_charts(METRICS, resumed=[1.5])[0]
    (x, _), (same, _) = points_of(loss, "var(--ink)", dashed=True)
    train = points_of(loss, "var(--accent)")  # at epochs 0.5, 1, 1.5 and 2
    assert x == same == pytest.approx(train[2][0], abs=0.01)


def test_layers_are_drawn_for_the_backbone_and_dashed_for_a_random_one(
    drawn: dict[str, Drawing],
) -> None:
    layers = drawn["layers"]
    for colour, key in (("var(--accent)", "top1"), (VERMILLION, "cls_top1"), (GREEN, "knn_top1")):
        points = points_of(layers, colour) + points_of(layers, colour, dashed=True)
        values = [row[prefix + key] for prefix in ("", "random_") for row in LAYERS]
        order = sorted(range(6), key=values.__getitem__)
        assert_proportional([points[k][1] for k in order], [values[k] for k in order])
    assert {"embedding", "1", "2", "probe, class token", "random: probe, class token"} <= set(
        texts(layers)
    )
    assert "best at block 2, with 0.710" in layers.alt


def test_the_control_of_the_transfer_stages_is_dashed(drawn: dict[str, Drawing]) -> None:
    assert len(points_of(drawn["transfer"], "var(--accent)")) == 3
    assert len(points_of(drawn["transfer"], VERMILLION)) == 3
    assert len(points_of(drawn["transfer"], GREEN, dashed=True)) == 3
    without = figures.transfer_chart({"last block": TRANSFER["last block"]}, control="other")
    assert without is not None
    assert "stroke-dasharray" not in without.svg
    assert "from scratch from 0.300 to 0.900" in drawn["transfer"].alt


def test_a_fourth_stage_is_drawn_beside_the_others() -> None:
    rows = [{"epoch": epoch, "val/top1": 0.1 * epoch} for epoch in (1.0, 2.0, 3.0)]
    names = ("last block", "last two", "all", "from scratch")
    found = figures.transfer_chart(dict.fromkeys(names, rows), control="from scratch")
    assert found is not None
    assert all(f"{name} from" in found.alt for name in names)
    assert len(points_of(found, PURPLE, dashed=True)) == 3


def test_what_was_not_recorded_is_not_drawn() -> None:
    assert figures.pretraining_charts([]) == []
    assert figures.transfer_chart({}, control="x") is None
    assert figures.transfer_chart({"x": [{"epoch": 1.0, "val/loss": 1.0}]}, control="x") is None
    (only,) = figures.pretraining_charts(
        [{"step": 1, "epoch": 1.0, "val/loss": 1.0}, {"step": 2, "epoch": 2.0, "val/loss": 0.5}]
    )
    assert "over epochs: val from 1.000 to 0.500." in only.alt
    bare = [{key: row[key] for key in ("layer", "name", "top1")} for row in LAYERS]
    assert len(points_of(figures.layer_chart(bare, chance=None), "var(--accent)")) == 3
