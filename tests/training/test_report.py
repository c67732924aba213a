import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from training import report, store
from training.configure import build_settings
from training.figures import BLUE
from training.report_scores import TITLES
from training.resumes import note_start
from training.runner import run_stage
from training.stages import STAGES
from training.store import StageResult

CLASSES = ["cat", "dog & <b>wolf</b>", "owl"]

ENVIRONMENT = {
    "python": "3.11.7",
    "torch": "2.15.0",
    "cpu": "A processor",
    "finished_at": "2026-03-14T15:09:26+00:00",
}

LAYERS: list[dict[str, Any]] = [
    {
        "layer": k,
        "name": "embedding" if k == 0 else f"block {k}",
        "top1": 0.401 + 0.1 * k,
        "cls_top1": 0.333 + 0.111 * k,
        "knn_top1": 0.352 + 0.07 * k,
        "knn": {"1": 0.251 + 0.01 * k, "7": 0.352 + 0.07 * k},
        "effective_rank": 7.34 + 10.1 * k,
        "random_top1": 0.341 + 0.01 * k,
        "random_cls_top1": 0.332,
        "random_knn_top1": 0.337 + 0.002 * k,
        "random_knn": {"1": 0.231 + 0.003 * k, "7": 0.337 + 0.002 * k},
        "random_effective_rank": 3.21 + k,
    }
    for k in range(3)
]

READINGS = [
    {
        "name": name,
        "exported": exported,
        "width": width,
        "top1": correct / 678,
        "correct": correct,
        "val_top1": 0.612 + width / 10**5,
        "random_top1": control / 678,
    }
    for name, exported, width, correct, control in (
        ("class token", True, 128, 377, 250),
        ("class token, mean of patch tokens", False, 1256, 401, 333),
    )
]

CKA = [[1.0, 0.81, 0.432], [0.81, 1.0, 0.567], [0.432, 0.567, 1.0]]
RANDOM_CKA = [[1.0, 0.98, 0.962], [0.98, 1.0, 0.977], [0.962, 0.977, 1.0]]

POINTS = [
    {"labels": 12, "fraction": 0.001, "top1": 0.351, "random_top1": 0.343},
    {"labels": 1234, "fraction": 0.1, "top1": 0.556, "random_top1": 0.369},
    {"labels": 12340, "fraction": 1.0, "top1": 0.701, "random_top1": 0.402},
]

SCORES: dict[str, dict[str, Any]] = {
    "prepare_data": {
        "source": "folder:/photos & more",
        "counts": {"train": 12345, "test": 678},
        "classes": CLASSES,
        "side": 37,
        "skipped": 12,
        "skipped_examples": [["a<script>.png", "cannot identify image file"]],
        "fingerprint": "fade" * 16,
    },
    "pretrain": {"rotation_accuracy": 0.7441, "correct": 2018, "total": 2712, "steps": 20},
    "features": {"images": 13023, "layers": 3},
    "linear_probe": {
        "top1": 377 / 678,
        "correct": 377,
        "total": 678,
        "random_backbone_top1": 250 / 678,
        "random_backbone_correct": 250,
        "labels": 1234,
        "readings": READINGS,
    },
    "finetune_1": {"top1": 500 / 678, "correct": 500, "total": 678, "val_top1": 0.83},
    "finetune_2": {"top1": 555 / 678, "correct": 555, "total": 678, "val_top1": 0.79},
    "from_scratch": {"top1": 444 / 678, "correct": 444, "total": 678},
    "feature_analysis": {"layers": LAYERS, "cka": CKA, "random_cka": RANDOM_CKA},
    "label_efficiency": {"points": POINTS, "total": 678},
}

METRICS = {
    "pretrain": [
        {"step": 10, "epoch": 1.0, "train/loss": 1.3, "train/lr": 1e-3},
        {"step": 10, "epoch": 1.0, "val/loss": 1.2, "val/rotation_accuracy": 0.4},
        {"step": 20, "epoch": 2.0, "train/loss": 0.9, "train/lr": 0.0},
        {"step": 20, "epoch": 2.0, "val/loss": 0.8, "val/rotation_accuracy": 0.7},
    ],
    **{
        name: [{"step": 7 * k, "epoch": float(k), "val/top1": 0.2 * k} for k in (1, 2)]
        for name in ("finetune_1", "finetune_2", "from_scratch")
    },
}


