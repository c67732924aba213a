"""Prepared images, mapped into memory.

Dimension key: N = images asked for, S = their side in pixels.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data import manifest
from data.duplicates import WORDS, hashes_from_text, perceptual_hashes
from data.jpeg_shards import JpegShard
from data.manifest import Fingerprint, Manifest, ShardEntry
from data.processors import available_processors
from data.records import DatasetError
from data.shards import PixelFormat, file_sha256, pixels_path, read_shard, record_path

ShardPixels = NDArray[np.uint8] | JpegShard
"""The images of one shard, `(n, S, S, 3)`: mapped into memory, or decoded when asked for."""

MOST_THREADS = 8
"""Threads that decode a batch of JPEG images, at most; beyond it Python's own lock limits them."""


class PreparedSplit:
    """All prepared images of one split, read from disk as they are asked for."""

    labels: NDArray[np.int64] | None
    """`(len(self),)`, or None if the source has no labels."""

    def __init__(
        self,
        shards: Sequence[ShardPixels],
        labels: NDArray[np.int64] | None,
        hashes: Sequence[str] = (),
    ) -> None:
        self._shards = shards
        self._hashes = hashes or [""] * len(shards)
        decoded = any(isinstance(shard, JpegShard) for shard in shards)
        self._threads = min(available_processors(), MOST_THREADS) if decoded else 1
        self._firsts = np.cumsum([0, *(len(shard) for shard in shards)])
        self.labels = labels

    def __len__(self) -> int:
        return int(self._firsts[-1])

    @property
    def side(self) -> int:
        """Height and width of the images, in pixels."""
        return int(self._shards[0].shape[1])

    def hashes(self) -> NDArray[np.uint64]:
        """Return the perceptual hashes of all images, `(len(self), 2)`; see `data.duplicates`."""
        parts = [np.empty((0, WORDS), dtype=np.uint64)]
        for text, first, last in zip(self._hashes, self._firsts, self._firsts[1:], strict=False):
            if text or first == last:
                parts.append(hashes_from_text(text))
                continue
            # Prepared by an earlier version: read the pixels, some at a time.
            for start in range(first, last, 256):
                images = self.gather(np.arange(start, min(start + 256, last)))
                parts.append(perceptual_hashes(images))
        return np.concatenate(parts)

    def gather(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return the images with these numbers, `(N, S, S, 3)`, in the order asked for.

        Raises:
            IndexError: If a number is not in `[0, len(self))`.
        """
        indices = np.asarray(indices, dtype=np.int64)
        if indices.size and not (indices.min() >= 0 and indices.max() < len(self)):
            raise IndexError(
                f"Images are numbered 0 to {len(self) - 1}, asked for {indices.min()} to "
                f"{indices.max()}."
            )
        out = np.empty((len(indices), self.side, self.side, 3), dtype=np.uint8)
        if self._threads == 1:
            self._fill(out, indices)
            return out
        # Any division gives the same bytes: each image goes to its own place.
        parts = (np.array_split(out, self._threads), np.array_split(indices, self._threads))
        with ThreadPoolExecutor(self._threads, thread_name_prefix="decode") as pool:
            list(pool.map(self._fill, *parts))  # raises what they raised
        return out

    def _fill(self, out: NDArray[np.uint8], indices: NDArray[np.int64]) -> None:
        shard_numbers = np.searchsorted(self._firsts, indices, side="right") - 1
        for number in np.unique(shard_numbers):
            here = np.flatnonzero(shard_numbers == number)
            out[here] = self._shards[number][indices[here] - self._firsts[number]]


class PreparedData:
    """A finished prepared directory."""

    def __init__(
        self,
        *,
        train: PreparedSplit,
        test: PreparedSplit | None,
        fingerprint: str,
        class_names: list[str] | None,
    ) -> None:
        self.train = train
        self.test = test
        self.fingerprint = fingerprint
        self.class_names = class_names

    @classmethod
    def open(cls, directory: Path) -> "PreparedData":
        """Open a directory that `data.prepare` has finished.

        Checks only that all files are there and long enough; see `verify`.

        Raises:
            DatasetError: If it is not finished, or a file is missing or cut short.
        """
        found = manifest.read(directory)
        splits = {
            split: _open_split(directory, found, group) for split, group in found.shards.items()
        }
        names = found.class_names
        return cls(
            train=splits["train"],
            test=splits.get("test"),
            fingerprint=found.fingerprint,
            class_names=None if names is None else list(names),
        )


def verify(directory: Path, full: bool) -> str | None:
    """Tell whether a prepared directory is as it was written.

    Args:
        directory: What `data.prepare` wrote.
        full: Read all pixels and compare SHA-256; otherwise compare sizes and times.

    Returns:
        None if it is sound, else the first thing that is wrong, in one line.
    """
    try:
        found = manifest.read(directory)
    except DatasetError as error:
        return str(error)
    fingerprint = Fingerprint(found.side, found.class_names, found.pixel_format)
    for split, group in sorted(found.shards.items()):
        fingerprint.begin(split, len(group))
        for entry in group:
            reason = _what_is_wrong(directory, entry, found.pixel_format, full=full)
            if reason is not None:
                return reason
            shard = read_shard(directory, entry.name, entry.record_sha256)
            if shard is None:
                return f"{entry.name}.json cannot be read"
            fingerprint.add(shard)
    if fingerprint.hexdigest() != found.fingerprint:
        return f"{manifest.FILE_NAME} was edited: its fingerprint is not that of its parts"
    return None


def _what_is_wrong(
    directory: Path, entry: ShardEntry, pixel_format: PixelFormat, *, full: bool
) -> str | None:
    pixels = pixels_path(directory, entry.name, pixel_format)
    record = record_path(directory, entry.name)
    for path in (pixels, record):
        if not path.is_file():
            return f"{path.name} is missing"
    if file_sha256(record) != entry.record_sha256:
        return f"{record.name} has changed"
    status = pixels.stat()
    if status.st_size != entry.size:
        return f"{pixels.name} has {status.st_size} bytes instead of {entry.size}"
    if full:
        return f"{pixels.name} has other pixels" if file_sha256(pixels) != entry.sha256 else None
    if status.st_mtime_ns != entry.mtime_ns:
        return f"{pixels.name} was written to, or copied without its time, since it was prepared"
    return None


def _open_split(directory: Path, found: Manifest, entries: Sequence[ShardEntry]) -> PreparedSplit:
    pixels: list[ShardPixels] = []
    labels, hashes = [], []
    for entry in entries:
        shard = read_shard(directory, entry.name, entry.record_sha256)
        path = pixels_path(directory, entry.name, found.pixel_format)
        try:
            if found.pixel_format == "jpeg":
                pixels.append(JpegShard(path, entry.images, found.side))
            else:
                pixels.append(np.load(path, mmap_mode="r"))
        except (OSError, ValueError, EOFError) as error:
            raise _damaged(path, error) from error
        if shard is None or len(pixels[-1]) != entry.images:
            raise _damaged(path, "it does not fit its description")
        labels.append(shard.labels)
        hashes.append(shard.hashes)
    if any(group is None for group in labels):
        return PreparedSplit(pixels, None, hashes)
    known = np.concatenate([np.asarray(group, dtype=np.int64) for group in labels])
    return PreparedSplit(pixels, known, hashes)


def _damaged(path: Path, cause: object) -> DatasetError:
    return DatasetError(
        f"{path} must be a whole shard of prepared images: {cause}. Delete {manifest.FILE_NAME} "
        "beside it and run the prepare-data stage, which keeps the sound parts."
    )
