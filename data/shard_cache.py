"""Images that lie elsewhere, kept on a local disk within a bound, for all processes of a machine.

In every epoch each image is read once, in another order each time. What an epoch finds here must
have been here when it began, so of a set that does not fit no rule of what to keep finds more than
the part that does; and that part is found by keeping what comes first. So nothing is ever exchanged
for something else: images are kept as they come, until the space is used up.

A set is a folder: `images`, a sparse file in which each image has its place, and `have`, one byte
per image that says whether it is there. Every image is held against its digest when a process
reads it for the first time, so that one which was half written when the machine lost power, or went
bad on the disk since, is noticed.
"""

import fcntl
import logging
import os
import shutil
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.records import DatasetError

DIRECTORY_VARIABLE = "ROTVIT_SHARD_CACHE"
"""Names the folder of the cache in the environment; on a disk of the machine's own, for speed."""

LIMIT_VARIABLE = "ROTVIT_SHARD_CACHE_GIB"
"""Says in the environment how large all that is in the folder may become, in GiB."""

_IMAGES, _HAVE, _USERS, _FILLER = "images", "have", "users", "filler"

_FILES = (_HAVE, f"{_HAVE}.tmp", _IMAGES, _FILLER, _USERS)
"""All that a set can have, in the order in which it goes: without `have` it does not count."""

_ROUNDING_BYTES = 2 * 4096
"""Disks give space in blocks, of which an image may begin one and end one."""

_GIB = 2**30

_log = logging.getLogger(__name__)


def digest_of_image(content: bytes | memoryview) -> int:
    """Return what tells the bytes of an image from others, 64 bits.

    BLAKE2b, as that takes no longer on processors without instructions for SHA-256.
    """
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little")


@dataclass(frozen=True, slots=True)
class CacheSpace:
    """Where images may be kept, and how many bytes of disk all of them may take."""

    directory: Path
    limit_bytes: int | None
    """None for what is there already and half of what is free."""

    @classmethod
    def of_environment(cls) -> "CacheSpace":
        """Return what the environment says, or a folder in the user's cache.

        Raises:
            DatasetError: If the size is no number.
        """
        root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "rotation-vit" / "shards"
        directory = Path(os.environ.get(DIRECTORY_VARIABLE) or root).expanduser()
        given = os.environ.get(LIMIT_VARIABLE, "").strip()
        try:
            limit = float(given) if given else None
        except ValueError:
            limit = -1.0
        if limit is not None and not 0 <= limit < float("inf"):
            raise DatasetError(
                f"{LIMIT_VARIABLE} must be the size of the shard cache in GiB, such as 200, or 0 "
                f"for none, got {given!r}."
            )
        return cls(directory, None if limit is None else int(limit * _GIB))


