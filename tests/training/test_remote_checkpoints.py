"""Checkpoints that travel: sent beside training, fetched where another machine goes on."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from training import pretrain, remote_checkpoints, remote_lock, remote_outputs, stopping, store
from training.checkpoint import Snapshot, save
from training.configure import validate
from training.remote_checkpoints import Uploads, complete, fetch_newest, prune
from training.remote_lock import leased
from training.remote_outputs import compute_once
from training.remote_store import ONCE, Store
from training.runner import run_stage
from training.settings import merge
from training.stage_files import CHECKPOINTS, newest_checkpoint
from training.stages import STAGES
from training.stopping import Stopped, StopRequest
from training.store import StageRequest, StageResult

if TYPE_CHECKING:
    from tests.standin_s3 import StandInS3

Machine = Callable[[str, str], Path]
PLACE = "pretrain/k"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_checkpoints, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(remote_checkpoints, "AGAIN_SECONDS", 0.05)


@pytest.fixture
def save_step(tmp_path: Path, rng: Any) -> Callable[..., Path]:
    """Save a checkpoint of a step in the stage's directory, or that of another machine."""
    import torch

    def at(step: int, machine: str = "stage") -> Path:
        tensors = {"model": {"w": torch.rand(50, generator=rng)}}
        directory = tmp_path / machine
        directory.mkdir(exist_ok=True)
        (directory / "metrics.jsonl").write_text(f'{{"step": {step}}}\n')
        snapshot = Snapshot(step=step, tensors=tensors, state={})
        return save(directory / CHECKPOINTS, snapshot, identity={})

    return at


@contextmanager
def sending(remote: Store, directory: Path) -> Iterator[None]:
    """Send what the block saves, with a lease from a store that never fails."""
    leases = Store(f"file://{directory.parent}/leases")
    with (
        leased(leases, "locks/k", owner="this machine", what="pretrain") as lease,
        Uploads(remote, PLACE, directory, "pretrain", lease),
    ):
        yield


@contextmanager
def stopped(remote: Store, directory: Path) -> Iterator[None]:
    """Send what the block saves, until the stage is stopped at its end."""
    with suppress(KeyboardInterrupt), sending(remote, directory):
        yield
        raise KeyboardInterrupt


