"""The whole flow on a few drawn images, against Prefect's own temporary server."""

import json
from pathlib import Path
from typing import Any

import pytest
from prefect import get_client
from prefect.client.schemas import FlowRun
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ParameterTypeError

from flows.rotation_vit import TASKS, rotation_vit
from tasks import stage_processes
from training.configure import validate
from training.settings import ConfigError, Settings, merge
from training.stages import STAGES

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("prefect_backend")]

NOT_NEEDED = {
    *("download", "download_transfer", "prepare_transfer_data"),
    *("frozen_tokens", "finetune_all"),
}
STAGE_NAMES = [name for name in STAGES if name not in NOT_NEEDED]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all tests here: each builds on what the ones before it made."""
    return tmp_path_factory.mktemp("outputs")


def statuses(results: dict[str, Any]) -> dict[str, str]:
    return {name: stage["status"] for name, stage in results["stages"].items()}


def newest_flow_run() -> FlowRun:
    with get_client(sync_client=True) as client:
        return client.read_flow_runs(sort=FlowRunSort.START_TIME_DESC, limit=1)[0]


def states_in_prefect() -> dict[str, str]:
    """Task run names and state names of the newest flow run, as the UI shows them."""
    newest = newest_flow_run()
    with get_client(sync_client=True) as client:
        runs = client.read_task_runs(
            flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[newest.id]))
        )
    return {run.name: run.state_name or "" for run in runs}


def test_every_stage_has_a_task() -> None:
    assert list(TASKS) == list(STAGES)


def test_the_first_run_computes_everything(outputs: Path, tiny_settings: Settings) -> None:
    results = rotation_vit(tiny_settings, outputs)
    assert statuses(results) == dict.fromkeys(STAGE_NAMES, "computed")
    for stage in results["stages"].values():
        assert Path(stage["directory"]).is_dir()
        assert stage["wall_seconds"] > 0
        assert len(stage["key"]) == 16
    (run,) = (outputs / "runs").iterdir()
    assert json.loads((run / "results.json").read_bytes()) == results
    assert json.loads((run / "run.json").read_bytes())["state"] == "finished"
    assert (run / "report" / "index.html").read_text().startswith("<!doctype html>")
    assert set(states_in_prefect().values()) == {"Completed"}


def test_the_same_again_is_cached_in_every_stage_and_in_prefect_and_starts_no_process(
    outputs: Path, tiny_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_processes, "_Server", None)
    results = rotation_vit(tiny_settings, outputs)
    assert statuses(results) == dict.fromkeys(STAGE_NAMES, "cached")
    assert states_in_prefect() == dict.fromkeys(STAGE_NAMES, "Cached")


def test_a_stage_is_cached_too_where_only_prefects_own_record_is_gone(
    outputs: Path, tiny_settings: Settings
) -> None:
    records = list(outputs.glob("*/*/prefect-*.json"))
    assert len(records) >= len(STAGE_NAMES)
    for path in records:
        path.unlink()
    results = rotation_vit(tiny_settings, outputs)
    assert statuses(results) == dict.fromkeys(STAGE_NAMES, "cached")
    assert states_in_prefect() == dict.fromkeys(STAGE_NAMES, "Cached")


def test_a_changed_fine_tuning_setting_computes_only_what_follows_from_it(
    outputs: Path, tiny_values: dict[str, Any]
) -> None:
    changed = validate(merge(tiny_values, {"finetune": {"base_lr": 0.02}}))
    computed = {"finetune_1", "finetune_2", "report"}
    results = rotation_vit(changed, outputs)
    assert statuses(results) == {
        name: "computed" if name in computed else "cached" for name in STAGE_NAMES
    }


def test_a_damaged_byte_computes_that_stage_again_and_says_why(
    outputs: Path, tiny_settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    directory = Path(rotation_vit(tiny_settings, outputs)["stages"]["finetune_1"]["directory"])
    path = directory / "model" / "model.safetensors"
    sound = path.read_bytes()
    path.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    results = rotation_vit(tiny_settings, outputs)
    found = statuses(results)
    assert found.pop("finetune_1") == "computed"
    assert set(found.values()) == {"cached"}, "the same bytes come out, so what follows stands"
    assert path.read_bytes() == sound
    assert states_in_prefect()["finetune_1"] == "Completed"


def test_until_runs_a_stage_and_what_it_needs(outputs: Path, tiny_settings: Settings) -> None:
    results = rotation_vit(tiny_settings, outputs, until="linear-probe")
    assert list(results["stages"]) == ["prepare_data", "pretrain", "features", "linear_probe"]


def test_refresh_computes_a_stage_from_the_beginning(
    outputs: Path, tiny_settings: Settings
) -> None:
    results = rotation_vit(tiny_settings, outputs, refresh=("linear_probe",))
    found = statuses(results)
    assert found.pop("linear_probe") == "computed"
    assert set(found.values()) == {"cached"}


def test_another_transfer_source_is_prepared_by_a_stage_of_its_own(
    outputs: Path, tiny_values: dict[str, Any], tiny_folder: Path
) -> None:
    changes = {"transfer": {"source": f"folder:{tiny_folder / 'test'}", "labels": 10}}
    settings = validate(merge(tiny_values, changes))
    results = rotation_vit(settings, outputs, until="linear_probe")
    assert statuses(results) == {
        "prepare_data": "cached",
        "prepare_transfer_data": "computed",
        "pretrain": "cached",
        "features": "computed",
        "linear_probe": "computed",
    }


def test_other_seeds_are_tasks_of_their_own_and_refreshed_together(
    outputs: Path, tiny_values: dict[str, Any]
) -> None:
    settings = validate(merge(tiny_values, {"evaluation": {"seeds": 2}}))
    results = rotation_vit(settings, outputs, until="finetune-1")
    assert set(statuses(results).values()) == {"cached"}
    assert statuses(results["variants"]["seed 1"]) == {
        "linear_probe": "computed",
        "finetune_1": "computed",
    }
    assert results["over_seeds"]["stages"]["finetune_1"]["top1"]["n"] == 2
    shown = states_in_prefect()
    assert newest_flow_run().name.endswith(" · seeds 0 to 1")
    assert shown["finetune_1"] == "Cached"
    assert shown["finetune_1, seed 1"] == "Completed"

    again = rotation_vit(settings, outputs, until="finetune-1", refresh=["finetune-1"])
    assert statuses(again) == {**statuses(results), "finetune_1": "computed"}
    assert statuses(again["variants"]["seed 1"]) == {
        "linear_probe": "cached",
        "finetune_1": "computed",
    }
    assert states_in_prefect()["linear_probe, seed 1"] == "Cached"
    assert again["over_seeds"] == results["over_seeds"]


def test_a_users_mistake_fails_before_any_work(tmp_path: Path, tiny_settings: Settings) -> None:
    with pytest.raises(ParameterTypeError, match=r"until: .*A stage must be one of"):
        rotation_vit(tiny_settings, tmp_path, until="linear-prob")
    with pytest.raises(ConfigError, match="What to refresh must be among the stages that run"):
        rotation_vit(tiny_settings, tmp_path, until="pretrain", refresh=["report"])
    assert list(tmp_path.iterdir()) == []
