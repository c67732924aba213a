"""Work in one directory, shared out among processes: each claims a part of it by a lock of its own.

One process leads: it writes a plan, which invites others, and withdraws it in the end. All of them
claim parts, the leader too. A claim is a `flock(2)`, which the kernel drops when its holder dies,
however it dies; on a file system that machines share it holds between these (on NFS from version 4
on, where Linux makes it a lock of the server's).
"""

import fcntl
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data.processors import own_processors
from data.shards import write_json

FOLDER = "claims"
"""Folder below the directory that is worked on; it is there while the work goes on."""

POLL_SECONDS = 0.2
"""Time between two looks at what other processes do."""

Plan = Mapping[str, Any]
"""What a leader says about the work, as plain JSON values; one that is invited to has an `id`."""

_SUFFIX = ".lock"

_DONE = "done"
"""How what the claim on a part that was made says begins."""

_log = logging.getLogger(__name__)

_TRUSTED_SECONDS = 120
"""How long a part counts as done by what its claim says; its result is to be seen by then."""


class Claims:
    """The claims on parts of the work in a directory."""

    def __init__(self, directory: Path) -> None:
        """Look at a directory, which need not be there; nothing is written."""
        self._folder = directory / FOLDER
        self._plan = self._folder / "plan.json"

    def invite(self, plan: Plan) -> Plan:
        """Let other processes claim parts from now on.

        Returns:
            The plan, with an `id` that no other one has.
        """
        plan = {**plan, "id": uuid.uuid4().hex}
        self._folder.mkdir(parents=True, exist_ok=True)
        write_json(self._plan, plan)
        return plan

    def plan(self) -> Plan | None:
        """Return the plan while others are invited. Its leader may have been killed meanwhile."""
        try:
            plan: Plan = json.loads(self._plan.read_bytes())
        except FileNotFoundError:
            return None
        return plan

    def withdraw(self) -> None:
        """Let nobody begin a part any more."""
        self._plan.unlink(missing_ok=True)

    def end(self, waiting: Callable[[], None] = lambda: None) -> None:
        """Withdraw the plan, wait for those who still work on a part, and forget all claims.

        A process that hangs is waited for as long as it lives, and a log line says where it is:
        what it writes when it goes on must not get among what is made after this.

        Whoever has opened a claim's file and locks it after this sees that the plan is gone.

        Args:
            waiting: Called again and again meanwhile; what it raises ends the wait.
        """
        self.withdraw()
        for path in self._folder.glob(f"*{_SUFFIX}"):
            handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            said = False
            try:
                while not _lock(handle):
                    if not said:
                        _say_whom(handle, path)
                        said = True
                    waiting()
                    time.sleep(POLL_SECONDS)
            finally:
                os.close(handle)
        shutil.rmtree(self._folder, ignore_errors=True)  # another may just have opened a file in it

    @contextmanager
    def claim(self, name: str, plan: Plan) -> Iterator[bool]:
        """Hold a part for the `with` block; it is done where the block ends without an error.

        Args:
            name: Of the part.
            plan: The one that it belongs to.

        Yields:
            Whether the part is this process's: nobody has it or has done it, and the plan stands.
        """
        done = f"{_DONE} {plan['id']}"
        try:
            handle = os.open(self._path(name), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:  # it has ended
            yield False
            return
        try:
            # Another may have done it since this process looked for results; and a client of NFS
            # may see new files half a minute late, but no old content of a file that it locks.
            # The plan comes last: `end` withdraws it before it waits for the lock.
            mine = _lock(handle) and not _says_lately(handle, done) and self.plan() == plan
            if mine:
                _write(handle, own_processors())
            yield mine
            if mine:
                _write(handle, done)
        finally:
            os.close(handle)

    def held_here(self, names: Iterable[str]) -> int:
        """Count those of some parts that are claimed by processes with the same processors."""
        return sum(self._is_held_here(self._path(name)) for name in names)

    def _is_held_here(self, path: Path) -> bool:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            # Where it is not locked, it was left by one that was killed.
            return _read(handle) == own_processors() and not _lock(handle)
        finally:
            os.close(handle)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}{_SUFFIX}"


def _lock(handle: int) -> bool:
    """Lock a file until it is closed, unless another one has it; say whether it is locked."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _say_whom(handle: int, path: Path) -> None:
    holder = _read(handle)
    known = holder and not holder.startswith(_DONE)  # or it has locked it only just now
    _log.info(
        "Waiting for a process%s that still works on %s in %s. If it hangs, end it there.",
        f" on {holder}" if known else "",
        path.stem,
        path.parent.parent,
    )


def _says_lately(handle: int, content: str) -> bool:
    age = time.time() - os.fstat(handle).st_mtime
    return _read(handle) == content and age < _TRUSTED_SECONDS


def _read(handle: int) -> str:
    return os.pread(handle, 2**16, 0).decode(errors="replace")


def _write(handle: int, content: str) -> None:
    os.ftruncate(handle, 0)
    os.pwrite(handle, content.encode(), 0)
