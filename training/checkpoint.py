"""Checkpoints that are complete or absent, and are verified before they are used.

A checkpoint is a directory `step-00001234/` of safetensors files and a `state.json`, with a
`manifest.json` that names every file's sha256 and size. It is written under a temporary name,
synced to disk and renamed, so a directory with the final name is whole. `torch.load` notices
neither a flipped bit nor a zeroed page in tensor bytes; the manifest does.
"""

import errno
import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from training.errors import CheckpointError
from training.stage_files import checkpoint_step, digest_of, sha256_of, sync_path

logger = logging.getLogger(__name__)

KEEP = 2
"""Checkpoints kept: the newest may be the one that a crash damages."""


@dataclass(frozen=True)
class Snapshot:
    """Everything that training goes on from.

    Attributes:
        step: Optimiser steps taken.
        evaluated: Whether the epoch that ends with this step has been evaluated.
        tensors: Groups (`model`, `optimizer`, `best`, `average`) of tensors by name; on the CPU
            once loaded.
        state: Plain values besides.
    """

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]
    evaluated: bool = False


PACKAGES = ("torch", "transformers")
"""Packages whose other versions may give other bytes; a checkpoint names those it was made with."""


class _DamagedError(Exception):
    """What is wrong with a checkpoint."""


def save(
    root: Path,
    snapshot: Snapshot,
    *,
    identity: Mapping[str, Any],
    made_with: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint, read it back, and remove the oldest beyond `KEEP`.

    Args:
        root: Folder of all checkpoints of one stage key.
        snapshot: What to save. Nothing but tensors and plain values, so nothing is unpickled.
        identity: What it belongs to; `load_newest` refuses it for anything else.
        made_with: What besides can change its bytes; `load_newest` warns where it is another.

    Returns:
        The checkpoint's directory. One that is there already is kept if it verifies.

    Raises:
        OSError: If it cannot be written; the older ones are kept.
        SafetensorError: The same, from the library that writes tensors.
        CheckpointError: If it cannot be read back as it was written; the older ones are kept.
    """
    if not root.is_dir():
        root.mkdir(parents=True)
        sync_path(root.parent)
    # An evaluated one does not stand in the way of the one made before the evaluation, nor the
    # other way round: no name is used twice.
    final = root / f"step-{snapshot.step:08d}{'-evaluated' if snapshot.evaluated else ''}"
    if final.exists():
        try:
            _verify(final)
        except _DamagedError:
            _set_aside(final)
        else:
            return final
    temporary = root / f".tmp-{uuid.uuid4().hex}"
    temporary.mkdir()
    try:
        for group, tensors in snapshot.tensors.items():
            on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(on_cpu, temporary / f"{group}.safetensors")
        _write_json(temporary / "state.json", {"step": snapshot.step, **snapshot.state})
        files = {
            path.name: {"sha256": sha256_of(path), "size": path.stat().st_size}
            for path in sorted(temporary.iterdir())
        }
        manifest = {
            "step": snapshot.step,
            "identity": dict(identity),
            "made_with": _made_with(made_with),
            "files": files,
        }
        # Its own digest besides, or a flipped bit in the manifest would pass.
        _write_json(temporary / "manifest.json", {**manifest, "sha256": digest_of(manifest)})
        for path in temporary.iterdir():
            _sync(path)
        sync_path(temporary)
        temporary.rename(final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_path(root)
    try:
        _verify(final)
    except _DamagedError as damage:
        aside = _set_aside(final)
        raise CheckpointError(
            f"A checkpoint must read back as it was written, {aside} does not: {damage}. Check "
            "the disk; the older checkpoints are kept."
        ) from damage
    _prune(root)
    return final


def load_newest(
    root: Path, *, identity: Mapping[str, Any], made_with: Mapping[str, Any] | None = None
) -> Snapshot | None:
    """Load the newest checkpoint that verifies; damaged ones are renamed and reported.

    Args:
        root: Folder of all checkpoints of one stage key.
        identity: What the checkpoint must belong to.
        made_with: As given to `save`; a difference is a warning.

    Returns:
        The snapshot, or None where there has never been a checkpoint.

    Raises:
        CheckpointError: If all are damaged, or the newest sound one belongs to something else.
        OSError: If one cannot be read for another reason than damage (rights, open files).
    """
    for leftover in root.glob(".tmp-*"):  # of a writer that was killed; the lock is ours
        shutil.rmtree(leftover, ignore_errors=True)
    set_aside = sorted(path.name for path in root.glob("step-*.damaged*"))
    for directory in _newest_first(root):
        try:
            manifest = _verify(directory)
            _check_identity(directory, manifest["identity"], identity)
            snapshot = _read(directory, manifest)
        except _DamagedError as damage:
            logger.warning("Checkpoint %s is damaged (%s): set aside.", directory.name, damage)
            set_aside.append(_set_aside(directory).name)
            continue
        _warn_of_differences(directory, manifest["made_with"], _made_with(made_with))
        return snapshot
    if set_aside:
        raise CheckpointError(
            f"At least one checkpoint must be sound, but all under {root} are damaged "
            f"({', '.join(set_aside)}). Restore one from a backup, or remove {root} to start "
            "from the beginning."
        )
    return None


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimiser's state by parameter name: `<parameter>/<what>`."""
    return {
        f"{name}/{what}": tensor
        for name, parameter in model.named_parameters()
        for what, tensor in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` returned. The learning rate is set by the step."""
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        parameter_name, _, what = name.rpartition("/")
        parameter = parameters[parameter_name]
        # AdamW counts its steps on the CPU unless it is fused on a GPU.
        place = parameter.device if what != "step" or _fused(optimizer) else torch.device("cpu")
        # A copy: what was loaded is mapped from the file, which will be pruned one day.
        optimizer.state[parameter][what] = tensor.to(place, copy=True)


def _fused(optimizer: torch.optim.Optimizer) -> bool:
    return bool(optimizer.defaults.get("fused"))


def _newest_first(root: Path) -> Iterator[Path]:
    # By step; of two of the same step the evaluated one is newer, and has the longer name.
    found = [path for path in root.glob("step-*") if checkpoint_step(path) is not None]
    yield from sorted(found, reverse=True)


def _verify(directory: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint whose files are all as it says."""
    try:
        manifest: dict[str, Any] = json.loads((directory / "manifest.json").read_bytes())
        if manifest.pop("sha256") != digest_of(manifest):
            raise _DamagedError("manifest.json is not as it was written")
        for name, record in manifest["files"].items():
            if Path(name).name != name:
                raise _DamagedError(f"its manifest names {name}, which is not one of its files")
            path = directory / name
            if path.stat().st_size != record["size"] or sha256_of(path) != record["sha256"]:
                raise _DamagedError(f"{name} is not as it was written")
    except FileNotFoundError as error:
        raise _DamagedError(f"{Path(error.filename).name} is gone") from error
    except OSError as error:
        if error.errno != errno.EIO:  # rights, too many open files: it may be sound all the same
            raise
        raise _DamagedError(str(error)) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _DamagedError(f"its manifest cannot be read: {error}") from error
    return manifest


def _read(directory: Path, manifest: Mapping[str, Any]) -> Snapshot:
    try:
        # Only what the manifest names: what somebody put beside it was not verified.
        tensors = {
            Path(name).stem: load_file(directory / name)
            for name in manifest["files"]
            if name.endswith(".safetensors")
        }
    except SafetensorError as error:  # made by something else than `save`
        raise _DamagedError(str(error)) from error
    state = json.loads((directory / "state.json").read_bytes())
    evaluated = directory.name.endswith("-evaluated")
    return Snapshot(step=state.pop("step"), tensors=tensors, state=state, evaluated=evaluated)


def _set_aside(directory: Path) -> Path:
    target = directory.with_name(f"{directory.name}.damaged")
    count = 1
    while target.exists():
        count += 1
        target = directory.with_name(f"{directory.name}.damaged-{count}")
    directory.rename(target)
    return target


def _check_identity(directory: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    differences = [
        f"{name} is {found.get(name)!r} there and {expected.get(name)!r} here"
        for name in sorted({*found, *expected})
        if found.get(name) != expected.get(name)
    ]
    if differences:
        raise CheckpointError(
            f"A checkpoint must belong to the stage that resumes from it, {directory} does not: "
            f"{'; '.join(differences)}. Move it away to start without it."
        )


def _made_with(given: Mapping[str, Any] | None) -> dict[str, Any]:
    return {**{name: metadata.version(name) for name in PACKAGES}, **(given or {})}


def _warn_of_differences(
    directory: Path, found: Mapping[str, Any], here: Mapping[str, Any]
) -> None:
    for name in sorted(found):  # what was not recorded then is not known
        if found.get(name) != here.get(name):
            logger.warning(
                "%s was saved with %s %s, this is %s: the final bytes may differ from those of an "
                "undisturbed run.",
                directory.name,
                name,
                found.get(name),
                here.get(name),
            )


def _prune(root: Path) -> None:
    for directory in list(_newest_first(root))[KEEP:]:
        try:
            shutil.rmtree(directory)
        except OSError as error:
            logger.warning("The old checkpoint %s cannot be removed: %s", directory, error)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True), encoding="utf-8")


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
