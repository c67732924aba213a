"""Downloading as a stage: once, resumed, checked again afterwards, never asked for when done."""

import io
from collections import namedtuple
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
import pytest

from data import downloads, listing
from data.patience import Patience
from data.records import DatasetError
from tasks.child_process import run_in_child
from tests.data.standin_hub import Fault, StandInHub
from training import attempts, download, preflight, runner, store
from training.configure import validate
from training.run_record import RunRecord, record_if_all_cached
from training.runner import run_stage
from training.settings import Settings, merge
from training.stages import STAGES
from training.stopping import StopRequest
from training.store import StageRequest, StageResult

RunStages = Callable[..., dict[str, StageResult]]
StopAfter = Callable[[int], Any]


@pytest.fixture
def remote(
    hub: StandInHub,
    tiny_folder: Path,
    tiny_values: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, Any]:
    """Settings of a tiny run whose images are on the stand-in."""
    files = {}
    for split in ("train", "test"):
        paths = sorted((tiny_folder / split).rglob("*.png"))
        names = sorted({path.parent.name for path in paths})
        content = {
            "image": [{"bytes": path.read_bytes(), "path": path.name} for path in paths],
            "label": [names.index(path.parent.name) for path in paths],
        }
        features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
        file = io.BytesIO()
        table = datasets.Dataset.from_dict(content, features=datasets.Features(features))
        table.to_parquet(file)
        files[f"things/{split}/0000.parquet"] = file.getvalue()
    hub.add("a/tiny", files, revisions=("main", "refs/convert/parquet"))
    monkeypatch.setattr(
        download, "PATIENCE", Patience(attempts=3, first_wait=0.01, longest_wait=0.02)
    )
    source = {"data": {"source": "hub:a/tiny@refs/convert/parquet"}}
    return merge(merge(tiny_values, source), {"pretrain": {"epochs": 1, "warmup_epochs": 0}})


def request(settings: Settings, outputs: Path) -> StageRequest:
    return store.make_request(STAGES["download"], settings, outputs, {})


def statuses(results: Mapping[str, StageResult]) -> dict[str, str]:
    return {name: result.status for name, result in results.items()}


def test_download_prepare_pretrain_and_again_without_the_server(
    hub: StandInHub, remote: dict[str, Any], tmp_path: Path, run_stages: RunStages
) -> None:
    settings = validate(remote)
    preflight.check(settings, tmp_path, until="pretrain")
    assert hub.requests == [], "nothing is asked for before the download"
    first = run_stages(settings, tmp_path, until="pretrain")
    assert statuses(first) == dict.fromkeys(("download", "prepare_data", "pretrain"), "computed")
    assert first["download"].scores["counts"] == {"train": 60, "test": 21}
    assert first["prepare_data"].scores["classes"] == ["car", "house", "tree"]
    hub.close()
    hub.requests.clear()
    preflight.check(settings, tmp_path, until="pretrain")
    again = run_stages(settings, tmp_path, until="pretrain")
    assert set(statuses(again).values()) == {"cached"}
    assert record_if_all_cached(settings, tmp_path, "pretrain") is not None
    assert hub.requests == []


@pytest.mark.slow
def test_it_runs_in_a_process_of_its_own(
    hub: StandInHub, remote: dict[str, Any], tmp_path: Path
) -> None:
    hub.faults.append(Fault("cut", 100))
    wanted = request(validate(remote), tmp_path)
    assert run_in_child(wanted).status == "computed"
    assert store.inspect(wanted).state == "cached"


def test_the_prepared_images_are_those_of_a_run_that_keeps_no_files(
    hub: StandInHub,
    remote: dict[str, Any],
    tmp_path: Path,
    run_stages: RunStages,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = validate(remote)
    kept = run_stages(settings, tmp_path / "kept", until="prepare_data")
    monkeypatch.setattr(listing, "KEEP_BYTES", 0)
    passing = run_stages(settings, tmp_path / "passing", until="prepare_data")
    assert passing["prepare_data"].digest == kept["prepare_data"].digest
    assert passing["prepare_data"].key == kept["prepare_data"].key
    assert list((tmp_path / "passing").rglob("*.parquet")) == []


def test_a_preparation_that_is_refused_for_lack_of_space_leaves_no_file_behind(
    remote: dict[str, Any], tmp_path: Path, run_stages: RunStages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "KEEP_BYTES", 0)
    settings = validate(merge(remote, {"data": {"format": "jpeg", "crop_margin": 0.0}}))
    run_stages(settings, tmp_path, until="download")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(0, 0, 0))
    with pytest.raises(DatasetError, match="prepare smaller images"):
        run_stages(settings, tmp_path, until="prepare_data")
    assert list(tmp_path.rglob("*.parquet")) == []


def test_stopped_it_goes_on_where_it_was(
    hub: StandInHub, remote: dict[str, Any], tmp_path: Path, stop_after: StopAfter
) -> None:
    wanted = request(validate(remote), tmp_path)
    with pytest.raises(InterruptedError, match="the same command goes on there"):
        run_stage(wanted, download.compute, stop_after(2))
    assert store.inspect(wanted).state == "missing"
    assert run_stage(wanted, download.compute).status == "computed"


