import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import ViTForImageClassification

from models.export import load_model
from tests.training.test_report import Page
from training import report, report_pictures
from training.commit import describe_commit
from training.configure import validate
from training.hardware import Hardware, decide
from training.images import open_splits
from training.report_pictures import Pictures
from training.run_record import run_directory
from training.settings import Settings, merge
from training.steps import Found
from training.store import StageResult

RunStages = Callable[..., dict[str, StageResult]]


@pytest.fixture(scope="module")
def settings(tiny_run: dict[str, Any]) -> Settings:
    return validate(tiny_run)


@pytest.fixture(scope="module")
def results(
    settings: Settings, run_stages: RunStages, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, StageResult]:
    """A whole tiny run."""
    made = run_stages(settings, tmp_path_factory.mktemp("outputs"), "report")
    return {name: result for name, result in made.items() if name != "report"}


@pytest.fixture(scope="module")
def outputs(results: dict[str, StageResult]) -> Path:
    return results["pretrain"].directory.parents[1]


@pytest.fixture(scope="module")
def stored_page(outputs: Path) -> Path:
    """The page that the report stage wrote."""
    (page,) = (outputs / "report").glob("*/index.html")
    return page


@pytest.fixture(scope="module")
def hardware(settings: Settings) -> Hardware:
    return decide(settings.hardware)


@pytest.fixture(scope="module")
def pictures(results: dict[str, StageResult], settings: Settings, hardware: Hardware) -> Pictures:
    return report_pictures.draw(results, settings, hardware)


def test_the_matrices_count_what_the_stages_counted(
    pictures: Pictures, results: dict[str, StageResult]
) -> None:
    assert pictures.turns is not None
    stages = ("pretrain", "linear_probe", "finetune_1", "finetune_2", "from_scratch")
    matrices = [pictures.turns.confusion, *pictures.confusions]
    for stage, matrix in zip(stages, matrices, strict=True):
        scores = results[stage].scores
        assert (matrix.right, matrix.total) == (scores["correct"], scores["total"]), stage
    assert [sum(row) for row in pictures.turns.confusion.counts] == [21] * 4
    for matrix in pictures.confusions:
        assert matrix.names == ["car", "house", "tree"]
        assert [sum(row) for row in matrix.counts] == [7, 7, 7]


@pytest.mark.parametrize(
    ("precision", "form"), [("bfloat16", "eager"), ("float32", "sdpa")], ids=["bfloat16", "float32"]
)
def test_models_answer_in_the_precision_and_form_of_attention_that_their_stage_had(
    results: dict[str, StageResult],
    settings: Settings,
    hardware: Hardware,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    form: str,
) -> None:
    def decided_so(result: StageResult) -> StageResult:
        directory = tmp_path / result.stage
        shutil.copytree(result.directory, directory)
        for path in directory.glob("hardware.json"):
            path.write_text(json.dumps(json.loads(path.read_bytes()) | {"precision": precision}))
        return result.model_copy(update={"directory": directory})

    trained = {"pretrain", "finetune_1", "finetune_2", "from_scratch"}
    decided = {stage: decided_so(results[stage]) for stage in trained}
    asked = []

    def watch(model: ViTForImageClassification, pixels: torch.Tensor) -> object:
        asked.append((str(model.config._attn_implementation), torch.is_autocast_enabled("cpu")))
        return forward(model, pixels)

    forward = ViTForImageClassification.forward
    monkeypatch.setattr(ViTForImageClassification, "forward", watch)
    report_pictures.draw(results | decided, settings, hardware)
    assert set(asked) == {(form, precision == "bfloat16")}


def test_the_probe_answers_from_the_features_as_it_was_scored(
    results: dict[str, StageResult], settings: Settings, hardware: Hardware, tmp_path: Path
) -> None:
    gone = results["features"].model_copy(update={"directory": tmp_path})
    found = report_pictures.draw(results | {"features": gone}, settings, hardware)
    whole = report_pictures.draw(results, settings, hardware)
    assert [matrix.title for matrix in found.confusions] == [
        matrix.title for matrix in whole.confusions[1:]
    ]


@torch.no_grad()
def test_the_surest_mistakes_come_first_and_each_image_once(
    pictures: Pictures, results: dict[str, StageResult], settings: Settings
) -> None:
    """Turned and asked one by one, by hand."""
    model = load_model(results["pretrain"].directory / "model")
    test = open_splits(results["prepare_data"].directory, settings).test
    surest: dict[int, tuple[float, int, int]] = {}
    for number, image in enumerate(test.gather(np.arange(len(test)))):
        image = image[2:-2, 2:-2]  # the margin of crops: 20 px prepared, 16 px read
        for turn in range(4):
            pixels = np.rot90(image, turn).astype(np.float32) / 127.5 - 1
            shares = model(torch.from_numpy(pixels.transpose(2, 0, 1)[None].copy())).logits
            share, said = shares.softmax(dim=1)[0].max(dim=0)
            if int(said) != turn:
                surest[number] = max(surest.get(number, (0.0, 0, 0)), (float(share), turn, said))
    assert len(surest) >= 12, "a better network than this test needs"
    expected = sorted(surest.items(), key=lambda item: -item[1][0])[:12]
    assert pictures.turns is not None
    for picture, (number, (share, turn, said)) in zip(
        pictures.turns.mistakes, expected, strict=True
    ):
        assert f"Test image {number}, " in picture.alt
        assert picture.title == f"says {90 * int(said)}° ({share:.0%})"
        assert picture.note == f"is {90 * turn}°"
    for picture in pictures.turns.right:
        assert "rightly says" in picture.alt


