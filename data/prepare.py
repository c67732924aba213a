"""Decode a source once into arrays that training can map into memory.

What is written, per split: shards `train-00000.npy`, `(n, side, side, 3)` uint8 (or
`train-00000.jpegs`, see `data.jpeg_shards`), each with a `train-00000.json` beside it that is
written after it and makes it count. Last of all comes `manifest.json`. A preparation that was cut
off goes on after its last whole shard.

One process leads (`prepare`), others may help (`Helper`): they claim the shards one by one, see
`data.claims`. The bytes do not depend on who makes which.
"""

import errno
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from numpy.typing import NDArray
from PIL import features

from data import jpeg, manifest
from data.claims import POLL_SECONDS, Claims, Plan
from data.decode import UndecodableError
from data.decoding_pool import DecodingPool, decoding_pool
from data.disk_space import check_disk
from data.duplicates import hashes_to_text, perceptual_hashes
from data.jpeg_shards import write_jpegs
from data.manifest import Manifest
from data.parts import Part, PartsLeft, parts_of
from data.records import DatasetError, Record, Source, Split, printable
from data.shards import (
    SUFFIXES,
    TEMPORARY,
    PixelFormat,
    Shard,
    Skipped,
    describe,
    digest_of,
    file_sha256,
    pixels_path,
    read_shard,
    record_path,
    write_pixels,
    write_shard_record,
)

SHARD_IMAGES = 4096
"""Source images per shard: 315 MB at 160 px, few enough to lose little when cut off."""

HASHED_AT_ONCE = 64
"""Images whose perceptual hashes are computed together."""

_log = logging.getLogger(__name__)