def until(what: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def until_stored(remote: Store, step: int) -> None:
    until(lambda: f"step-{step:08d}" in complete(remote, PLACE))


def test_new_checkpoints_are_sent_while_the_stage_runs(
    address: str, save_step: Callable[[int], Path], tmp_path: Path
) -> None:
    remote = Store(address)
    with sending(remote, tmp_path / "stage"):
        for step in (1, 2, 3):
            save_step(step)
            until_stored(remote, step)
        as_many_as_on_disk = ["step-00000002", "step-00000003"]
        until(lambda: complete(remote, PLACE) == as_many_as_on_disk)
    assert remote_checkpoints.newest_step(remote, PLACE) == 3

    fetch_newest(remote, PLACE, tmp_path / "elsewhere")
    found = newest_checkpoint(tmp_path / "elsewhere")
    assert found is not None
    here = tmp_path / "stage" / CHECKPOINTS / "step-00000003"
    assert {path.name for path in found.iterdir()} == {path.name for path in here.iterdir()}
    for path in here.iterdir():
        assert (found / path.name).read_bytes() == path.read_bytes()
    assert (tmp_path / "elsewhere" / "metrics.jsonl").read_text() == '{"step": 3}\n'


def test_the_last_one_is_sent_when_the_stage_is_stopped(
    save_step: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_checkpoints, "LOOK_SECONDS", 60.0)
    remote = Store(f"file://{tmp_path}/store")
    with stopped(remote, tmp_path / "stage"):
        save_step(7)
    assert complete(remote, PLACE) == ["step-00000007"]


def test_one_that_was_cut_off_does_not_count_and_is_cleared_away(
    save_step: Callable[[int], Path], tmp_path: Path
) -> None:
    remote = Store(f"file://{tmp_path}/store")
    with stopped(remote, tmp_path / "stage"):
        save_step(1)
    remote.write(f"{PLACE}/{CHECKPOINTS}/step-00000002/model.safetensors", b"half of it")
    assert complete(remote, PLACE) == ["step-00000001"]
    fetch_newest(remote, PLACE, tmp_path / "elsewhere")
    assert [path.name for path in (tmp_path / "elsewhere" / CHECKPOINTS).iterdir()] == [
        "step-00000001"
    ]
    prune(remote, PLACE, 2)
    assert {name.split("/")[0] for name in remote.sizes(f"{PLACE}/{CHECKPOINTS}")} == {
        "step-00000001"
    }
    prune(remote, PLACE, 0)
    assert remote.sizes(f"{PLACE}/{CHECKPOINTS}") == {}


@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json", "beside/metrics.jsonl"])
def test_of_a_damaged_one_the_one_before_is_used(
    save_step: Callable[[int], Path], tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    remote = Store(f"file://{tmp_path}/store")
    with sending(remote, tmp_path / "stage"):
        for step in (1, 2):
            save_step(step)
            until_stored(remote, step)
    place = f"{PLACE}/{CHECKPOINTS}/step-00000002/{name}"
    content = remote.read(place) or b""
    remote.write(place, content[:-1] + bytes([content[-1] ^ 1]))
    fetch_newest(remote, PLACE, tmp_path / "elsewhere")
    assert "step-00000002 at" in caplog.text
    assert "is damaged" in caplog.text
    assert [path.name for path in (tmp_path / "elsewhere" / CHECKPOINTS).iterdir()] == [
        "step-00000001"
    ]


def test_a_newer_one_here_is_kept(save_step: Callable[[int], Path], tmp_path: Path) -> None:
    remote = Store(f"file://{tmp_path}/store")
    with stopped(remote, tmp_path / "stage"):
        save_step(1)
    save_step(2)
    before = sorted((tmp_path / "stage" / CHECKPOINTS).iterdir())
    fetch_newest(remote, PLACE, tmp_path / "stage")
    assert sorted((tmp_path / "stage" / CHECKPOINTS).iterdir()) == before
    assert (tmp_path / "stage" / "metrics.jsonl").read_text() == '{"step": 2}\n'


def test_newer_ones_that_were_of_no_use_give_way(
    save_step: Callable[[int], Path], tmp_path: Path
) -> None:
    """Inputs were replaced, so that a stage begins anew: those of before are in its way."""
    import shutil

    remote = Store(f"file://{tmp_path}/store")
    with sending(remote, tmp_path / "stage"):
        for step in (3, 9):
            save_step(step)
            until_stored(remote, step)
    shutil.rmtree(tmp_path / "stage")
    with sending(remote, tmp_path / "stage"):
        mine = save_step(3)
        until(lambda: complete(remote, PLACE) == ["step-00000003"])
    fetch_newest(remote, PLACE, tmp_path / "elsewhere")
    found = newest_checkpoint(tmp_path / "elsewhere")
    assert found is not None
    assert (found / "model.safetensors").read_bytes() == (mine / "model.safetensors").read_bytes()


def test_who_lost_the_lease_leaves_the_checkpoints_of_the_heir_alone(
    save_step: Callable[..., Path],
    address: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It does not know of its loss yet, and is behind the heir, whose step it will reach."""
    monkeypatch.setattr(remote_lock, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(remote_lock, "DEAD_AFTER_SECONDS", 0.2)
    remote = Store(address)
    with (
        leased(remote, "locks/k", owner="loser", what="pretrain") as lost,
        Uploads(remote, PLACE, tmp_path / "loser", "pretrain", lost),
        leased(remote, "locks/k", owner="heir", what="pretrain") as held,
        Uploads(remote, PLACE, tmp_path / "heir", "pretrain", held),
    ):
        save_step(900, "heir")
        until_stored(remote, 900)
        before = remote.sizes("pretrain")
        save_step(500, "loser")
        until(lambda: "Another run has taken over pretrain" in caplog.text)
        save_step(900, "loser")
        time.sleep(0.3)  # many looks
        assert remote.sizes("pretrain") == before
        save_step(901, "heir")
        until_stored(remote, 901)
    assert caplog.text.count("Another run has taken over pretrain") == 1


def test_a_store_that_fails_costs_a_warning_and_no_time(
    save_step: Callable[[int], Path],
    s3: "StandInS3",
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger="training")
    remote = Store("s3://bucket/x")
    s3.fault = lambda asked: 503
    with stopped(remote, tmp_path / "stage"):
        save_step(1)
        until(lambda: "Checkpoint step-00000001 of pretrain is not stored" in caplog.text)
        save_step(2)
        until(lambda: sum("PUT" in each or "GET" in each for each in s3.seen) > 3)
        s3.fault = lambda asked: None
        until(lambda: complete(remote.patient(ONCE), PLACE) == ["step-00000002"])
    assert caplog.text.count("is not stored") == 1
    assert "Checkpoint step-00000002 of pretrain is stored" in caplog.text


@pytest.mark.parametrize("is_told", [False, True], ids=["an end", "a stop"])
def test_a_store_that_hangs_is_not_waited_for(
    save_step: Callable[[int], Path],
    s3: "StandInS3",
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_told: bool,
) -> None:
    """Nor longer than a process has that is told to stop, whose child has taken its time."""
    if is_told:
        monkeypatch.setattr(stopping, "STOP_SECONDS", remote_checkpoints.RELEASE_SECONDS + 0.3)
        monkeypatch.setattr(stopping.ENDING, "_told_at", time.monotonic())
    else:
        monkeypatch.setattr(remote_checkpoints, "END_SECONDS", 0.3)
    hangs = threading.Event()

    def fault(asked: str) -> None:
        hangs.wait(20)

    s3.fault = fault
    began = time.monotonic()
    with sending(Store("s3://bucket/x"), tmp_path / "stage"):
        save_step(1)
        until(lambda: bool(s3.seen))
    assert time.monotonic() - began < 10
    hangs.set()


@pytest.fixture
def pretraining(
    machine: Machine,
    tiny_values: dict[str, Any],
    run_stages: Callable[..., dict[str, StageResult]],
    tmp_path: Path,
) -> Callable[[Path], StageRequest]:
    """The request of a real pretraining in an outputs folder."""
    settings = validate(merge(tiny_values, {"checkpoint": {"every_steps": 2}}))
    results = run_stages(settings, tmp_path / "plain", "prepare_data")

    def build(outputs: Path) -> StageRequest:
        return store.make_request(STAGES["pretrain"], settings, outputs, results)

    return build


def weights(request: StageRequest) -> dict[str, Tensor]:
    return load_file(request.directory / "model" / "model.safetensors")


@pytest.mark.slow
def test_a_training_that_was_stopped_goes_on_elsewhere_to_the_same_bytes(
    pretraining: Callable[[Path], StageRequest],
    machine: Machine,
    stop_after: Callable[[int], StopRequest],
    address: str,
    tmp_path: Path,
) -> None:
    whole = pretraining(tmp_path / "plain")
    run_stage(whole, pretrain.compute)

    first = pretraining(machine("a", address))
    with pytest.raises(Stopped):
        compute_once(first, lambda given: run_stage(given, pretrain.compute, stop_after(9)))
    second = pretraining(machine("b", address))
    remote_outputs.look(second)
    assert store.inspect(second).state == "missing"
    step = remote_outputs.newest_step(second)
    assert step is not None
    assert step > 2

    made = compute_once(second, lambda given: run_stage(given, pretrain.compute))
    assert made.status == "resumed"
    for name, tensor in weights(whole).items():
        assert tensor.equal(weights(second)[name]), name
    lines = [
        (request.directory / "metrics.jsonl").read_text().splitlines()
        for request in (whole, second)
    ]
    assert len(lines[0]) == len(lines[1]), "no line lost, none doubled"
    assert len(complete(Store(address), f"pretrain/{second.key}")) <= 1, "as on disk"