class ShardCache:
    """The images of one set, by their numbers. Any thread and any process may use it."""

    def __init__(
        self,
        space: CacheSpace,
        name: str,
        sizes: NDArray[np.int64],
        digests: NDArray[np.uint64],
    ) -> None:
        """Open a set, or begin it.

        For want of space others go first, the one that was opened longest ago before the others,
        unless a process has it open.

        Args:
            space: Where.
            name: Of the set; another name for other images.
            sizes: Bytes of each image, `(n,)`.
            digests: Of each image, `(n,)`; see `digest_of_image`.

        Raises:
            DatasetError: If the folder cannot be used.
        """
        self.is_full = False
        """Whether nothing more is kept."""
        self._ends = np.cumsum(sizes)
        self._sizes, self._digests = sizes, digests
        self._root, self._folder = space.directory, space.directory / name
        self._checked = np.zeros(len(sizes), dtype=np.bool_)
        self._told_of_damage = False
        self._threads = threading.Lock()
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            self._lock = self._opened(self._root / "lock")
            with self._locked():
                used, free = _used_bytes(self._root), shutil.disk_usage(self._root).free
                limit = space.limit_bytes
                self._limit = max(used, (used + free) // 2) if limit is None else limit
                self._make_room()
                self._open_or_begin()
        except OSError as error:
            raise DatasetError(
                f"The folder of the shard cache must be one that can be written to, "
                f"{self._root} is not: {error.strerror or error}. Set {DIRECTORY_VARIABLE} to "
                "another one."
            ) from error

    def missing(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return those of the numbers whose images are not here, in their order."""
        return np.asarray(numbers[self._have[numbers] == 0])

    def get(self, number: int) -> bytes | None:
        """Return an image, or None if it is not here, or not as it was put."""
        if not self._have[number]:
            return None
        content = bytearray(self._sizes[number])
        return bytes(content) if self.read_into(number, memoryview(content)) else None

    def read_into(self, number: int, out: memoryview) -> bool:
        """Read an image, and say whether it is here as it was put; if not, `out` has anything.

        It is held against its digest when this object reads it for the first time, as files of
        prepared images are once; in every epoch that would take more than all the reading.

        Args:
            number: Of the image.
            out: Bytes, as many as the image has.
        """
        if not self._have[number]:
            return False
        size = 0
        with suppress(OSError):  # of a disk that fails
            size = os.preadv(self._images, [out], int(self._ends[number]) - len(out))
        if size == len(out) and (
            self._checked[number] or digest_of_image(out) == int(self._digests[number])
        ):
            self._checked[number] = True
            return True
        self._have[number], self._checked[number] = 0, False
        if not self._told_of_damage:
            self._told_of_damage = True
            _log.warning(
                "%s has damaged images, perhaps since the machine lost power; they are fetched "
                "again.",
                self._folder,
            )
        return False

    def put(self, contents: Mapping[int, bytes]) -> None:
        """Keep images, as long as there is space; they must have been held against their digests.

        A disk that cannot take them is no error: less is kept, then.
        """
        if self.is_full:
            return
        try:
            with self._locked():
                room = self._limit - _used_bytes(self._root)
                for number, content in contents.items():
                    if self._have[number]:
                        continue
                    room -= len(content) + _ROUNDING_BYTES
                    if room < 0:
                        self._end("its limit is reached")
                        return
                    _write_at(self._images, content, int(self._ends[number]) - len(content))
                    self._have[number] = 1  # last: until then nobody reads it
        except OSError as error:
            self._end(error.strerror or str(error))

    @contextmanager
    def filling(self) -> Iterator[bool]:
        """Let one process at a time fill the set; yield whether it is this one."""
        handle = os.open(self._folder / _FILLER, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            yield _try_lock(handle)
        finally:
            os.close(handle)

    def _end(self, why: str) -> None:
        self.is_full = True
        count = int(np.count_nonzero(self._have))
        if count < len(self._have):
            _log.info(
                "Of the %s images of a set %s are kept in %s (%s); the others are fetched whenever "
                "they are needed.",
                f"{len(self._have):,}",
                f"{count:,}",
                self._root,
                why,
            )

    def _make_room(self) -> None:
        """Remove sets that nobody uses, until this one has as much space as it can use."""
        total = int(self._ends[-1]) if len(self._ends) else 0
        wanted = min(total + _ROUNDING_BYTES * len(self._ends), self._limit)
        others = [path for path in _sets(self._root) if path != self._folder]
        for other in sorted(others, key=_last_opened):
            if _used_bytes(self._root) - _disk_bytes(self._folder) + wanted <= self._limit:
                return
            handle = os.open(other / _USERS, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                if _try_lock(handle):
                    _remove(other)
            finally:
                os.close(handle)

    def _open_or_begin(self) -> None:
        self._folder.mkdir(exist_ok=True)
        users = self._opened(self._folder / _USERS)
        is_alone = _try_lock(users)
        if not self._is_whole() or (is_alone and _disk_bytes(self._folder) > self._limit):
            self._begin()
        fcntl.flock(users, fcntl.LOCK_SH)  # as long as this process has it open
        self._images = self._opened(self._folder / _IMAGES)
        os.utime(self._folder / _HAVE)
        if len(self._ends):
            self._have: NDArray[np.uint8] = np.memmap(
                self._folder / _HAVE, dtype=np.uint8, mode="r+"
            )
        else:
            self._have = np.empty(0, dtype=np.uint8)

    def _is_whole(self) -> bool:
        total = int(self._ends[-1]) if len(self._ends) else 0
        sizes = {_IMAGES: total, _HAVE: len(self._ends)}
        return all(
            (self._folder / name).is_file() and (self._folder / name).stat().st_size == size
            for name, size in sizes.items()
        )

    def _begin(self) -> None:
        have = self._folder / _HAVE
        have.unlink(missing_ok=True)  # first: without it the set does not count
        with (self._folder / _IMAGES).open("wb") as file:
            file.truncate(int(self._ends[-1]) if len(self._ends) else 0)
        temporary = self._folder / f"{_HAVE}.tmp"
        # Written, not only made long: a map of a file with holes ends the process on a full disk.
        temporary.write_bytes(bytes(len(self._ends)))
        temporary.replace(have)

    def _opened(self, path: Path) -> int:
        """Open a file for as long as this object lives."""
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        weakref.finalize(self, os.close, handle)
        return handle

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Let one thread of one process work on the folder; the kernel frees it from the dead."""
        with self._threads:
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._lock, fcntl.LOCK_UN)


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _write_at(handle: int, content: bytes, start: int) -> None:
    rest = memoryview(content)
    while rest:
        written = os.pwrite(handle, rest, start)
        rest, start = rest[written:], start + written


def _used_bytes(root: Path) -> int:
    """Return what all sets take on the disk: holes take nothing, which only the disk knows."""
    return sum(map(_disk_bytes, _sets(root)))


def _sets(root: Path) -> list[Path]:
    """Return the sets in a folder, in which a user may keep other things as well."""
    return [path for path in root.iterdir() if path.is_dir() and _is_a_set(path)]


def _is_a_set(folder: Path) -> bool:
    with suppress(OSError):  # of another's folder that may not be read, or that has just gone
        # First what takes no listing: another's folder may have millions of files, and this is
        # asked whenever an image is kept.
        return (folder / _USERS).is_file() and all(path.name in _FILES for path in folder.iterdir())
    return False


def _remove(folder: Path) -> None:
    with suppress(OSError):
        for name in _FILES:
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()


def _disk_bytes(folder: Path) -> int:
    used = 0
    for name in (_IMAGES, _HAVE):
        with suppress(FileNotFoundError):
            used += (folder / name).stat().st_blocks * 512
    return used


def _last_opened(folder: Path) -> float:
    try:
        return (folder / _HAVE).stat().st_mtime
    except FileNotFoundError:  # cut off when it was begun
        return 0.0
