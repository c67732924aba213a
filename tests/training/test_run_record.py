import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from training.configure import build_settings, to_yaml, validate
from training.run_record import RunRecord, note_end, run_name
from training.settings import Settings, merge
from training.store import StageResult


def result(stage: str, directory: Path, **changes: Any) -> StageResult:
    values: dict[str, Any] = {
        "stage": stage,
        "key": "0123456789abcdef",
        "directory": directory,
        "status": "computed",
        "wall_seconds": 1.23456,
        "digest": "f00",
        "scores": {"top1": 0.75},
        "timing": {"samples_per_second": 9.0},
    }
    return StageResult.model_validate(values | changes)


def test_results_have_the_published_form(tmp_path: Path, tiny_settings: Settings) -> None:
    record = RunRecord(tiny_settings, tmp_path)
    record.add(result("prepare_data", tmp_path, scores={}, timing={}))
    record.add(result("linear_probe", tmp_path / "x", status="cached"))
    record.write(state="finished")
    found = json.loads((record.directory / "results.json").read_bytes())
    assert found["schema_version"] == 1
    assert found["preset"] == "drawn"
    assert found["seed"] == 0
    assert found["data"] == {
        "pretrain": tiny_settings.data.source,
        "transfer": "drawn10" if tiny_settings.transfer.source else tiny_settings.data.source,
        "fingerprint": "f00",
    }
    assert found["stages"]["linear_probe"] == {
        "key": "0123456789abcdef",
        "directory": str(tmp_path / "x"),
        "status": "cached",
        "wall_seconds": 1.235,
        "samples_per_second": 9.0,
        "top1": 0.75,
    }


def test_the_record_holds_what_is_needed_to_repeat_the_run(
    tmp_path: Path, tiny_settings: Settings
) -> None:
    record = RunRecord(tiny_settings, tmp_path)
    run = json.loads((record.directory / "run.json").read_bytes())
    assert run["state"] == "running"
    assert run["versions"]["torch"]
    assert (record.directory / "config.yaml").read_text() == to_yaml(tiny_settings)


def test_the_same_settings_have_the_same_name_and_others_another(
    tiny_values: dict[str, Any],
) -> None:
    name = run_name(validate(tiny_values))
    assert name.startswith("drawn-seed0-")
    assert run_name(validate(merge(tiny_values, {"tracking": {"log_every_steps": 9}}))) == name
    assert run_name(validate(merge(tiny_values, {"finetune": {"epochs": 9}}))) != name
    assert run_name(validate(merge(tiny_values, {"seed": 3}))).startswith("drawn-seed3-")


def test_the_report_is_put_beside_the_record(tmp_path: Path, tiny_settings: Settings) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "index.html").write_text("<p>page")
    record = RunRecord(tiny_settings, tmp_path)
    record.add(result("report", tmp_path / "made"))
    assert (record.directory / "report" / "index.html").read_text() == "<p>page"


def test_a_shorter_run_leaves_the_results_of_a_longer_one(
    tmp_path: Path, tiny_settings: Settings
) -> None:
    longer = RunRecord(tiny_settings, tmp_path)
    for stage in ("prepare_data", "pretrain", "linear_probe"):
        longer.add(result(stage, tmp_path / stage))
    shorter = RunRecord(tiny_settings, tmp_path, until="pretrain")
    shorter.add(result("prepare_data", tmp_path / "prepare_data", status="cached"))
    found = json.loads((longer.directory / "results.json").read_bytes())["stages"]
    assert list(found) == ["prepare_data", "pretrain", "linear_probe"]
    assert found["prepare_data"]["status"] == "cached"
    # Other images: what was made of the old ones is not shown beside them.
    shorter.add(result("prepare_data", tmp_path / "other", key="f" * 16))
    found = json.loads((longer.directory / "results.json").read_bytes())["stages"]
    assert list(found) == ["prepare_data"]


def test_how_a_killed_run_ended_is_noted_with_the_command_that_resumes(
    tmp_path: Path, tiny_settings: Settings
) -> None:
    assert note_end(tiny_settings, tmp_path, state="crashed", message="") is None, "no record"
    record = RunRecord(tiny_settings, tmp_path, until="linear_probe")
    checkpoint = tmp_path / "pretrain" / "k" / "checkpoints" / "step-00000012-evaluated"
    checkpoint.mkdir(parents=True)
    request = SimpleNamespace(title="pretrain", directory=tmp_path / "pretrain" / "k")
    record.begin(request)  # type: ignore[arg-type]
    added = note_end(tiny_settings, tmp_path, state="crashed", message="killed")
    assert added is not None
    facts = json.loads((record.directory / "run.json").read_bytes())
    assert (facts["state"], facts["message"]) == ("crashed", "killed")
    assert facts["last_checkpoint"].endswith("pretrain/k/checkpoints/step-00000012-evaluated")
    words = shlex.split(facts["resume"])
    assert words[:2] == ["rotvit", "run"]
    assert words[words.index("--until") + 1] == "linear-probe"
    assert build_settings(config=Path(words[words.index("--config") + 1])) == tiny_settings
