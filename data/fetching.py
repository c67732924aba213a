"""Fetching one file, whole or not at all, through whatever the network does meanwhile."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

from data.catalogue import RemoteFile, is_whole
from data.patience import DownloadError, Patience, Stop, TryAgainError, check_stop, never, pause
from data.records import DatasetError
from data.remote_files import opened, watched
from data.shards import replace_durably, write_json

PART = ".part"
"""Ending of a file that is being fetched; one that was cut off is gone on with."""

WRONG_COPIES = 3
"""Complete copies with a wrong length or checksum after which no other one is asked for."""

STAGE = "download"
"""Stage that takes what a publisher has now, unless a caller names another one."""

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def fetch(
    file: RemoteFile,
    target: Path,
    *,
    patience: Patience,
    stop: Stop = never,
    report: Callable[[int], None] = lambda done: None,
    stage: str = STAGE,
) -> None:
    """Make `target` a whole copy of a remote file; a sound one that is there is kept.

    A connection that is cut, stalls or is refused for a while is tried again after growing waits,
    from the byte where the last one ended. The copy gets its name when length and checksum are
    right.

    Args:
        file: What to fetch.
        target: Where it belongs; folders are made.
        patience: How often and how long.
        stop: Asked with every piece and while waiting; true ends it, what came is kept.
        report: Given the number of bytes that are there, at the beginning and with every piece.
        stage: What to refresh where the publisher has replaced the file, for messages.

    Raises:
        DownloadError: If the server fails, or sends something else, as often as it is asked.
        DatasetError: If the server refuses, or the disk is full.
        InterruptedError: If `stop` said so.
    """
    if is_whole(target, file):
        report(file.size)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = _Part(target.with_name(target.name + PART), file, stage)
    part.forget_if_foreign()
    failures = wrong = 0
    furthest = part.size
    while True:
        check_stop(stop, file.name)
        report(part.size)
        try:
            if part.size < file.size:
                _continue(part, patience, stop, report)
            if is_whole(part.path, file):
                break
            part.forget()
            wrong += 1
            if wrong >= WRONG_COPIES:
                raise DownloadError(
                    f"{file.url} must have {file.size:,} bytes{_and_checksum(file)}; {wrong} "
                    "copies had others. A proxy may be in the way; otherwise its publisher has "
                    f"changed it: `--refresh {stage}` takes what there is now."
                )
            raise TryAgainError("the copy is not what its publisher describes")
        except TryAgainError as error:
            if part.size >= min(furthest + patience.progress_bytes, file.size):
                failures, furthest = 0, part.size
            failures += 1
            pause(error, failures, file.name, patience, stop)
        except OSError as error:
            if error.errno not in _FULL_DISK:
                raise
            raise DatasetError(
                f"The disk of {target.parent} is full. Free some space and run the same command "
                "again; it goes on there."
            ) from error
    part.finish(target)
    report(file.size)


class _Part:
    """The part of a file that has come so far, and a note beside it of which file that is."""

    def __init__(self, path: Path, file: RemoteFile, stage: str) -> None:
        self.path, self.file, self._stage = path, file, stage
        self._note = path.with_name(path.name + ".json")

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    @property
    def version(self) -> str:
        """What the server called the content that the part is of; empty if it did not."""
        return str(self._noted().get("version") or "")

    def note(self, version: str | None) -> None:
        write_json(self._note, {"file": self._identity(), "version": version})

    def check_version(self, version: str | None, start: int) -> None:
        """Raise if the server has other content now than at the last attempt, or as listed."""
        if version is None:
            return
        if self.file.version not in (None, version):
            raise DatasetError(
                f"{self.file.url} must be as it was listed, it has been replaced since. Take what "
                f"there is now with `--refresh {self._stage}`."
            )
        if self.file.checksum is not None:
            return  # it decides
        if start and self.version not in ("", version):
            self.forget()
            raise TryAgainError("the file was replaced while it was read")

    def forget_if_foreign(self) -> None:
        """Remove a part of another file, or one of which nobody could tell."""
        noted = self._noted()
        sure = self.file.checksum or noted.get("version")
        if self.size and not (noted.get("file") == self._identity() and sure):
            self.forget()

    def forget(self) -> None:
        self.path.unlink(missing_ok=True)
        self._note.unlink(missing_ok=True)

    def finish(self, target: Path) -> None:
        replace_durably(self.path, target)
        self._note.unlink(missing_ok=True)

    def _identity(self) -> list[object]:
        return [self.file.size, self.file.checksum, self.file.version]

    def _noted(self) -> dict[str, object]:
        try:
            noted = json.loads(self._note.read_bytes())
        except (OSError, ValueError):
            return {}
        return noted if isinstance(noted, dict) else {}


def _continue(part: _Part, patience: Patience, stop: Stop, report: Callable[[int], None]) -> None:
    """Append what one connection brings."""
    file = part.file
    with opened(file.url, patience, start=part.size, version=part.version) as stream:
        if stream.size not in (None, file.size):
            raise TryAgainError(f"the server has {stream.size:,} bytes instead of {file.size:,}")
        if stream.start not in (0, part.size):
            raise TryAgainError("the server sent another part of the file than was asked for")
        part.check_version(stream.version, stream.start)
        part.note(stream.version)
        with part.path.open("r+b" if part.path.exists() else "wb") as copy:
            copy.truncate(stream.start)
            copy.seek(stream.start)
            done = stream.start
            for piece in watched(stream.chunks, file.name, patience, stop):
                copy.write(piece)
                done += len(piece)
                report(min(done, file.size))
                if done > file.size:
                    return  # it will be found wrong
            copy.flush()
            os.fsync(copy.fileno())
    if done < file.size:
        raise TryAgainError(f"the connection ended after {done:,} of {file.size:,} bytes")


def _and_checksum(file: RemoteFile) -> str:
    return f" and {file.checksum}" if file.checksum else ""
