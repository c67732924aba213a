"""Training from an address: the same weights as from local files, through a cache of a tenth."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data import prepare as preparing
from data import remote_pixels
from data.patience import DownloadError, Patience
from data.records import DatasetError
from flows.cli import main
from tests.data.standin_hub import Fault, StandInHub
from training import prepare_data, pretrain, remote_outputs, shard_pushing, stage_files, store
from training.configure import to_yaml, validate
from training.runner import StageContext, run_stage
from training.settings import ConfigError, Settings, merge
from training.shard_pushing import address_of, push
from training.stages import STAGES
from training.stopping import Stopped, StopRequest
from training.store import StageRequest

ROOT = Path(__file__).parents[2]

TENTH_BYTES = 24_000
"""Limit of a cache that gets a few of the 81 images of 1.2 kB: its map and each piece of a file
take blocks of 4 kB."""

PATIENCE = Patience(attempts=4, first_wait=0.01, longest_wait=0.02, stall_seconds=5.0)


@pytest.fixture(autouse=True)
def small_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparing, "SHARD_IMAGES", 16)
    monkeypatch.setattr(remote_pixels, "PATIENCE", PATIENCE)
    monkeypatch.setattr(shard_pushing, "PATIENCE", PATIENCE)
    monkeypatch.setenv("ROTVIT_SHARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ROTVIT_SHARD_CACHE_GIB", str(TENTH_BYTES / 2**30))


def prepared(settings: Settings, outputs: Path) -> StageRequest:
    request = store.make_request(STAGES["prepare_data"], settings, outputs, {})
    run_stage(request, prepare_data.compute)
    return request


def pretraining(settings: Settings, outputs: Path) -> StageRequest:
    found = store.inspect(prepared(settings, outputs)).result
    assert found is not None
    request = store.make_request(STAGES["pretrain"], settings, outputs, {"prepare_data": found})
    request.directory.mkdir(parents=True, exist_ok=True)
    store.write_config(request)
    return request


def pushed_away(settings: Settings, outputs: Path, address: Path) -> StageRequest:
    """Prepare images, push them and delete them here; return the request to pretrain on them."""
    request = pretraining(settings, outputs)
    push(settings, outputs, str(address), delete_pixels=True, report=lambda done, total: None)
    assert not list((outputs / "prepare_data").rglob("*.npy"))
    return request


def push_copies(settings: Settings, outputs: Path, address: Path) -> None:
    push(settings, outputs, str(address), delete_pixels=False, report=lambda done, total: None)


def weights_sha256(request: StageRequest) -> str:
    return stage_files.sha256_of(request.directory / "model" / "model.safetensors")


def images_kept(cache: Path) -> dict[str, int]:
    return {
        path.parent.name.rpartition("-")[2]: int(np.fromfile(path, dtype=np.uint8).sum())
        for path in cache.glob("*/have")
    }


def test_what_was_pushed_and_is_gone_there_and_here_is_said(
    tiny_values: dict[str, Any], tmp_path: Path
) -> None:
    settings, outputs, address = validate(tiny_values), tmp_path / "outputs", tmp_path / "store"
    pushed_away(settings, outputs, address)
    push_copies(settings, outputs, address)
    gone = min(address.rglob("*.npy"))
    gone.unlink()
    with pytest.raises(DatasetError, match=f"{gone.name} must be as it was pushed"):
        push_copies(settings, outputs, address)


@pytest.mark.parametrize("pixel_format", ["raw", "jpeg"])
def test_weights_are_those_of_local_files_also_when_stopped_and_crashed(
    tiny_values: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    pixel_format: str,
) -> None:
    """18 steps; a stop at step 5, then an end without a word at step 11."""
    changes = {"data": {"format": pixel_format}, "checkpoint": {"every_steps": 4}}
    settings = validate(merge(tiny_values, changes))
    local = pretraining(settings, tmp_path / "local")
    assert run_stage(local, pretrain.compute).status == "computed"

    remote = pushed_away(settings, tmp_path / "remote", tmp_path / "there")
    assert (remote.key, remote.inputs["data"].digest) == (local.key, local.inputs["data"].digest)
    original, asks = StageContext.progress, StopRequest()

    def interrupted(self: StageContext, done: int, *rest: Any, **named: Any) -> None:
        original(self, done, *rest, **named)
        if done == 5:
            asks._asked = True
        if done == 11:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(StageContext, "progress", interrupted)
        with pytest.raises(Stopped):
            run_stage(remote, pretrain.compute, asks)
        with pytest.raises(KeyboardInterrupt):
            run_stage(remote, pretrain.compute)
    assert store.inspect(remote).step == 8
    assert run_stage(remote, pretrain.compute).status == "resumed"
    assert weights_sha256(remote) == weights_sha256(local)
    assert 0 < images_kept(tmp_path / "cache")["train"] <= 12


@pytest.mark.slow
def test_weights_are_those_of_local_files_after_kills(
    tiny_values: dict[str, Any], tmp_path: Path
) -> None:
    changes = {"pretrain": {"epochs": 40}, "checkpoint": {"every_steps": 5}}
    settings = validate(merge(tiny_values, changes))
    local = pretraining(settings, tmp_path / "local")
    run_stage(local, pretrain.compute)
    remote = pushed_away(settings, tmp_path / "remote", tmp_path / "there")
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "training.pretrain", str(remote.directory)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
    )
    while (stage_files.newest_step(remote.directory) or 0) < 20:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert run_stage(remote, pretrain.compute).status == "resumed"
    assert weights_sha256(remote) == weights_sha256(local)


@pytest.fixture
def served(
    tiny_values: dict[str, Any], tmp_path: Path, hub: StandInHub, monkeypatch: pytest.MonkeyPatch
) -> StageRequest:
    """A pretraining whose images a web server has; what it needs besides is here."""
    settings = validate(merge(tiny_values, {"pretrain": {"epochs": 40}}))
    there = tmp_path / "there"
    key = pushed_away(settings, tmp_path / "pushing", there).inputs["data"].key
    hub.add("a/b", {f"{key}/{path.name}": path.read_bytes() for path in (there / key).iterdir()})
    monkeypatch.setenv("ROTVIT_SHARDS", f"{hub.url}/plain/a/b/-")
    monkeypatch.setenv("ROTVIT_SHARD_CACHE_GIB", "0")
    return pretraining(settings, tmp_path / "outputs")


def fail_from_step(
    step: int, hub: StandInHub, monkeypatch: pytest.MonkeyPatch, then: Callable[[], None]
) -> None:
    original = StageContext.progress

    def progress(self: StageContext, done: int, *rest: Any, **named: Any) -> None:
        original(self, done, *rest, **named)
        if done == step:
            hub.faults.append(Fault("status", 503, times=10**6))
            then()

    monkeypatch.setattr(StageContext, "progress", progress)


@pytest.mark.parametrize(
    ("ahead_images", "failing", "last"), [(10, 31, range(31, 36)), (10**6, 36, [36])]
)
def test_a_store_that_is_given_up_ends_a_training_that_has_saved_its_state(
    served: StageRequest,
    hub: StandInHub,
    monkeypatch: pytest.MonkeyPatch,
    ahead_images: int,
    failing: int,
    last: Sequence[int],
) -> None:
    """Within the sixth epoch, and in the evaluation after it."""
    monkeypatch.setattr(remote_pixels, "AHEAD_BYTES", ahead_images * 1200)
    fail_from_step(failing, hub, monkeypatch, lambda: None)
    with pytest.raises(DownloadError, match="attempts in a row failed"):
        run_stage(served, pretrain.compute)
    assert store.inspect(served).step in last


def test_a_stop_while_a_store_is_away_saves_the_state(
    served: StageRequest, hub: StandInHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient = Patience(attempts=99, first_wait=30, longest_wait=30)
    monkeypatch.setattr(remote_pixels, "PATIENCE", patient)
    stop, began = StopRequest(), time.monotonic()

    def ask_later() -> None:
        nonlocal began
        began = time.monotonic()
        hub.closing.wait(0.3)
        stop._asked = True

    fail_from_step(31, hub, monkeypatch, lambda: threading.Thread(target=ask_later).start())
    with pytest.raises(Stopped):
        run_stage(served, pretrain.compute, stop)
    assert time.monotonic() - began < 5
    step = store.inspect(served).step
    assert step is not None
    assert step >= 31


def test_another_machine_takes_what_was_pushed_and_prepares_nothing(
    tiny_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = prepared(tiny_settings, tmp_path / "first")
    first = store.inspect(request).result
    assert first is not None
    push_copies(tiny_settings, tmp_path / "first", tmp_path / "there")
    monkeypatch.setenv("ROTVIT_SHARDS", str(tmp_path / "there"))
    monkeypatch.setattr(prepare_data, "prepare", None)  # is not called
    other = prepared(tiny_settings, tmp_path / "other")
    second = store.inspect(other).result
    assert second is not None
    assert (second.digest, second.scores) == (first.digest, first.scores)
    assert not list(other.directory.glob("*.npy"))


def test_what_is_not_at_the_address_is_prepared_and_what_was_begun_goes_on_here(
    tiny_settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("ROTVIT_SHARDS", str(tmp_path / "there"))
    request = prepared(tiny_settings, tmp_path / "outputs")
    (said,) = [each.getMessage() for each in caplog.records if "ROTVIT_SHARDS" in each.getMessage()]
    assert f"{tmp_path}/there/{request.key} has no prepared images" in said
    assert list(request.directory.glob("*.npy"))
    push_copies(tiny_settings, tmp_path / "outputs", tmp_path / "there")
    (request.directory / "train-00001.npy").unlink()
    (request.directory / "pushed.json").unlink()
    assert store.inspect(request).state == "missing"
    prepared(tiny_settings, tmp_path / "outputs")
    assert (request.directory / "train-00001.npy").is_file()


def test_images_made_from_others_are_not_taken(
    tiny_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = prepared(tiny_settings, tmp_path / "first")
    push_copies(tiny_settings, tmp_path / "first", tmp_path / "there")
    there = tmp_path / "there" / request.key / "manifest.json"
    there.write_text(json.dumps({**json.loads(there.read_text()), "made_from": "something else"}))
    monkeypatch.setenv("ROTVIT_SHARDS", str(tmp_path / "there"))
    with pytest.raises(ValueError, match="must hold images made from this source"):
        prepared(tiny_settings, tmp_path / "other")


def test_what_was_deleted_here_is_still_a_finished_stage(
    tiny_settings: Settings, tmp_path: Path
) -> None:
    request = pushed_away(tiny_settings, tmp_path / "outputs", tmp_path / "there")
    data = store.make_request(STAGES["prepare_data"], tiny_settings, tmp_path / "outputs", {})
    assert store.inspect(data).state == "cached"
    (data.directory / "train-00001.index").unlink()
    assert store.inspect(data).why == "train-00001.index is missing or has changed"
    assert request.inputs["data"].directory == data.directory


def test_the_command_pushes_and_says_where(
    tiny_settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(to_yaml(tiny_settings))
    outputs, there = tmp_path / "outputs", tmp_path / "there"
    command = ["push-shards", str(there), "--config", str(config), "--outputs", str(outputs)]
    assert main(command) == 2
    assert "Run `rotvit prepare-data` with the same options" in capsys.readouterr().err
    key = prepared(tiny_settings, outputs).key
    assert main([*command, "--delete-pixels"]) == 0
    assert capsys.readouterr().out == f"{address_of(str(there), key)}\n"
    assert not list(outputs.rglob("*.npy"))
    assert main([*command, "--delete-pixels"]) == 0, "again"
    shutil.rmtree(there)
    assert main(["push-shards", "https://host.invalid/x", *command[2:]]) == 2


def test_pixels_are_deleted_only_where_the_address_has_them(
    tiny_settings: Settings, tmp_path: Path
) -> None:
    """A copy of an earlier push went bad, its length the same."""
    there = tmp_path / "there"
    request = prepared(tiny_settings, tmp_path / "outputs")
    push_copies(tiny_settings, tmp_path / "outputs", there)
    bad = next(there.rglob("*.npy"))
    content = bytearray(bad.read_bytes())
    content[-1] ^= 1
    bad.write_bytes(content)
    before = sorted(request.directory.glob("*.npy"))
    with pytest.raises(ValueError, match=r"has another SHA-256\. Delete it there, and push"):
        pushed_away(tiny_settings, tmp_path / "outputs", there)
    assert sorted(request.directory.glob("*.npy")) == before
    bad.unlink()
    pushed_away(tiny_settings, tmp_path / "outputs", there)


def test_a_deletion_that_was_cut_off_is_finished(tiny_settings: Settings, tmp_path: Path) -> None:
    request = prepared(tiny_settings, tmp_path / "outputs")
    push_copies(tiny_settings, tmp_path / "outputs", tmp_path / "there")
    next(request.directory.glob("*.npy")).unlink()
    assert list(request.directory.glob("*.npy"))
    pushed_away(tiny_settings, tmp_path / "outputs", tmp_path / "there")


def test_outputs_at_an_address_are_not_pushed(
    tiny_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROTVIT_CACHE", str(tmp_path / "cache-of-outputs"))
    outputs = remote_outputs.local_folder(f"file://{tmp_path}/store")
    with pytest.raises(ConfigError, match="from a folder on this computer, but the outputs are at"):
        push_copies(tiny_settings, outputs, tmp_path / "there")


def test_what_is_prepared_is_pushed_and_what_is_not_is_named(
    tiny_settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As after `rotvit prepare-data` with a preset that has its labels from elsewhere."""
    settings = validate(
        merge(tiny_settings.model_dump(), {"transfer": {"source": "imagenette", "labels": None}})
    )
    prepared(settings, tmp_path / "outputs")
    addresses = push(
        settings,
        tmp_path / "outputs",
        str(tmp_path / "there"),
        delete_pixels=False,
        report=lambda done, total: None,
    )
    assert len(addresses) == 1
    assert "images of prepare-transfer-data are not prepared here" in caplog.text
    assert "--until prepare-transfer-data" in caplog.text


def test_images_that_are_not_prepared_cannot_be_pushed(
    tiny_settings: Settings, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="must be prepared before they are pushed"):
        push(
            tiny_settings,
            tmp_path,
            "memory://x",
            delete_pixels=False,
            report=lambda done, total: None,
        )
