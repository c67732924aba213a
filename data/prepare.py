"""Decode a source once into arrays that training can map into memory.

What is written, per split: shards `train-00000.npy`, `(n, side, side, 3)` uint8, each with a
`train-00000.json` beside it that is written after it and makes it count. Last of all comes
`manifest.json`. A preparation that was cut off goes on after its last whole shard.
"""

import errno
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data import manifest
from data.decode import UndecodableError
from data.decoding_pool import Decoded, decoding_pool
from data.duplicates import hashes_to_text, perceptual_hashes
from data.manifest import Manifest
from data.records import DatasetError, Record, Source, Split, printable
from data.shards import (
    TEMPORARY,
    Shard,
    Skipped,
    describe,
    digest_of,
    file_sha256,
    pixels_path,
    read_shard,
    write_pixels,
    write_shard_record,
)

SHARD_IMAGES = 4096
"""Source images per shard: 315 MB at 160 px, few enough to lose little when cut off."""

_GIB = 2**30
_log = logging.getLogger(__name__)


def estimate_bytes(source: Source, side: int) -> int:
    """Return how much disk space the prepared images of `source` take, in bytes."""
    return sum(source.counts.values()) * _image_bytes(side)


def prepare(
    source: Source,
    directory: Path,
    *,
    side: int,
    report: Callable[[int, int], None],
    workers: int,
    max_skipped: float = 0.01,
) -> Manifest:
    """Decode, crop and shrink every image of `source` into `directory`.

    Whole shards that are there already, from the same source and settings, are kept: of an
    unfinished directory by size and time, of a finished one by SHA-256. Memory does
    not grow with the number of images. Only one preparation may write to a directory at a time.

    Args:
        source: Where the images come from.
        directory: Made if missing.
        side: Height and width of the prepared images, in pixels.
        report: Called in this thread after every image with the number of images done and in all;
            the first call counts what was kept.
        workers: Threads that decode.
        max_skipped: Largest fraction of images, in [0, 1], that may be set aside because they
            cannot be decoded. Each is recorded with its reason.

    Returns:
        The manifest, as written.

    Raises:
        DatasetError: If the disk is too small, too many images cannot be decoded, the source
            changes meanwhile, or an image lacks its label.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in directory.glob(f"*{TEMPORARY}"):
        leftover.unlink()
    settings = {"side": side, "shard_images": SHARD_IMAGES, "format": manifest.FORMAT}
    made_from = digest_of([source.identity(), settings])
    plan = [
        _Part(split, first, min(SHARD_IMAGES, count - first))
        for split, count in source.counts.items()
        for first in range(0, count, SHARD_IMAGES)
    ]
    # Whoever prepares a finished directory again has found something wrong with it.
    suspect = (directory / manifest.FILE_NAME).exists()
    finished = {part: _kept(directory, part, made_from, suspect=suspect) for part in plan}
    missing = [part for part in plan if finished[part] is None]
    _check_disk(directory, sum(part.count for part in missing) * _image_bytes(side))

    total = sum(source.counts.values())
    tally = _Tally(total, total - sum(part.count for part in missing), report, max_skipped)
    for shard in finished.values():
        tally.skipped += shard.skipped if shard else []
    tally.check()
    shards: dict[Split, list[Shard]] = {split: [] for split in source.counts}
    with decoding_pool(workers) as pool:
        reader = _Reader(source)
        for part in plan:
            shard = finished[part]
            if shard is None:
                images = pool.decode(reader.read(part), side)
                shard = _write(directory, part, images, side, made_from, tally, source)
            shards[part.split].append(shard)
    result = manifest.build(
        directory, shards, side=side, class_names=source.class_names, made_from=made_from
    )
    manifest.write(directory, result)
    if result.skipped:
        first = result.skipped[0]
        _log.warning(
            "Set aside %d images that cannot be decoded, such as %s: %s",
            len(result.skipped),
            first.name,
            first.reason,
        )
    return result


@dataclass(frozen=True, slots=True)
class _Part:
    """The source images that go into one shard."""

    split: Split
    first: int
    count: int

    @property
    def name(self) -> str:
        return f"{self.split}-{self.first // SHARD_IMAGES:05d}"


@dataclass(slots=True)
class _Tally:
    """Counts what was done, reports it and stops when too much went wrong."""

    total: int
    done: int
    report: Callable[[int, int], None]
    max_skipped: float
    skipped: list[Skipped] = field(default_factory=list)

    def count(self) -> None:
        self.done += 1
        self.report(self.done, self.total)

    def check(self) -> None:
        if self.skipped:
            self._check_skipped()
        self.report(self.done, self.total)

    def skip(self, name: str, reason: str) -> None:
        self.skipped.append(Skipped(name, reason))
        self._check_skipped()

    def _check_skipped(self) -> None:
        if len(self.skipped) <= self.max_skipped * self.total:
            return
        first = "\n".join(f"  {each.name}: {each.reason}" for each in self.skipped[:10])
        raise DatasetError(
            f"At most {self.max_skipped:.1%} of the {self.total} images may be unreadable, "
            f"{len(self.skipped)} are so far. Repair or remove them, or raise data.max_skipped. "
            f"The first:\n{first}"
        )


class _Reader:
    """Reads on where the last part ended, and jumps where parts were kept."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._records: Iterator[Record] = iter(())
        self._next: tuple[Split, int] | None = None

    def read(self, part: _Part) -> Iterator[Record]:
        if self._next != (part.split, part.first):
            self._records = self._source.records(part.split, part.first)
        self._next = (part.split, part.first + part.count)
        return islice(self._records, part.count)