def test_the_same_models_give_the_same_pictures(
    pictures: Pictures, results: dict[str, StageResult], settings: Settings, hardware: Hardware
) -> None:
    assert report_pictures.draw(results, settings, hardware) == pictures


def test_the_page_of_a_run_has_all_of_them(stored_page: Path) -> None:
    html = stored_page.read_text(encoding="utf-8")
    page = Page(html)
    assert {
        *("Scores on test", "Pretraining", "Which way up?", "What each layer knows"),
        *("With few labels, and with many", "Where it looks", "Features, by class"),
        "Other ways to read the frozen backbone",
        *("Training on labels", "Data"),
        *("Settings", "Times", "Environment"),
    } == set(page.headings)
    images = page.named("img")
    assert len(images) == 12 + 6 + 3 * 3
    assert all(len(image["alt"] or "") > 10 for image in images)
    assert all((image["src"] or "").startswith("data:image/webp;base64,") for image in images)
    assert len(html) < 1_000_000
    if (commit := describe_commit()) is not None:
        assert any(commit.removesuffix("-dirty") in cell for cell in page.cells)


def test_of_many_test_images_some_of_every_part_are_looked_at(
    results: dict[str, StageResult],
    settings: Settings,
    hardware: Hardware,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(report_pictures, "MOST_IMAGES", 9)
    found = report_pictures.draw(results, settings, hardware)
    assert (found.labelled, found.labelled_of) == (9, 21)
    assert found.turns is not None
    assert (found.turns.images, found.turns.of) == (9, 21)
    assert found.confusions[0].total == 9
    assert all(sum(row) for row in found.confusions[0].counts), "sorted by class, 7 each"
    page = report.render(results, settings, pictures=found)
    assert page.count("Of 9 of the 21 test images, drawn by lot.") == 3


def test_without_labels_there_are_turns_and_looks(
    tiny_folder: Path, tiny_values: dict[str, Any], run_stages: RunStages, tmp_path: Path
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, path in enumerate(sorted(tiny_folder.rglob("*.png"))):
        shutil.copy(path, photos / f"{number}.png")
    values = merge(tiny_values, {"data": {"source": f"folder:{photos}"}, "pretrain": {"epochs": 2}})
    settings = validate(values)
    made = run_stages(settings, tmp_path / "outputs", "pretrain")
    page = Page(report.whole_page(Found(made), settings))
    assert {"Which way up?", "Where it looks"} <= set(page.headings)
    assert "Features, by class" not in page.headings


def test_models_that_are_gone_cost_their_pictures_and_not_the_page(
    results: dict[str, StageResult], settings: Settings, tmp_path: Path
) -> None:
    nowhere = {"directory": tmp_path}
    without = {**results, "finetune_1": results["finetune_1"].model_copy(update=nowhere)}
    page = Page(report.whole_page(Found(without), settings))
    assert len(page.named("img")) == 27
    assert re.findall(r"([^\n]+): \d+ of 21 right", page.text) == [
        *("Linear probe", "Fine-tune, last two blocks", "From scratch")
    ]
    without["pretrain"] = results["pretrain"].model_copy(update=nowhere)
    assert Page(report.whole_page(Found(without), settings)).named("img") == []


def test_a_run_that_is_going_is_reported_so_far(
    settings: Settings, outputs: Path, stored_page: Path, tmp_path: Path
) -> None:
    """A whole run, then one whose last fine-tuning was interrupted after its first epoch."""
    copied = tmp_path / "outputs"
    shutil.copytree(outputs, copied)
    page = report.write_so_far(settings, copied)
    assert page == run_directory(settings, copied) / "report" / "index.html"
    assert page.read_bytes() == stored_page.read_bytes()

    (interrupted,) = (copied / "finetune_2").iterdir()
    (interrupted / "result.json").unlink()
    lines = (interrupted / "metrics.jsonl").read_text().splitlines(keepends=True)
    first = next(at for at, line in enumerate(lines) if '"epoch": 1.0' in line and "val" in line)
    (interrupted / "metrics.jsonl").write_text("".join(lines[: first + 1]))
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("*") if path.is_file()}
    found = Page(report.write_so_far(settings, copied).read_text(encoding="utf-8"))
    assert "Fine-tune, last two blocks: at epoch 1.00." in found.text
    assert {"Which way up?", "What each layer knows"} <= set(found.headings)
    curves = [row.get("aria-label") or "" for row in found.named("svg")]
    assert any("Fine-tune, last two blocks from" in text for text in curves)
    after = {path: path.stat().st_mtime_ns for path in copied.rglob("*") if path.is_file()}
    assert {path for path in after if after[path] != before.get(path)} == {page}


def test_a_run_that_has_not_begun_has_a_page_too(settings: Settings, tmp_path: Path) -> None:
    page = Page(report.write_so_far(settings, tmp_path).read_text(encoding="utf-8"))
    assert "Prepare data: not finished; Pretrain: not finished; " in page.text
    assert page.named("svg") == []