SETTINGS = build_settings(overrides=["model.depth=2", "pretrain.epochs=2", "linear_probe.lrs=[7]"])


def write_results(root: Path) -> dict[str, StageResult]:
    """Put results of every stage on the disk."""
    found = {}
    for number, (stage, scores) in enumerate(SCORES.items()):
        directory = root / stage / "0123456789abcdef"
        directory.mkdir(parents=True)
        found[stage] = StageResult(
            stage=stage,
            key=f"{number:016d}",
            directory=directory,
            status="computed",
            wall_seconds=61.5 + number,
            digest="d" * 64,
            scores=dict(scores),
            timing={"samples_per_second": 4321.0} if stage == "pretrain" else {},
            environment=dict(ENVIRONMENT),
        )
        (directory / "result.json").write_text(found[stage].model_dump_json())
        lines = [json.dumps(row) + "\n" for row in METRICS.get(stage, ())]
        (directory / "metrics.jsonl").write_text("".join(lines))
    return found


@pytest.fixture
def results(tmp_path: Path) -> dict[str, StageResult]:
    return write_results(tmp_path)


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of a whole run."""
    return report.render(write_results(tmp_path_factory.mktemp("run")), SETTINGS)


class Page(HTMLParser):
    """What a browser would make of the page: its text, its tags, what they refer to."""

    VOID = frozenset({"meta", "link", "br", "hr", "img", "input"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text = ""
        self.cells: list[str] = []
        self.headings: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in {"td", "th"}:
            self.cells.append("")
        if tag == "h2":
            self.headings.append("")
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            return
        self.text += data
        if {"td", "th"} & set(self._open):
            self.cells[-1] += data
        if "h2" in self._open:
            self.headings[-1] += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def wilson(correct: int, total: int) -> tuple[float, float]:
    """The shares that a normal test at 5 % does not reject, found by bisection."""

    def rejects(share: float) -> bool:
        spread = math.sqrt(share * (1 - share) / total)
        return abs(correct / total - share) > 1.959963984540054 * spread

    ends = []
    for outside in (1e-12, 1 - 1e-12):
        inside = correct / total
        for _ in range(60):
            middle = (outside + inside) / 2
            outside, inside = (middle, inside) if rejects(middle) else (outside, middle)
        ends.append(inside)
    return ends[0], ends[1]


def test_every_score_is_in_the_table_with_its_interval(html: str) -> None:
    page = Page(html)
    for correct, total in (
        (2018, 2712),
        (250, 678),
        (377, 678),
        (500, 678),
        (555, 678),
        (444, 678),
    ):
        assert f"{correct / total:.3f}" in page.cells
        low, high = wilson(correct, total)
        assert f"{low:.3f} – {high:.3f}{correct:,} of {total:,}" in page.cells
    assert "Guessing a rotation: 0.250." in page.text
    assert "Guessing a class: 0.333." in page.text


def test_controls_are_named_as_such(html: str) -> None:
    cells = Page(html).cells
    (random,) = [cell for cell in cells if cell.startswith("Random backbone")]
    (scratch,) = [cell for cell in cells if cell.startswith("From scratch") and "same" in cell]
    (probe,) = [cell for cell in cells if cell.startswith("Linear probe") and "head" in cell]
    assert random.endswith("(control)")
    assert scratch.endswith("(control)")
    assert "control" not in probe


def test_a_score_without_counts_has_no_interval(results: dict[str, StageResult]) -> None:
    del results["pretrain"].scores["correct"], results["pretrain"].scores["total"]
    html = report.render(results, SETTINGS)
    assert "0.744" in Page(html).cells
    assert "as if the four answers were independent" not in html


def test_the_summary_says_what_the_tables_say(html: str) -> None:
    text = Page(html).text
    assert "right for 74% of the turned test images" in text
    assert "With 1,234 labels, a linear head on its frozen features names 56%" in text
    assert "on those of the untrained network, 37%" in text
    assert "Fine-tuned it reaches 74%" in text  # the one that is better on val
    assert "from scratch on the same labels reaches 65%" in text


def test_every_layer_is_in_its_table(html: str) -> None:
    cells = Page(html).cells
    heads = ["tokens", "class", "1-NN", "7-NN", "rank"]
    start = cells.index("tokens")
    assert cells[start - 3 : start + 10] == ["Layer", "Pretrained", "Random", *heads, *heads]
    for row in LAYERS:
        start = cells.index(str(row["name"]))
        expected = []
        for prefix in ("", "random_"):
            shares = [row[f"{prefix}top1"], row[f"{prefix}cls_top1"], *row[f"{prefix}knn"].values()]
            expected += [f"{share:.3f}" for share in shares]
            expected.append(f"{row[f'{prefix}effective_rank']:.1f}")
        assert cells[start + 1 : start + 11] == expected


def test_every_way_to_read_the_backbone_is_shown_and_the_exported_one_marked(html: str) -> None:
    cells = Page(html).cells
    start = cells.index("A linear head reads")
    assert cells[start + 5 : start + 15] == [
        *("class tokenthe linear probe above; exported", "128", "0.556", "0.369", "0.613"),
        *("class token, mean of patch tokens", "1,256", "0.591", "0.491", "0.625"),
    ]


def test_how_alike_two_layers_are_is_a_number_and_a_shade(html: str) -> None:
    for title, matrix in (("Pretrained", CKA), ("Random", RANDOM_CKA)):
        table = html[html.index(f"<caption><b>{title}</b></caption>") :]
        page = Page(f"<table>{table[: table.index('</table>')]}</table>")
        assert page.cells[:4] == ["", "0", "1", "2"]
        names = page.cells[4::4]
        assert names == ["embedding", "block 1", "block 2"]
        shades = [attributes["style"] for attributes in page.named("td") if "style" in attributes]
        for row, values in enumerate(matrix):
            written = page.cells[5 + 4 * row : 8 + 4 * row]
            assert written == [f"{value:.2f}" for value in values]
            assert shades[3 * row : 3 * row + 3] == [
                f"--share: {value:.3f}; --hue: var(--accent)" for value in values
            ]


def test_the_curves_over_the_labels_are_in_a_table(html: str) -> None:
    cells = Page(html).cells
    for row in POINTS:
        start = cells.index(f"{row['labels']:,}")
        assert cells[start + 1 : start + 3] == [f"{row[k]:.3f}" for k in ("top1", "random_top1")]
    assert "linear probe, random backbone (control)" in cells


def test_data_settings_times_and_environment_are_recorded(html: str) -> None:
    page = Page(html)
    for cell in (
        "folder:/photos & more",
        "12,345 train, 678 test; 37 × 37 px",
        "3: cat, dog & <b>wolf</b>, owl",
        "fade" * 16,
        "drawn",  # the preset
        "7.0",  # linear_probe.lrs
        "1 min 2 s",  # 62.5 s, of pretraining
        "4,321",
        "2026-03-14 15:09 UTC",
        "A processor",
    ):
        assert cell in page.cells, cell
    skipped = next(cell for cell in page.cells if cell.startswith("12\n"))
    assert "a<script>.png cannot identify image file" in skipped
    assert "and 11 more" in skipped


def test_an_address_is_shown_without_its_password(results: dict[str, StageResult]) -> None:
    address = "data.source=parquet:https://me:secret@host/a.parquet?token=1"
    page = report.render(results, build_settings(overrides=[address]))
    assert "parquet:https://host/a.parquet" in page
    assert "secret" not in page
    assert "token=1" not in page


def test_settings_that_cannot_change_a_result_are_left_out(html: str) -> None:
    cells = Page(html).cells
    assert "precision" in cells
    assert not {"every_seconds", "wandb", "device", "threads", "max_skipped"} & set(cells)


def test_facts_that_differ_between_stages_are_told_apart(results: dict[str, StageResult]) -> None:
    results["pretrain"].environment["cpu"] = "Another one"
    cells = Page(report.render(results, SETTINGS)).cells
    (cell,) = [cell for cell in cells if "Another one (Pretrain)" in cell]
    assert "A processor (Prepare data, Features, Linear probe, " in cell
    assert "2.15.0" in cells


def test_the_page_loads_nothing(html: str) -> None:
    page = Page(html)
    for tag, attributes in page.tags:
        assert tag not in {"script", "iframe", "object", "embed", "base", "form"}
        for name, value in attributes.items():
            if tag != "a" and name in {"src", "href", "srcset", "data", "action", "xlink:href"}:
                assert value is not None
                assert value.startswith(("#", "data:")), (tag, name, value)
    (style,) = re.findall(r"<style>(.*?)</style>", html, flags=re.DOTALL)
    assert "@import" not in style
    assert "url(" not in style
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))
    assert set(re.findall(r'[^ ]*http[^ >"]*', html)) == {
        "http-equiv=",
        *(f'href="{attributes["href"]}' for attributes in page.named("a")),
    }
    (policy,) = [row["content"] for row in page.named("meta") if "http-equiv" in row]
    assert (policy or "").startswith("default-src 'none'; img-src data:;")


def test_every_figure_has_a_text_alternative_and_a_caption(html: str) -> None:
    page = Page(html)
    svgs = page.named("svg")
    assert len(svgs) == 7  # scores, loss, accuracy, learning rate, layers, labels, transfer
    assert len(page.named("figcaption")) == 7
    for attributes in svgs:
        assert attributes["role"] == "img"
        assert len(attributes["aria-label"] or "") > 30
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_tables_say_what_their_rows_and_columns_are(html: str) -> None:
    for attributes in Page(html).named("th"):
        assert attributes["scope"] in {"row", "col", "colgroup"}


def test_the_page_is_made_for_dark_screens_phones_and_paper(html: str) -> None:
    assert "@media (prefers-color-scheme: dark)" in html
    assert "@media print" in html
    page = Page(html)
    names = {attributes.get("name"): attributes.get("content") for attributes in page.named("meta")}
    assert names["viewport"] == "width=device-width, initial-scale=1"
    assert names["color-scheme"] == "light dark"
    # The colours that figures leave to the page, in every scheme.
    light, dark, paper = re.findall(r":root \{(.*?)\}", html, flags=re.DOTALL)
    left = set(
        re.findall(r"var\((--\w+)\)", "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL)))
    )
    assert left == {"--ink", "--faint", "--rule", "--paper", "--accent"}
    for scheme in (light, dark, paper):
        assert left <= set(re.findall(r"--\w+(?=:)", scheme))
    assert f"--accent: {BLUE};" in light
    assert f"--accent: {BLUE};" in paper


@pytest.mark.parametrize("missing", SCORES)
def test_a_stage_that_is_missing_is_left_out(missing: str, results: dict[str, StageResult]) -> None:
    del results[missing]
    page = Page(report.render(results, SETTINGS))
    title = TITLES[missing]
    assert title not in page.cells
    assert ("Pretraining" in page.headings) == (missing != "pretrain")
    assert ("What each layer knows" in page.headings) == (missing != "feature_analysis")
    assert ("Data" in page.headings) == (missing != "prepare_data")
    assert "Settings" in page.headings


@pytest.mark.parametrize("only", SCORES)
def test_one_stage_alone_makes_a_page(only: str, results: dict[str, StageResult]) -> None:
    page = Page(report.render({only: results[only]}, SETTINGS))
    assert TITLES[only] in page.cells


def test_resumes_are_marked_and_counted(results: dict[str, StageResult]) -> None:
    without = Page(report.render(results, SETTINGS))
    assert "resumed" not in without.text
    note_start(results["pretrain"].directory, step=1234, epoch=1.5)
    note_start(results["pretrain"].directory, step=2345, epoch=1.75)
    page = Page(report.render(results, SETTINGS))
    assert "Interrupted and resumed 2 times: at step 1,234, step 2,345." in page.text
    labels = [row["aria-label"] or "" for row in page.named("svg")]
    assert sum("Resumed after an interruption at epoch 1.5, 1.75." in text for text in labels) == 3


def test_a_run_that_is_going_says_where_it_stands(results: dict[str, StageResult]) -> None:
    going = results.pop("finetune_1").directory
    del results["from_scratch"]
    page = Page(report.render(results, SETTINGS, begun={"finetune_1": going}, finished=False))
    assert "This run is not finished" in page.text
    assert "Fine-tune, last block: at epoch 2.00; From scratch: not finished." in page.text
    (curves,) = [
        row["aria-label"] or ""
        for row in page.named("svg")
        if "top-1 on val" in (row["aria-label"] or "").lower()
    ]
    assert "Fine-tune, last block from 0.200 to 0.400" in curves
    assert "not finished" not in Page(report.render(results, SETTINGS)).text


def test_a_page_without_any_stage_says_so() -> None:
    page = Page(report.render({}, SETTINGS))
    assert "No stage with a score has run yet." in page.text
    assert page.headings == ["Settings"]


def test_missing_or_torn_metrics_cost_a_figure_and_not_the_page(
    results: dict[str, StageResult],
) -> None:
    (results["finetune_1"].directory / "metrics.jsonl").unlink()
    path = results["pretrain"].directory / "metrics.jsonl"
    whole = Page(report.render(results, SETTINGS)).named("svg")
    path.write_text(path.read_text() + '{"step": 30, "epo')
    assert Page(report.render(results, SETTINGS)).named("svg") == whole


@pytest.mark.slow
def test_two_sources_of_images_have_a_table_each_and_one_has_one(
    results: dict[str, StageResult],
) -> None:
    transfer = results["prepare_data"].model_copy(deep=True)
    transfer.stage = "prepare_transfer_data"
    transfer.scores |= {"source": "parquet:labelled", "classes": list("abcdefgh")}
    results["prepare_transfer_data"] = transfer
    same = Page(report.render(results, SETTINGS))
    assert "parquet:labelled" not in same.cells  # same key: the same images
    transfer.key = "f" * 16
    page = Page(report.render(results, SETTINGS))
    assert {"parquet:labelled", "folder:/photos & more"} <= set(page.cells)
    assert "Guessing a class: 0.125." in page.text


def test_the_same_results_give_the_same_bytes(results: dict[str, StageResult]) -> None:
    assert report.render(results, SETTINGS) == report.render(results, SETTINGS)


def test_the_stage_writes_the_page_and_records_its_hash(
    results: dict[str, StageResult], tmp_path: Path
) -> None:
    request = store.make_request(STAGES["report"], SETTINGS, tmp_path, results)
    result = run_stage(request, report.compute)
    page = request.directory / "index.html"
    assert page.read_text(encoding="utf-8") == report.render(results, SETTINGS)
    assert list(result.files) == ["index.html"]
    assert store.inspect(request).state == "cached"


def test_results_are_read_where_the_outputs_lie_now(
    results: dict[str, StageResult], tmp_path: Path
) -> None:
    for name, result in results.items():
        moved = tmp_path / "moved" / name
        moved.parent.mkdir(exist_ok=True)
        result.directory.rename(moved)
        results[name] = result.model_copy(update={"directory": moved})
    request = store.make_request(STAGES["report"], SETTINGS, tmp_path, results)
    run_stage(request, report.compute)
    assert len(Page((request.directory / "index.html").read_text()).named("svg")) == 7


def test_every_stage_with_results_has_a_title() -> None:
    assert [*TITLES, "report"] == list(STAGES)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.04, "0.0 s"), (59.94, "59.9 s"), (59.96, "1 min 0 s"), (3599.4, "59 min 59 s"),
     (3600, "1 h 0 min"), (90061, "25 h 1 min")],
)  # fmt: skip
def test_times_are_written_as_people_say_them(
    seconds: float, words: str, results: dict[str, StageResult]
) -> None:
    data = results["prepare_data"].model_copy(update={"wall_seconds": seconds})
    assert words in Page(report.render({"prepare_data": data}, SETTINGS)).cells