def test_a_damaged_file_makes_it_missing_and_says_which(
    hub: StandInHub, remote: dict[str, Any], tmp_path: Path
) -> None:
    wanted = request(validate(remote), tmp_path)
    run_stage(wanted, download.compute)
    next(wanted.directory.rglob("train/*.parquet")).unlink()
    verdict = store.inspect(wanted)
    assert (verdict.state, verdict.why) == ("missing", "things/train/0000.parquet is gone")
    asked = len(hub.requests)
    assert run_stage(wanted, download.compute).status == "computed"
    assert store.inspect(wanted).state == "cached"
    assert len(hub.requests) == asked + 2, "the file, by way of one redirect"


def test_what_the_settings_ask_of_a_data_set_is_checked_when_it_is_there(
    hub: StandInHub, remote: dict[str, Any], tmp_path: Path
) -> None:
    settings = validate(merge(remote, {"pretrain": {"batch_size": 60}}))
    preflight.check(settings, tmp_path)
    run_stage(request(settings, tmp_path), download.compute)
    with pytest.raises(DatasetError, match=r"pretrain\.batch_size must be at most.*there are 54"):
        preflight.check(settings, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"source": "imagenette"}, "transfer": {"labels": 9}}, "from 10 .*got 9"),
        ({"data": {"source": "cifar10"}, "pretrain": {"batch_size": 50_000}}, "there are 45000"),
        ({"data": {"source": "hub:beans"}}, "is written hub:<owner>/<name>"),
    ],
)
def test_mistakes_about_known_data_sets_are_found_before_the_download(
    tiny_values: dict[str, Any], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DatasetError, match=message):
        preflight.check(validate(merge(tiny_values, changes)), tmp_path)


def test_keys_of_local_sources_are_not_those_of_downloads(
    tiny_settings: Settings, tmp_path: Path
) -> None:
    prepared = store.make_request(STAGES["prepare_data"], tiny_settings, tmp_path, {})
    assert prepared.inputs == {}
    assert set(prepared.reads) == {"source", "side"}


def test_of_images_without_labels_pretraining_is_reported(
    tiny_values: dict[str, Any], tiny_folder: Path, tmp_path: Path, run_stages: RunStages
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number, path in enumerate(sorted((tiny_folder / "train").rglob("*.png"))):
        (images / f"{number}.png").write_bytes(path.read_bytes())
    changes = {"data": {"source": f"folder:{images}"}, "pretrain": {"epochs": 1, "batch_size": 8}}
    values = merge(tiny_values, merge(changes, {"pretrain": {"warmup_epochs": 0}}))
    settings, outputs = validate(values), tmp_path / "outputs"
    preflight.check(settings, outputs, until="pretrain")
    results = run_stages(settings, outputs, until="pretrain")
    record = RunRecord(settings, outputs, until="pretrain")
    for result in results.values():
        record.add(result)
    record.write(state="finished")
    page = (record.directory / "report" / "index.html").read_text(encoding="utf-8")
    assert "which of four ways a test image was turned" in page
    assert "Linear probe" not in page
    with pytest.raises(DatasetError, match=r"need labelled images.*Set transfer\.source"):
        preflight.check(settings, outputs)


def test_the_same_images_under_another_name_are_not_prepared_again(
    hub: StandInHub, remote: dict[str, Any], tmp_path: Path, run_stages: RunStages
) -> None:
    run_stages(validate(remote), tmp_path, until="prepare_data")
    other = validate(merge(remote, {"data": {"source": "hub:a/tiny"}}))
    again = run_stages(other, tmp_path, until="prepare_data")
    assert statuses(again) == {"download": "computed", "prepare_data": "cached"}


@pytest.mark.parametrize("stage", ["download", "download_transfer"])
def test_its_messages_name_the_stage_to_refresh(
    remote: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    named = []
    real = downloads.download

    def watched(*args: Any, **others: Any) -> Any:
        named.append(others["stage"])
        return real(*args, **others)

    monkeypatch.setattr(download, "download", watched)
    settings = validate(merge(remote, {"transfer": {"source": "hub:a/tiny"}}))
    wanted = store.make_request(STAGES[stage], settings, tmp_path, {})
    run_stage(wanted, download.compute)
    assert named == [stage.replace("_", "-")]


def test_a_server_that_fails_is_one_line_and_no_traceback(
    hub: StandInHub,
    remote: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    # What it changes in its own process, it must not change in that of the tests.
    monkeypatch.setattr(runner, "_log_to_stdout", lambda *, events: None)
    monkeypatch.setattr(StopRequest, "listen", lambda self, **options: None)
    hub.faults.append(Fault("status", 500, times=99))
    wanted = request(validate(remote), tmp_path)
    attempts.begin(wanted)
    assert runner.main(download.compute, [str(wanted.directory), "--events"]) == 1
    shown = capfd.readouterr()
    assert "attempts in a row failed" in shown.out
    assert "Traceback" not in shown.out + shown.err


def test_the_settings_are_no_progress(remote: dict[str, Any], tmp_path: Path) -> None:
    wanted = request(validate(remote), tmp_path)
    attempts.begin(wanted)
    assert attempts.progress_on_disk(wanted) == 0
    (wanted.directory / "files").mkdir()
    (wanted.directory / "files" / "config.yaml").write_bytes(b"12345")
    assert attempts.progress_on_disk(wanted) == 5
