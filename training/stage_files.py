"""The files in a stage's directory: their names, their digests, and what it takes to keep them."""

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from safetensors import SafetensorError

MODEL = "model"
"""Folder of the model that a stage made, in transformers' format."""

CHECKPOINTS = "checkpoints"
"""Folder of a stage's checkpoints, one `step-…` directory each."""

HARDWARE = "hardware.json"
"""What a stage computes on, decided by its first attempt."""

KEEP_TOKENS = "keep_tokens.json"
"""Whether a stage keeps what frozen blocks make of its images, decided by its first attempt."""

TRACKING = "wandb"
"""Folder of what is on its way to W&B, below a stage's directory; no part of its result."""

NOT_FETCHED = "not-fetched.json"
"""File of a finished stage whose files are at the address of the outputs, and perhaps not here; it
names them, and the result that they belong to. See `training.remote_outputs`."""

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says when a file cannot grow: no space, a quota, a limit of the process."""


LARGE_BYTES = 2**26
"""Arrays (`.npy`) of this size are verified by size and time stamp, and hashed only where the
latter is another one, as prepared images are: hashing takes a second per gigabyte, and a cached run
looks at every stage."""


class OutputsError(ValueError):
    """The outputs folder cannot be used."""


class FileRecord(BaseModel):
    """What a file must look like to be the one that the stage made."""

    sha256: str
    size: int
    modified_ns: int | None = None
    """Time stamp of a large file: while it stands, the file is not hashed at every look."""


def checkpoint_step(path: Path) -> int | None:
    """Step of a checkpoint by the name of its directory; None if it is not a checkpoint's."""
    found = re.fullmatch(r"step-(\d+)(-evaluated)?", path.name)
    return int(found[1]) if found else None


def newest_step(directory: Path) -> int | None:
    """Step of the newest checkpoint in a stage's directory; it has not been verified."""
    newest = newest_checkpoint(directory)
    return None if newest is None else checkpoint_step(newest)


def newest_checkpoint(directory: Path) -> Path | None:
    """Return the newest checkpoint in a stage's directory; it has not been verified."""
    found = (directory / CHECKPOINTS).glob("step-*")
    # By name: steps have leading zeros, and of two of a step the evaluated one is the newer.
    return max((path for path in found if checkpoint_step(path) is not None), default=None)


def lies_elsewhere(directory: Path) -> bool:
    """Whether what a finished stage made is at the address of the outputs, and perhaps not here."""
    try:
        marker = json.loads((directory / NOT_FETCHED).read_bytes())
        return bool(marker["result"] == sha256_of(directory / "result.json"))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def sync_files(directory: Path, names: Sequence[str]) -> None:
    """Make files and folders below a stage's directory durable."""
    for name in names:
        root = directory / name
        for path in (root, *root.rglob("*"), root.parent):
            sync_path(path)


@contextmanager
def full_disk_explained(outputs: Path) -> Iterator[None]:
    """Turn an error that says that there is no space into one that says what to do.

    Raises:
        OutputsError: If the `with` block failed for lack of space.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not _is_full_disk(error):
            raise
        raise OutputsError(
            f"The disk of {outputs} is full. Free some space and run the same command again; "
            "what is finished is kept."
        ) from error


def _is_full_disk(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in FULL_DISK
    # safetensors writes files itself and passes the error on as text.
    return any(f"os error {number})" in str(error) for number in FULL_DISK)


def record_files(directory: Path, names: list[str]) -> dict[str, FileRecord]:
    """Hash files, and all files of folders, below a stage's directory."""
    records = {}
    for name in names:
        root = directory / name
        paths = sorted(path for path in root.rglob("*") if path.is_file()) or [root]
        for path in paths:
            status = path.stat()
            records[path.relative_to(directory).as_posix()] = FileRecord(
                sha256=sha256_of(path),
                size=status.st_size,
                modified_ns=status.st_mtime_ns if _is_large_array(path, status.st_size) else None,
            )
    return records


def _is_large_array(path: Path, size: int) -> bool:
    return path.suffix == ".npy" and size >= LARGE_BYTES


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_bytes(content: bytes) -> str:
    """Return the sha256 of bytes, in hex."""
    return hashlib.sha256(content).hexdigest()


def digest_of(value: Any) -> str:
    """Return the sha256, in hex, of a plain value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def sync_path(path: Path) -> None:
    """Make the content of a file, or the names in a directory, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
