"""Writing and reading one shard of prepared images so that a half-written one never counts.

A shard is `<name>.npy` with the pixels (or `<name>.jpegs`, see `data.jpeg_shards`) and, written
after it, `<name>.json` with everything else.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

PixelFormat = Literal["raw", "jpeg"]
"""How pixels are stored: as they are, or as JPEG files that leave no mark (see `data.jpeg`)."""

SUFFIXES: dict[PixelFormat, str] = {"raw": ".npy", "jpeg": ".jpegs"}
"""Endings of the files that hold the pixels."""

TEMPORARY = ".tmp"
"""Ending of files that are being written; one that is found was left by a run cut off."""


@dataclass(frozen=True, slots=True)
class Skipped:
    """A source image that could not be used."""

    name: str
    """Its name in the source."""
    reason: str
    """What is wrong with it, in one line."""


@dataclass(frozen=True, slots=True)
class Shard:
    """What is known about one shard without opening its pixels."""

    name: str
    """File name without ending, such as `train-00000`."""
    made_from: str
    """Digest of the source's identity and the settings; another one means other pixels."""
    images: int
    """Images in it, `n`."""
    sha256: str
    """Of the file that holds the pixels, `(n, side, side, 3)` uint8."""
    size: int
    """Of that file, in bytes."""
    mtime_ns: int
    """When that file was last written, in nanoseconds since 1970."""
    labels: list[int] | None
    """One per image, or None if the source has no labels."""
    skipped: list[Skipped]
    """Source images left out of it."""
    hashes: str = ""
    """Perceptual hashes of the images, see `data.duplicates`; empty in shards of earlier versions,
    whose hashes are computed from the pixels when they are asked for."""


def pixels_path(directory: Path, name: str, pixel_format: PixelFormat) -> Path:
    """Return where the pixels of shard `name` lie."""
    return directory / f"{name}{SUFFIXES[pixel_format]}"


def record_path(directory: Path, name: str) -> Path:
    """Return where the description of shard `name` lies."""
    return directory / f"{name}.json"


def write_pixels(path: Path, images: Iterable[NDArray[np.uint8]], side: int, most: int) -> int:
    """Write images one after the other to a `.npy` file, whole or not at all.

    Only one image is in memory at a time. The header holds the number of images, which is known
    at the end; NumPy pads headers so that a smaller number fits in the same place.

    Args:
        path: The file to write.
        images: Arrays `(side, side, 3)`.
        side: Height and width, in pixels.
        most: Upper bound of the number of images.

    Returns:
        How many images there were.
    """
    count = 0
    with written_whole(path) as file:
        _write_header(file, most, side)
        for image in images:
            file.write(np.ascontiguousarray(image).data)
            count += 1
        file.seek(0)
        _write_header(file, count, side)
    return count


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that gets its name at the end of the `with` block, or never."""
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with temporary.open("wb") as file:
            yield file
            _flush_to_disk(file)
    except OSError:
        temporary.unlink(missing_ok=True)  # or a full disk stays full
        raise
    replace_durably(temporary, path)


def describe(
    path: Path,
    *,
    made_from: str,
    images: int,
    labels: list[int] | None,
    skipped: list[Skipped],
    hashes: str = "",
) -> Shard:
    """Return the description of the pixels just written at `path`, read back for the digest."""
    status = path.stat()
    return Shard(
        name=path.stem,
        made_from=made_from,
        images=images,
        sha256=file_sha256(path),
        size=status.st_size,
        mtime_ns=status.st_mtime_ns,
        labels=labels,
        skipped=skipped,
        hashes=hashes,
    )


def write_shard_record(directory: Path, shard: Shard) -> None:
    """Write the description of a shard, with its own digest; from now on the shard counts."""
    content = asdict(shard)
    write_json(record_path(directory, shard.name), {**content, "digest": digest_of(content)})


def read_shard(directory: Path, name: str, sha256: str | None = None) -> Shard | None:
    """Return the description of a finished shard, or None if there is none or it is damaged.

    Args:
        directory: Where it lies.
        name: Of the shard.
        sha256: What the manifest says of the file, if there is one; it spares working out the
            digest within.
    """
    try:
        written = record_path(directory, name).read_bytes()
        if sha256 is not None and hashlib.sha256(written).hexdigest() != sha256:
            return None
        content = json.loads(written)
        digest = content.pop("digest")
        if sha256 is None and digest != digest_of(content):
            return None
        skipped = [Skipped(**entry) for entry in content["skipped"]]
        return Shard(**{**content, "skipped": skipped})
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def digest_of(content: Any) -> str:
    """Return the SHA-256 of plain JSON values, as hex digits; the order of keys does not count."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, as hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    temporary = path.with_name(path.name + TEMPORARY)
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(content, file)
        _flush_to_disk(file)
    replace_durably(temporary, path)


def replace_durably(temporary: Path, path: Path) -> None:
    """Give a finished file its name, in a way that survives a power cut."""
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _write_header(file: Any, count: int, side: int) -> None:
    npy_format.write_array_header_1_0(
        file,
        {"descr": "|u1", "fortran_order": False, "shape": (count, side, side, 3)},
    )


def _flush_to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
