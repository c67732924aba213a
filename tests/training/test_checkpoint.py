import json
from pathlib import Path

import pytest
import torch
from torch import nn

from training import checkpoint
from training.checkpoint import Snapshot
from training.errors import CheckpointError

IDENTITY = {"key": "abc"}


def snapshot(step: int) -> Snapshot:
    tensors = {"model": {"weight": torch.full((3, 5), float(step))}}
    return Snapshot(step=step, tensors=tensors, state={"best": 0.25, "name": "x"})


def flip_one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, snapshot(7), identity=IDENTITY)
    loaded = checkpoint.load_newest(tmp_path, identity=IDENTITY)
    assert loaded is not None
    assert loaded.step == 7
    assert dict(loaded.state) == {"best": 0.25, "name": "x"}
    assert torch.equal(loaded.tensors["model"]["weight"], torch.full((3, 5), 7.0))


def test_where_nothing_was_saved_nothing_is_loaded(tmp_path: Path) -> None:
    assert checkpoint.load_newest(tmp_path / "never", identity=IDENTITY) is None


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        checkpoint.save(tmp_path, snapshot(step), identity=IDENTITY)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000010"]


@pytest.mark.parametrize("file", ["model.safetensors", "state.json", "manifest.json"])
def test_a_flipped_bit_anywhere_sends_training_to_the_one_before(tmp_path: Path, file: str) -> None:
    checkpoint.save(tmp_path, snapshot(1), identity=IDENTITY)
    newest = checkpoint.save(tmp_path, snapshot(2), identity=IDENTITY)
    flip_one_bit(newest / file)
    loaded = checkpoint.load_newest(tmp_path, identity=IDENTITY)
    assert loaded is not None
    assert loaded.step == 1
    assert (tmp_path / "step-00000002.damaged").is_dir(), "kept for a look, under another name"


@pytest.mark.parametrize("file", ["model.safetensors", "state.json", "manifest.json"])
def test_a_missing_or_cut_file_is_noticed(tmp_path: Path, file: str) -> None:
    checkpoint.save(tmp_path, snapshot(1), identity=IDENTITY)
    (checkpoint.save(tmp_path, snapshot(2), identity=IDENTITY) / file).unlink()
    cut = checkpoint.save(tmp_path, snapshot(3), identity=IDENTITY) / file
    cut.write_bytes(cut.read_bytes()[:-1])
    # Saving the third one pruned the first: nothing sound is left.
    with pytest.raises(CheckpointError, match="all under"):
        checkpoint.load_newest(tmp_path, identity=IDENTITY)


def test_when_all_are_damaged_it_is_an_error_every_time_and_never_a_fresh_start(
    tmp_path: Path,
) -> None:
    flip_one_bit(checkpoint.save(tmp_path, snapshot(1), identity=IDENTITY) / "model.safetensors")
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"step-00000001\.damaged"):
            checkpoint.load_newest(tmp_path, identity=IDENTITY)


def test_what_a_killed_writer_left_is_ignored_and_removed(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, snapshot(1), identity=IDENTITY)
    (tmp_path / ".tmp-dead").mkdir()
    (tmp_path / ".tmp-dead" / "model.safetensors").write_bytes(b"half")
    loaded = checkpoint.load_newest(tmp_path, identity=IDENTITY)
    assert loaded is not None
    assert loaded.step == 1
    assert not (tmp_path / ".tmp-dead").exists()


def test_a_checkpoint_of_something_else_is_refused_with_the_difference(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, snapshot(1), identity=IDENTITY)
    with pytest.raises(CheckpointError, match="key is 'abc' there and 'other' here"):
        checkpoint.load_newest(tmp_path, identity={"key": "other"})


def test_saving_a_step_twice_keeps_the_sound_one_and_replaces_a_damaged_one(
    tmp_path: Path,
) -> None:
    first = checkpoint.save(tmp_path, snapshot(4), identity=IDENTITY)
    written = (first / "manifest.json").stat().st_mtime_ns
    checkpoint.save(tmp_path, snapshot(4), identity=IDENTITY)
    assert (first / "manifest.json").stat().st_mtime_ns == written
    flip_one_bit(first / "model.safetensors")
    checkpoint.save(tmp_path, snapshot(4), identity=IDENTITY)
    loaded = checkpoint.load_newest(tmp_path, identity=IDENTITY)
    assert loaded is not None
    assert torch.equal(loaded.tensors["model"]["weight"], torch.full((3, 5), 4.0))


def test_a_failed_write_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(tmp_path, snapshot(1), identity=IDENTITY)

    def disk_full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", disk_full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(tmp_path, snapshot(2), identity=IDENTITY)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_the_manifest_names_every_file(tmp_path: Path) -> None:
    directory = checkpoint.save(tmp_path, snapshot(1), identity=IDENTITY)
    manifest = json.loads((directory / "manifest.json").read_bytes())
    present = {path.name for path in directory.iterdir()} - {"manifest.json"}
    assert set(manifest["files"]) == present


def test_an_optimizer_goes_on_as_if_it_had_not_been_saved(rng: torch.Generator) -> None:
    def make() -> tuple[nn.Linear, torch.optim.AdamW]:
        model = nn.Linear(3, 2)
        nn.init.constant_(model.weight, 0.5)
        nn.init.zeros_(model.bias)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor) -> None:
        optimizer.zero_grad()
        model(images).pow(2).mean().backward()
        optimizer.step()

    batches = torch.rand(4, 7, 3, generator=rng)
    model, optimizer = make()
    for batch in batches[:2]:
        step(model, optimizer, batch)
    tensors = {
        name: value.clone()
        for name, value in checkpoint.optimizer_tensors(model, optimizer).items()
    }
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    for batch in batches[2:]:
        step(model, optimizer, batch)

    other, other_optimizer = make()
    other.load_state_dict(weights)
    checkpoint.restore_optimizer(other, other_optimizer, tensors)
    for batch in batches[2:]:
        step(other, other_optimizer, batch)
    assert torch.equal(model.weight, other.weight)
