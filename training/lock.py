"""One writer per stage key: a lock that the kernel drops when its holder dies."""

import fcntl
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

logger = logging.getLogger(__name__)


@contextmanager
def locked(
    path: Path,
    *,
    what: str,
    give_up: Callable[[], bool] = lambda: False,
    meanwhile: Callable[[], None] | None = None,
) -> Iterator[None]:
    """Hold an exclusive lock on a file for the `with` block, waiting for it as long as it takes.

    `flock(2)`, on a local disk or on one that machines share (NFS from version 4 on): a holder that
    is killed leaves no stale lock. The file stays, since unlinking a locked file would let two
    processes hold "the" lock.

    Args:
        path: Lock file; made where it is missing.
        what: What the lock protects, for the line that says that this process waits.
        give_up: Asked while waiting; true ends the wait.
        meanwhile: Called while waiting, between two tries; what it raises ends the wait.

    Raises:
        InterruptedError: If `give_up` said so.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        waiting = False
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                pass
            if give_up():
                raise InterruptedError(f"Stopped while waiting for another run's {what}.")
            if not waiting:
                waiting = True
                logger.info("Waiting for another run that computes %s (%s).", what, _holder(path))
            if meanwhile:
                meanwhile()
            time.sleep(0.2)
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps({"pid": os.getpid(), "since": time.time()}).encode(), 0)
        yield
    finally:
        os.close(handle)


def holder(path: Path) -> str | None:
    """Return who holds a lock ("process 17"); None if nobody, or if the file system has no locks.

    Whoever wants the lock at the very moment of this look says that it waits, and does so for a
    fifth of a second.
    """
    with suppress(OSError):
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _holder(path)
        finally:
            os.close(handle)
    return None


def _holder(path: Path) -> str:
    try:
        return f"process {json.loads(path.read_bytes())['pid']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "process unknown"
