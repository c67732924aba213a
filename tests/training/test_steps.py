"""A tiny run with two seeds and trained curves, from its stages to its report."""

import json
import shutil
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flows import cli
from tests.training.test_report import Page
from training import report, store
from training.configure import override, to_yaml, validate
from training.run_record import RunRecord, record_if_all_cached
from training.runner import run_stage
from training.settings import Settings, merge
from training.stage_files import CHECKPOINTS
from training.steps import Found, Step, steps
from training.stopping import Stopped, StopRequest
from training.store import StageResult

EVALUATION = {
    "seeds": 2,
    "label_fractions": [0.1, 1.0],
    "trained_curves": True,
    "least_steps": 4,
}
"""54 images to train on, of which the run itself uses 30: curves at 5 and at 54."""

VARIANTS = ["seed 1", "5 labels", "54 labels", "5 labels, seed 1", "54 labels, seed 1"]


def compute(step: Step, stop: StopRequest | None = None) -> StageResult:
    assert step.request, step.lacking
    module = import_module(f"training.{step.stage.module or step.stage.name}")
    return run_stage(step.request, module.compute, stop)


@pytest.fixture(scope="module")
def settings(tiny_run: dict[str, Any]) -> Settings:
    return validate(merge(deepcopy(tiny_run), {"evaluation": EVALUATION}))