def prepare(
    source: Source,
    directory: Path,
    *,
    side: int,
    report: Callable[[int, int], None],
    workers: int,
    max_skipped: float = 0.01,
    pixel_format: PixelFormat = "raw",
    suspect: bool | None = None,
) -> Manifest:
    """Decode, crop and shrink every image of `source` into `directory`.

    Whole shards that are there already, from the same source and settings, are kept: by size and
    time, of a directory that is suspect by SHA-256. Memory does not grow with the number of
    images. Only one process at a time may do this to a directory; others help.

    Args:
        source: Where the images come from.
        directory: Made if missing.
        side: Height and width of the prepared images, in pixels.
        report: Called in this thread after every image, and while others are waited for, with the
            number of images done and in all. What was kept counts, and so do the finished shards
            of others.
        workers: Threads that decode: of all processes together that share this one's processors.
        max_skipped: Largest fraction of images, in [0, 1], that may be set aside because they
            cannot be decoded. Each is recorded with its reason.
        pixel_format: How the pixels are stored; `jpeg` needs an even `side`.
        suspect: Whether damage was found here, so that no shard is trusted by size and time.
            None: where the directory is finished, as nobody prepares it again without a reason.

    Returns:
        The manifest, as written.

    Raises:
        DatasetError: If the disk is too small, too many images cannot be decoded, the source
            changes meanwhile, an image lacks its label, images of this side cannot be stored as
            asked, or `directory` holds images stored otherwise.
    """
    if pixel_format == "jpeg":
        jpeg.check_side(side)
    directory.mkdir(parents=True, exist_ok=True)
    total = sum(source.counts.values())
    claims = Claims(directory)
    claims.end(waiting=lambda: report(0, total))  # those who helped one that was killed
    for leftover in directory.glob(f"*{TEMPORARY}"):
        leftover.unlink()
    _refuse_other_formats(directory, pixel_format)
    made_from = digest_of_origin(source, side, pixel_format)
    parts = parts_of(source.counts, SHARD_IMAGES)
    if suspect is None:
        suspect = (directory / manifest.FILE_NAME).exists()
    target = _Target(directory, side, pixel_format, made_from)
    # Not the shards themselves: their labels would fill memory.
    kept: set[Part] = set()
    kept_bytes, skipped = 0, []
    for part in parts:
        shard = _kept(target, part, suspect=suspect)
        if shard is not None:
            kept.add(part)
            kept_bytes += shard.size
            skipped += shard.skipped
        else:  # what there is of it counts no more, for those who help either
            record_path(directory, part.name).unlink(missing_ok=True)
    done = sum(part.count for part in kept)
    if done < total:
        check_disk(
            source,
            directory,
            side=side,
            pixel_format=pixel_format,
            done=done,
            done_bytes=kept_bytes,
        )

    tally = _Tally(total, done, report, max_skipped, skipped)
    tally.check()
    plan = claims.invite({**_tools(), "made_from": made_from, "counts": dict(source.counts)})
    left = PartsLeft([part for part in parts if part not in kept], claims, plan, leads=True)
    try:
        _make(left, target, lambda: source, tally, workers)
        while left:  # others are at work on them, or have been killed
            tally.check()
            time.sleep(POLL_SECONDS)
            _make(left, target, lambda: source, tally, workers)
    except DatasetError:  # which others would meet, too, after all their work
        claims.withdraw()
        raise
    claims.end(waiting=tally.check)  # for who makes again what is there, and may stand still
    result = manifest.build(
        directory,
        {split: [part.name for part in parts if part.split == split] for split in source.counts},
        side=side,
        class_names=source.class_names,
        made_from=made_from,
        pixel_format=pixel_format,
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


def digest_of_origin(source: Source, side: int, pixel_format: PixelFormat) -> str:
    """Return what tells prepared images apart by what they are made from; `made_from` elsewhere."""
    settings = {"side": side, "shard_images": SHARD_IMAGES, "format": manifest.FORMAT}
    # Raw is left out: it was the only format once, and shards of that time stay valid.
    stored = [] if pixel_format == "raw" else [pixel_format]
    return digest_of([source.identity(), settings, *stored])


class Helper:
    """Makes shards of a preparation that another process leads."""

    def __init__(
        self,
        open_source: Callable[[], Source],
        directory: Path,
        *,
        side: int,
        report: Callable[[int, int], None],
        workers: int,
        max_skipped: float = 0.01,
        pixel_format: PixelFormat = "raw",
    ) -> None:
        """Say what is prepared, in the words in which the leader's `prepare` is told.

        Args:
            open_source: Opens the source, once there is something to do.
            directory: The leader's.
            side: As there.
            report: As there.
            workers: As there.
            max_skipped: As there.
            pixel_format: As there.
        """
        self._open_source, self._report = open_source, report
        self._target = _Target(directory, side, pixel_format, made_from="")
        self._workers, self._max_skipped = workers, max_skipped
        self._claims = Claims(directory)
        self._plan: Plan | None = None
        self._left: PartsLeft | None = None
        self._tally = _Tally(0, 0, report, max_skipped, [])

    def help(self) -> None:
        """Make shards until others hold, or have made, all of them. Where that is so, do nothing.

        Raises:
            DatasetError: As `prepare` does, of the images that this process reads.
        """
        plan = self._claims.plan()
        if plan is None:
            return
        if plan != self._plan:
            self._begin(plan)
        if self._left is not None:
            _make(self._left, self._target, self._source, self._tally, self._workers)
            self._tally.check()

    def _begin(self, plan: Plan) -> None:
        self._plan, self._left = plan, None
        mine = _tools()
        other = [name for name in mine if plan.get(name) != mine[name]]
        if other:  # the result would be nobody's
            _log.info(
                "The other run prepares with %s, this one would with %s: it does not help.",
                ", ".join(f"{name} {plan.get(name)}" for name in other),
                ", ".join(f"{name} {mine[name]}" for name in other),
            )
            return
        _log.info("This process helps with the shards that nobody works on.")
        parts = parts_of(plan["counts"], plan["shard_images"])
        self._target = replace(self._target, made_from=plan["made_from"])
        self._tally = _Tally(sum(plan["counts"].values()), 0, self._report, self._max_skipped, [])
        self._left = PartsLeft(parts, self._claims, plan, leads=False)

    def _source(self) -> Source:
        source, target = self._open_source(), self._target
        if digest_of_origin(source, target.side, target.pixel_format) != target.made_from:
            raise DatasetError(
                f"{source.spec} must not change while it is prepared, and is not what it was when "
                "another process began to. Run the same command again."
            )
        return source


@dataclass(frozen=True, slots=True)
class _Target:
    """Where the images go, and as what."""

    directory: Path
    side: int
    pixel_format: PixelFormat
    made_from: str

    def path(self, part: Part) -> Path:
        return pixels_path(self.directory, part.name, self.pixel_format)


@dataclass(slots=True)
class _Tally:
    """Counts what was done, reports it and stops when too much went wrong."""

    total: int
    done: int
    report: Callable[[int, int], None]
    max_skipped: float
    skipped: list[Skipped]

    def count(self) -> None:
        self.done += 1
        self.report(self.done, self.total)

    def check(self) -> None:
        if self.skipped:
            self._check_skipped()
        self.report(self.done, self.total)

    def add(self, count: int, skipped: list[Skipped]) -> None:
        self.done += count
        self.skipped += skipped
        self.check()

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
        self.source = source
        self._records: Iterator[Record] = iter(())
        self._next: tuple[Split, int] | None = None

    def read(self, part: Part) -> Iterator[Record]:
        if self._next != (part.split, part.first):
            self._records = self.source.records(part.split, part.first)
        self._next = (part.split, part.first + part.count)
        return islice(self._records, part.count)


class _Hashing:
    """Hashes images some at a time: NumPy takes longer over its calls than over one image."""

    def __init__(self) -> None:
        self._waiting: list[NDArray[np.uint8]] = []
        self._done: list[NDArray[np.uint64]] = []

    def add(self, image: NDArray[np.uint8]) -> None:
        self._waiting.append(image)
        if len(self._waiting) == HASHED_AT_ONCE:
            self._hash()

    def as_text(self) -> str:
        self._hash()
        return hashes_to_text(self._done)

    def _hash(self) -> None:
        if self._waiting:
            self._done.append(perceptual_hashes(np.stack(self._waiting)))
            self._waiting.clear()


def _make(
    left: PartsLeft,
    target: _Target,
    open_source: Callable[[], Source],
    tally: _Tally,
    workers: int,
) -> None:
    """Make parts, one after the other, until others hold all that are left."""
    reader: _Reader | None = None
    while True:
        _count_others(left, target, tally)
        with left.claimed() as part:
            if part is None:
                return
            reader = reader or _Reader(open_source())
            # A pool per part: who else is at work on this machine changes.
            with decoding_pool(max(1, workers // left.makers_here())) as pool:
                _write(target, part, reader.read(part), tally, reader.source, pool)


def _count_others(left: PartsLeft, target: _Target, tally: _Tally) -> None:
    """Take off, and count, what others have made meanwhile."""
    for part in left:
        if record_path(target.directory, part.name).is_file():
            shard = read_shard(target.directory, part.name)
            if shard is not None and shard.made_from == target.made_from:
                left.made(part)
                tally.add(part.count, shard.skipped)


def _tools() -> dict[str, Any]:
    """Return what must be alike in two processes, beside the source, for their shards to be."""
    return {
        "format": manifest.FORMAT,
        "shard_images": SHARD_IMAGES,
        "Pillow": PIL.__version__,
        "libjpeg-turbo": features.version("libjpeg_turbo"),
        "torch": torch.__version__,
        "vectors": torch.backends.cpu.get_cpu_capability(),  # others may round otherwise
    }


def _write(
    target: _Target,
    part: Part,
    records: Iterator[Record],
    tally: _Tally,
    source: Source,
    pool: DecodingPool,
) -> None:
    labels: list[int] = []
    hashing = _Hashing()
    skipped_before = len(tally.skipped)

    def usable() -> Iterator[NDArray[np.uint8]]:
        for record, image in pool.decode(records, target.side):
            if isinstance(image, UndecodableError):
                tally.skip(printable(record.name), str(image))
            else:
                if source.class_names is not None:
                    labels.append(_label(record, len(source.class_names)))
                hashing.add(image)
                yield image
            tally.count()

    path = target.path(part)
    try:
        if target.pixel_format == "jpeg":
            count = write_jpegs(path, pool.in_order(jpeg.encode, usable()))
        else:
            count = write_pixels(path, usable(), target.side, most=part.count)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise DatasetError(
            f"The disk of {target.directory} is full. Free some space and run the same command "
            "again; finished parts are kept."
        ) from error
    skipped = tally.skipped[skipped_before:]
    if count + len(skipped) != part.count:
        raise DatasetError(
            f"{source.spec} must not change while it is read: {part.name} should have "
            f"{part.count} images, got {count + len(skipped)}. Run the same command again."
        )
    shard = describe(
        path,
        made_from=target.made_from,
        images=count,
        labels=None if source.class_names is None else labels,
        skipped=skipped,
        hashes=hashing.as_text(),
    )
    write_shard_record(target.directory, shard)


def _label(record: Record, num_classes: int) -> int:
    if record.label is None or not 0 <= record.label < num_classes:
        raise DatasetError(
            f"Every image of a labelled source needs a label in 0 to {num_classes - 1}, "
            f"{printable(record.name)} has {record.label}. Remove such images, or all labels."
        )
    return record.label


def _kept(target: _Target, part: Part, *, suspect: bool) -> Shard | None:
    """Return the shard of an earlier attempt, if it is whole and made from the same."""
    shard, path = read_shard(target.directory, part.name), target.path(part)
    if shard is None or shard.made_from != target.made_from or not path.is_file():
        return None
    status = path.stat()
    if status.st_size != shard.size:
        return None
    touched = status.st_mtime_ns != shard.mtime_ns
    if (suspect or touched) and file_sha256(path) != shard.sha256:
        return None
    if touched:
        shard = replace(shard, mtime_ns=status.st_mtime_ns)
        write_shard_record(target.directory, shard)
    return shard


def _refuse_other_formats(directory: Path, pixel_format: PixelFormat) -> None:
    for other, suffix in SUFFIXES.items():
        found = sorted(directory.glob(f"*{suffix}")) if other != pixel_format else []
        if found:
            raise DatasetError(
                f"{directory} must hold images in one format, {pixel_format} was asked for and "
                f"there are {len(found)} {other} files such as {found[0].name}. Delete them, or "
                "choose another directory."
            )