def _write(
    directory: Path,
    part: _Part,
    images: Iterator[Decoded],
    side: int,
    made_from: str,
    tally: _Tally,
    source: Source,
) -> Shard:
    labels: list[int] = []
    hashes: list[NDArray[np.uint64]] = []
    skipped_before = len(tally.skipped)

    def usable() -> Iterator[NDArray[np.uint8]]:
        for record, image in images:
            if isinstance(image, UndecodableError):
                tally.skip(printable(record.name), str(image))
            else:
                if source.class_names is not None:
                    labels.append(_label(record, len(source.class_names)))
                hashes.append(perceptual_hashes(image[None]))
                yield image
            tally.count()

    path = pixels_path(directory, part.name)
    try:
        count = write_pixels(path, usable(), side, most=part.count)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise DatasetError(
            f"The disk of {directory} is full. Free some space and run the same command again; "
            "finished parts are kept."
        ) from error
    skipped = tally.skipped[skipped_before:]
    if count + len(skipped) != part.count:
        raise DatasetError(
            f"{source.spec} must not change while it is read: {part.name} should have "
            f"{part.count} images, got {count + len(skipped)}. Run the same command again."
        )
    shard = describe(
        path,
        made_from=made_from,
        images=count,
        labels=None if source.class_names is None else labels,
        skipped=skipped,
        hashes=hashes_to_text(hashes),
    )
    write_shard_record(directory, shard)
    return shard


def _label(record: Record, num_classes: int) -> int:
    if record.label is None or not 0 <= record.label < num_classes:
        raise DatasetError(
            f"Every image of a labelled source needs a label in 0 to {num_classes - 1}, "
            f"{printable(record.name)} has {record.label}. Remove such images, or all labels."
        )
    return record.label


def _kept(directory: Path, part: _Part, made_from: str, *, suspect: bool) -> Shard | None:
    """Return the shard of an earlier attempt, if it is whole and made from the same."""
    shard = read_shard(directory, part.name)
    path = pixels_path(directory, part.name)
    if shard is None or shard.made_from != made_from or not path.is_file():
        return None
    status = path.stat()
    if status.st_size != shard.size:
        return None
    touched = status.st_mtime_ns != shard.mtime_ns
    if (suspect or touched) and file_sha256(path) != shard.sha256:
        return None
    if touched:
        shard = replace(shard, mtime_ns=status.st_mtime_ns)
        write_shard_record(directory, shard)
    return shard


def _image_bytes(side: int) -> int:
    return 3 * side * side + 8  # pixels, and the label in JSON


def _check_disk(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise DatasetError(
            f"Preparing the images needs {needed / _GIB:.1f} GiB, the disk of {directory} has "
            f"{free / _GIB:.1f} GiB free. Free some space, choose another --outputs directory, or "
            "prepare smaller images."
        )
