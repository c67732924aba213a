"""Saving beside training: who waits for what, and what a failed write costs."""

import resource
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from training import checkpoint, stage_files
from training.checkpoint import Snapshot
from training.checkpoint_writer import CheckpointWriter

IDENTITY = {"key": "abc"}


def snapshot(step: int, weight: torch.Tensor) -> Snapshot:
    return Snapshot(step=step, tensors={"model": {"weight": weight}}, state={})


class Gate:
    """Holds every save until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.entered = threading.Event()
        original = checkpoint.save

        def held(*arguments: object, **named: object) -> Path:
            self.entered.set()
            assert self.open.wait(10)
            return original(*arguments, **named)  # type: ignore[arg-type]

        monkeypatch.setattr(checkpoint, "save", held)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    held = Gate(monkeypatch)
    yield held
    held.open.set()


def saved_weight(root: Path) -> torch.Tensor:
    loaded = checkpoint.load_newest(root, identity=IDENTITY)
    assert loaded is not None
    return loaded.tensors["model"]["weight"]


def test_training_goes_on_while_a_checkpoint_is_written_and_cannot_change_it(
    tmp_path: Path, gate: Gate
) -> None:
    weight = torch.full((3, 5), 1.0)
    with CheckpointWriter(tmp_path, identity=IDENTITY) as writer:
        writer.submit(snapshot(1, weight))
        assert gate.entered.wait(10), "submit has returned and the save has only begun"
        weight += 1  # the next step
        gate.open.set()
        writer.wait()
        assert writer.saved_step == 1
        assert torch.equal(saved_weight(tmp_path), torch.full((3, 5), 1.0))


def test_the_next_snapshot_waits_for_the_one_before_it(tmp_path: Path, gate: Gate) -> None:
    with CheckpointWriter(tmp_path, identity=IDENTITY) as writer:
        writer.submit(snapshot(1, torch.full((3, 5), 1.0)))
        second = threading.Thread(
            target=writer.submit, args=(snapshot(2, torch.full((3, 5), 2.0)),)
        )
        second.start()
        second.join(0.2)
        assert second.is_alive(), "its buffers are still being written"
        gate.open.set()
        second.join(10)
    assert writer.saved_step == 2
    assert torch.equal(saved_weight(tmp_path), torch.full((3, 5), 2.0))


def test_leaving_waits_until_all_is_on_disk(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path, identity=IDENTITY) as writer:
        writer.submit(snapshot(5, torch.zeros(3)))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]


def test_a_full_disk_costs_a_warning_and_the_older_checkpoint_is_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with CheckpointWriter(tmp_path, identity=IDENTITY) as writer:
        writer.submit(snapshot(1, torch.ones(5000)))
        writer.wait()
        try:  # no file may grow beyond this: as on a full disk, the write itself fails
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
            writer.submit(snapshot(2, torch.zeros(5000)))
            writer.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert writer.saved_step == 1
        assert "step 2 cannot be saved" in caplog.text
        assert "would start from step 1" in caplog.text
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
        writer.submit(snapshot(3, torch.zeros(5000)))
    assert writer.saved_step == 3, "once there is space again, saving goes on"


def test_what_cannot_be_read_back_is_set_aside_and_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = stage_files.sync_path

    def lose_a_byte(directory: Path) -> None:
        original(directory)
        for path in directory.glob("step-00000002/model.safetensors"):
            path.write_bytes(path.read_bytes()[:-1])

    monkeypatch.setattr(checkpoint, "sync_path", lose_a_byte)
    with CheckpointWriter(tmp_path, identity=IDENTITY) as writer:
        for step in (0, 1, 2):
            writer.submit(snapshot(step, torch.ones(3)))
    assert writer.saved_step == 1
    assert "must read back" in caplog.text
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step-00000000", "step-00000001", "step-00000002.damaged"], "none was pruned"


def test_a_mistake_in_the_program_is_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    with (
        pytest.raises(TypeError, match="serializable"),
        CheckpointWriter(tmp_path, identity=IDENTITY) as writer,
    ):
        writer.submit(Snapshot(step=1, tensors={}, state={"what": object()}))
