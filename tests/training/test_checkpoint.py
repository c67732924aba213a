import errno
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from training import checkpoint
from training.checkpoint import Snapshot
from training.errors import CheckpointError
from training.stage_files import digest_of, sha256_of

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


@pytest.mark.slow
def test_a_process_killed_before_any_file_operation_of_a_save_loses_nothing(tmp_path: Path) -> None:
    script = Path(__file__).with_name("crash_during_save.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    killed_before = json.loads(done.stdout)
    # Writing, naming, verifying and pruning were all reached.
    assert {"open", "os.mkdir", "os.rename", "shutil.rmtree", "os.rmdir"} <= set(killed_before)
    assert killed_before.count("open") > 5


def test_a_file_that_the_manifest_does_not_name_is_not_read(tmp_path: Path) -> None:
    directory = checkpoint.save(tmp_path, snapshot(1), identity=IDENTITY)
    (directory / "optimizer.safetensors").write_bytes(b"not verified by anybody")
    loaded = checkpoint.load_newest(tmp_path, identity=IDENTITY)
    assert loaded is not None
    assert set(loaded.tensors) == {"model"}


def test_a_manifest_that_names_files_elsewhere_is_damaged(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "a", snapshot(1), identity=IDENTITY)
    other = checkpoint.save(tmp_path / "b", snapshot(2), identity=IDENTITY)
    path = tmp_path / "a" / "step-00000001" / "manifest.json"
    manifest = json.loads(path.read_bytes())
    del manifest["sha256"]
    record = manifest["files"].pop("model.safetensors")
    manifest["files"][f"../../b/{other.name}/model.safetensors"] = record
    path.write_text(json.dumps({**manifest, "sha256": digest_of(manifest)}))
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.load_newest(tmp_path / "a", identity=IDENTITY)


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("ran"),)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "state.json"])
def test_a_pickle_in_place_of_a_file_or_beside_it_is_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "checkpoints"
    checkpoint.save(root, snapshot(1), identity=IDENTITY)
    newest = checkpoint.save(root, snapshot(2), identity=IDENTITY)
    (newest / file).write_bytes(pickle.dumps(Malicious()))
    loaded = checkpoint.load_newest(root, identity=IDENTITY)
    assert loaded is not None
    assert not (tmp_path / "ran").exists()
    pickle.loads((root / loaded_or_damaged(root, newest) / file).read_bytes())
    assert (tmp_path / "ran").exists(), "the file would have run if it had been unpickled"


def loaded_or_damaged(root: Path, newest: Path) -> str:
    return newest.name if newest.exists() else f"{newest.name}.damaged"


def test_a_pickle_whose_hash_the_manifest_names_is_refused_as_not_safetensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "checkpoints"
    path = checkpoint.save(root, snapshot(1), identity=IDENTITY) / "model.safetensors"
    path.write_bytes(pickle.dumps(Malicious()))
    manifest_path = path.with_name("manifest.json")
    manifest = json.loads(manifest_path.read_bytes())
    del manifest["sha256"]
    manifest["files"][path.name] = {"sha256": sha256_of(path), "size": path.stat().st_size}
    manifest_path.write_text(json.dumps({**manifest, "sha256": digest_of(manifest)}))
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.load_newest(root, identity=IDENTITY)
    assert not (tmp_path / "ran").exists()


def test_the_newest_is_the_one_of_the_highest_step_whatever_the_clock_says(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, snapshot(1), identity=IDENTITY)
    newest = checkpoint.save(tmp_path, snapshot(2), identity=IDENTITY)
    for path in (newest, *newest.iterdir()):
        os.utime(path, (0, 0))  # saved after the clock was set back to 1970
    loaded = checkpoint.load_newest(tmp_path, identity=IDENTITY)
    assert loaded is not None
    assert loaded.step == 2


def test_other_versions_of_torch_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint.save(tmp_path, snapshot(1), identity=IDENTITY)
    checkpoint.load_newest(tmp_path, identity=IDENTITY)
    assert caplog.text == ""
    monkeypatch.setattr(metadata, "version", lambda name: "9.9")
    checkpoint.load_newest(tmp_path, identity=IDENTITY)
    assert "this is 9.9" in caplog.text


def test_an_error_on_any_sync_leaves_the_older_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(tmp_path, snapshot(1), identity=IDENTITY)
    original, calls = os.fsync, 0

    def failing(at: int) -> Callable[[int], None]:
        def fsync(handle: int) -> None:
            nonlocal calls
            calls += 1
            if calls == at:
                raise OSError(errno.EIO, "Input/output error")
            original(handle)

        return fsync

    for at in range(1, 5):  # three files and the folder, before the checkpoint has its name
        calls = 0
        monkeypatch.setattr(os, "fsync", failing(at))
        with pytest.raises(OSError, match="Input/output"):
            checkpoint.save(tmp_path, snapshot(2), identity=IDENTITY)
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


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
