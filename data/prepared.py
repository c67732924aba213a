"""Prepared images, mapped into memory.

Dimension key: N = images asked for, S = their side in pixels.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data import manifest, pushed_shards
from data.duplicates import WORDS, hashes_from_text, hashes_to_text, perceptual_hashes
from data.jpeg_shards import JpegShard
from data.manifest import Fingerprint, Manifest, ShardEntry
from data.patience import Patience, Stop, never
from data.processors import available_processors
from data.pushed_shards import Pushed
from data.records import DatasetError, Split
from data.remote_files import sha256_at
from data.remote_pixels import FILL_FROM, RemotePixels, RemoteShard
from data.shards import PixelFormat, file_sha256, pixels_path, read_shard, record_path

ShardPixels = NDArray[np.uint8] | JpegShard | RemotePixels
"""The images of one shard, `(n, S, S, 3)`: mapped into memory, or decoded when asked for; or of all
shards of a split, fetched when asked for."""

MOST_THREADS = 8
"""Threads that decode a batch of JPEG images, or hold remote ones against their digests, at most;
beyond it Python's own lock limits them."""


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
        mapped = all(isinstance(shard, np.ndarray) for shard in shards)
        self._threads = 1 if mapped else min(available_processors(), MOST_THREADS)
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

    @contextmanager
    def announced(self, groups: Iterable[NDArray[np.int64]], *, share: float) -> Iterator[None]:
        """Say what will be gathered in the `with` block; what lies elsewhere is fetched ahead.

        Args:
            groups: The numbers that will be asked for together, in the order in which they will be.
            share: Part of the split's images, in [0, 1], that are read sooner or later.
        """
        with ExitStack() as stack:
            for shard in self._shards:
                if isinstance(shard, RemotePixels):  # the only one, then
                    stack.enter_context(shard.announced(groups, fill=share >= FILL_FROM))
            yield

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
    def open(cls, directory: Path, stop: Stop = never) -> "PreparedData":
        """Open a directory that `data.prepare` has finished.

        Checks only that all files are there and long enough; see `verify`. Where pixels are not
        there, and the directory was pushed to an address, they are read from the address.

        Args:
            directory: What `data.prepare` wrote, or `data.pushed_shards.take`.
            stop: Asked while images at an address are waited for; true ends it with
                `InterruptedError`.

        Raises:
            DatasetError: If it is not finished, or a file is missing or cut short.
        """
        found = manifest.read(directory)
        pushed = _pushed_away(directory, found)
        splits = {
            split: _open_split(directory, found, group)
            if pushed is None
            else _open_pushed(directory, found, split, pushed, stop)
            for split, group in found.shards.items()
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
        full: Read all pixels and compare SHA-256, also of those that are at an address; otherwise
            compare sizes and times, and ask nobody.

    Returns:
        None if it is sound, else the first thing that is wrong, in one line.
    """
    try:
        found = manifest.read(directory)
        pushed = _pushed_away(directory, found)
    except DatasetError as error:
        return str(error)
    fingerprint = Fingerprint(found.side, found.class_names, found.pixel_format)
    for split, group in sorted(found.shards.items()):
        fingerprint.begin(split, len(group))
        for entry in group:
            reason = _what_is_wrong(directory, entry, found.pixel_format, pushed, full=full)
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
    directory: Path,
    entry: ShardEntry,
    pixel_format: PixelFormat,
    pushed: Pushed | None,
    *,
    full: bool,
) -> str | None:
    pixels = pixels_path(directory, entry.name, pixel_format)
    record = record_path(directory, entry.name)
    for path in (record,) if pushed else (pixels, record):
        if not path.is_file():
            return f"{path.name} is missing"
    if file_sha256(record) != entry.record_sha256:
        return f"{record.name} has changed"
    if pushed:
        index = pushed_shards.read_index(directory, entry.name, pushed)
        if index is None or len(index) != entry.images + 1:
            return (
                f"{pushed_shards.index_path(directory, entry.name).name} is missing or has changed"
            )
        if full and sha256_at(pushed.url(entry, pixel_format), Patience()) != entry.sha256:
            return f"{pixels.name} has other pixels at {pushed.address}"
        return None
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
    return PreparedSplit(pixels, _labels(labels), hashes)


def _damaged(path: Path, cause: object) -> DatasetError:
    return DatasetError(
        f"{path} must be a whole shard of prepared images: {cause}. Delete {manifest.FILE_NAME} "
        "beside it and run the prepare-data stage, which keeps the sound parts."
    )


def _pushed_away(directory: Path, found: Manifest) -> Pushed | None:
    """Say where the pixels are, if some are not here and they were pushed to an address."""
    pushed = pushed_shards.read(directory)
    entries = found.entries
    if pushed is None or all(
        pixels_path(directory, entry.name, found.pixel_format).is_file() for entry in entries
    ):
        return None
    if pushed.fingerprint != found.fingerprint:
        raise DatasetError(
            f"{directory / pushed_shards.FILE_NAME} must be of these images, it is of others. "
            "Delete it and run the prepare-data stage."
        )
    return pushed


def _open_pushed(
    directory: Path, found: Manifest, split: Split, pushed: Pushed, stop: Stop
) -> PreparedSplit:
    remote, labels, hashes = [], [], []
    for entry in found.shards[split]:
        shard = read_shard(directory, entry.name, entry.record_sha256)
        index = pushed_shards.read_index(directory, entry.name, pushed)
        if shard is None or index is None or len(index) != entry.images + 1:
            raise _damaged(record_path(directory, entry.name), "it does not fit what was pushed")
        remote.append(RemoteShard(pushed.url(entry, found.pixel_format), index))
        labels.append(shard.labels)
        hashes.append(shard.hashes)
    pixels = RemotePixels(
        remote,
        name=f"{found.fingerprint[:16]}-{split}",
        side=found.side,
        pixel_format=found.pixel_format,
        stop=stop,
    )
    # They are the hashes of one shard now, of which either all are known or none.
    known = hashes_to_text([hashes_from_text(text) for text in hashes]) if all(hashes) else ""
    return PreparedSplit([pixels], _labels(labels), [known])


def _labels(groups: Sequence[list[int] | None]) -> NDArray[np.int64] | None:
    known = [np.asarray(group, dtype=np.int64) for group in groups if group is not None]
    return np.concatenate(known) if len(known) == len(groups) else None