@pytest.fixture(scope="module")
def record(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    """The record of the run, which is over."""
    outputs = tmp_path_factory.mktemp("outputs")
    record = RunRecord(settings, outputs, command=["rotvit", "run"])
    for step in steps(settings, outputs, record.found, run=record.name):
        assert step.request
        record.begin(step.request)
        record.add(compute(step), step.variant)
    record.write(state="finished")
    return record


@pytest.fixture(scope="module")
def outputs(record: RunRecord) -> Path:
    return record.directory.parents[1]


@pytest.fixture(scope="module")
def results(record: RunRecord) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((record.directory / "results.json").read_bytes())
    return found


def test_results_hold_the_variants_beside_the_runs_own_stages(results: dict[str, Any]) -> None:
    assert results["schema_version"] == 1
    assert not [name for name in results["stages"] if "," in name or "/" in name]
    assert results["stages"]["finetune_2"]["labels"] == 30
    assert list(results["variants"]) == VARIANTS
    fewest = results["variants"]["5 labels, seed 1"]
    assert fewest["overrides"][:3] == ["seed=1", "transfer.labels=5", "finetune.batch_size=5"]
    assert "finetune.epochs=4" in fewest["overrides"]
    assert list(fewest["stages"]) == ["linear_probe", "finetune_2", "from_scratch"]
    assert fewest["stages"]["finetune_2"]["labels"] == 5
    assert fewest["stages"]["finetune_2"]["steps"] == 4
    rows = [row for one in results["variants"].values() for row in one["stages"].values()]
    assert {row["status"] for row in rows} == {"computed"}
    assert all(Path(row["directory"]).is_dir() for row in rows)


def test_the_seeds_share_the_backbone_and_differ_in_what_follows(record: RunRecord) -> None:
    own, other = record.found.stages, record.found.variants["seed 1"]
    assert "pretrain" not in other
    assert own["linear_probe"].inputs["start"] == other["linear_probe"].inputs["start"]
    for stage in ("finetune_1", "finetune_2", "from_scratch"):
        assert own[stage].files["model/model.safetensors"].sha256 != (
            other[stage].files["model/model.safetensors"].sha256
        )


def test_results_hold_mean_and_standard_deviation_over_the_seeds(results: dict[str, Any]) -> None:
    assert results["over_seeds"]["pretraining"] == "shared"
    found = results["over_seeds"]["stages"]
    assert set(found) == {"linear_probe", "finetune_1", "finetune_2", "from_scratch"}
    for stage, scores in found.items():
        for name, spread in scores.items():
            values = [
                results["stages"][stage][name],
                results["variants"]["seed 1"]["stages"][stage][name],
            ]
            assert spread["n"] == 2
            assert spread["mean"] == pytest.approx(np.mean(values), rel=1e-12)
            assert spread["std"] == pytest.approx(np.std(values, ddof=1), abs=1e-12)


def test_the_report_shows_spreads_and_curves(record: RunRecord, results: dict[str, Any]) -> None:
    page = Page((record.directory / "report" / "index.html").read_text())
    spread = results["over_seeds"]["stages"]["finetune_2"]["top1"]
    (row,) = [at for at, cell in enumerate(page.cells) if "last two blocks trained" in cell]
    assert page.cells[row + 1] == f"{spread['mean']:.3f}"
    assert page.cells[row + 2] == f"± {spread['std']:.3f}2 seeds, one pretraining"
    assert "They start from one pretraining" in page.text
    assert {"fine-tuning, last two blocks", "from scratch (control)"} <= set(page.cells)
    (at,) = [at for at, cell in enumerate(page.cells) if cell == "54"]
    trained = [
        one["stages"]["finetune_2"]["top1"]
        for name, one in results["variants"].items()
        if name.startswith("54 labels")
    ]
    expected = f"{np.mean(trained):.3f} ± {np.std(trained, ddof=1):.3f}"
    assert page.cells[at + 3] == expected
    assert "Fine-tune, last two blocks, 5 labels, seed 1" in page.cells, "in the table of times"
    (curves,) = [
        text
        for figure in page.named("svg")
        if "over the number of labels" in (text := figure.get("aria-label") or "")
    ]
    assert "from scratch from " in curves


def test_the_same_again_has_nothing_to_compute(
    record: RunRecord, outputs: Path, settings: Settings, results: dict[str, Any]
) -> None:
    again = record_if_all_cached(settings, outputs)
    assert again is not None
    rows = [again, *again["variants"].values()]
    assert {row["status"] for one in rows for row in one["stages"].values()} == {"cached"}
    assert again["over_seeds"] == results["over_seeds"]
    assert list(again["variants"]) == VARIANTS
    shorter = record_if_all_cached(settings, outputs, "pretrain")
    assert shorter is not None
    assert "variants" not in shorter
    kept = json.loads((record.directory / "results.json").read_bytes())
    assert (list(kept["variants"]), kept["over_seeds"]) == (VARIANTS, results["over_seeds"])


def test_seeds_that_pretrain_for_themselves_take_nothing_of_the_shared_backbone(
    settings: Settings, record: RunRecord, outputs: Path
) -> None:
    """Before they have pretrained; afterwards they find their own."""
    own = override(settings, ["evaluation.pretraining=own"])
    found, lacking = Found(), {}
    for step in steps(own, outputs, found):
        verdict = step.request and store.inspect(step.request)
        name = step.variant.name if step.variant else ""
        if verdict and verdict.result:
            found.add(verdict.result, name)
        lacking[name, step.stage.name] = step.lacking
    assert lacking["", "linear_probe"] == ""
    assert lacking["seed 1", "pretrain"] == lacking["seed 1", "from_scratch"] == ""
    assert lacking["seed 1", "features"] == "pretrain"
    assert lacking["seed 1", "linear_probe"] == "pretrain"
    assert lacking["5 labels, seed 1", "finetune_2"]
    assert set(found.variants["seed 1"]) == {"from_scratch"}


def test_a_single_run_of_another_seed_finds_what_does_not_need_the_pretraining(
    record: RunRecord, outputs: Path, settings: Settings
) -> None:
    alone = override(settings, ["seed=1", "evaluation.seeds=1"])
    for step in steps(alone, outputs, found := Found(), "from_scratch"):
        assert step.request
        verdict = store.inspect(step.request)
        assert verdict.result
        found.add(verdict.result, step.request.variant)
    assert found.stages["from_scratch"] == record.found.variants["seed 1"][
        "from_scratch"
    ].model_copy(update={"status": "cached"})


@pytest.mark.slow
@pytest.mark.parametrize("title", ["finetune_2, seed 1", "from_scratch, 54 labels"])
def test_an_interrupted_variant_is_partial_and_resumes_to_the_same_bytes(
    record: RunRecord,
    outputs: Path,
    settings: Settings,
    title: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    stop_after: type[Any],
) -> None:
    stage, _, variant = title.partition(", ")
    whole = record.found.variants[variant][stage]
    cut = tmp_path / "outputs"
    shutil.copytree(outputs, cut)
    shutil.rmtree(cut / whole.directory.relative_to(outputs))
    (tmp_path / "run.yaml").write_text(to_yaml(settings))
    arguments = ["status", "--config", str(tmp_path / "run.yaml"), "--outputs", str(cut)]

    def status() -> dict[str, list[str]]:
        assert cli.main(arguments) == 0
        lines = capsys.readouterr().out.splitlines()
        return {
            (cells := [cell.strip() for cell in line.split("   ") if cell.strip()])[0]: cells[1:]
            for line in lines
            if line.strip()
        }

    def step_of(found: Found) -> Step:
        for step in steps(settings, cut, found):
            if step.title == title:
                return step
            assert step.request
            result = store.inspect(step.request).result
            assert result, step.title
            found.add(result, step.request.variant)
        raise AssertionError("no such step")

    name = title.replace("_", "-")
    assert status()[name][0] == "missing"
    assert status()["report"] == ["missing", f"needs {name}"]
    with pytest.raises((Stopped, InterruptedError)):
        compute(step_of(Found()), stop_after(6))
    assert (cut / whole.directory.relative_to(outputs) / CHECKPOINTS).is_dir()
    assert status()[name][0].startswith("partial at step ")

    page = report.write_so_far(settings, cut).read_text()
    told = {"finetune_2": "Fine-tune, last two blocks", "from_scratch": "From scratch"}[stage]
    assert f"{told}, {variant}: at epoch" in page

    resumed = compute(step_of(Found()))
    assert resumed.status == "resumed"
    assert resumed.digest == whole.digest
    assert status()[name][0] == "cached"
    assert status()["report"][0] == "cached", "the same bytes, so the report stands"
