"""One writer per stage key across machines: a lease in a store, which ends when its holder dies.

A lease is a numbered object. Whoever creates the next number, which a store lets one of several do,
holds it, and writes it anew every few seconds. Others look whether it changes: by their own clocks,
so that no two clocks are compared. One that has not changed for two minutes is nobody's any more;
time in which the store did not answer does not count, as a holder cannot give a sign then, either.
The number of a lease is never used again while a higher one is there, and the highest one counts:
a holder that was suspended for longer finds a higher one, and knows that it has lost its own.
"""

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from data.patience import Patience
from training.remote_store import ONCE, Store
from training.stage_files import OutputsError
from training.stopping import ENDING

logger = logging.getLogger(__name__)

BEAT_SECONDS = 15.0
"""Time between two signs of life of a holder."""

DEAD_AFTER_SECONDS = 120.0
"""Time without one after which its lease is another's to take."""

LOOK_SECONDS = 5.0
"""Time between two looks at another's lease."""

LOOKS_THAT_COUNT = 3
"""What passes between two looks counts as time without a sign of life up to this many times that:
for longer, the store was away or this process asleep."""

JOIN_SECONDS = 10.0
"""Longest time that the end of a lease waits for a sign of life that is on its way."""

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Lease:
    """A lease that this process holds, or has lost since."""

    def __init__(
        self, store: Store, folder: str, number: int, facts: dict[str, Any], *, what: str
    ) -> None:
        self._store, self._folder, self._number, self._facts = store, folder, number, facts
        self._what, self._is_lost = what, False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"lease of {folder}", daemon=True)

    def begin(self) -> None:
        """Give signs of life from now on."""
        self._thread.start()

    def is_held(self, patience: Patience | None = None) -> bool:
        """Ask the store whether nobody else has taken it; what is lost is not held again.

        Args:
            patience: How often to ask; as often as the store is asked otherwise.

        Raises:
            OutputsError: If the store does not say.
        """
        store = self._store.patient(patience) if patience else self._store
        if not self._is_lost and not self._counts(store):
            self._is_lost = True
            logger.warning(
                "Another run has taken over %s, as it saw no sign of life of this one: what is "
                "computed here is not stored any more.",
                self._what,
            )
        return not self._is_lost

    def _counts(self, store: Store) -> bool:
        """Whether no higher number is there, and nobody has written over this one.

        The latter happens in stores where two may create an object at once.
        """
        if _newest(store, self._folder) != self._number:
            return False
        content = store.read(_name(self._folder, self._number)) or b""
        return bool(_parse(content).get("token") == self._facts["token"])

    def release(self) -> None:
        """Let others have it at once."""
        self._ended.set()
        self._thread.join(
            ENDING.seconds(JOIN_SECONDS)
        )  # what it is about to write would undo what follows
        try:
            store = self._store.patient(ONCE)
            is_silent = not self._thread.is_alive() and not self._is_lost
            if is_silent and self._counts(store):
                _write(store, self._folder, self._number, {"released": True})
        except OutputsError as error:
            logger.warning(
                "Others that want the same wait for %.0f s: %s", DEAD_AFTER_SECONDS, error
            )

    def _beat(self) -> None:
        beats = 0
        while not self._ended.wait(BEAT_SECONDS) and not self._is_lost:
            beats += 1
            try:
                self._beat_once(beats)
            except Exception as error:  # the next one may go better; training must not end of it
                logger.debug("The lease of %s was not renewed: %s", self._folder, error)

    def _beat_once(self, beats: int) -> None:
        if self.is_held(ONCE):
            store = self._store.patient(ONCE)
            _write(store, self._folder, self._number, {**self._facts, "beats": beats})


def owner_of(folder: Path, name: str) -> str:
    """Return the name under which a folder on this computer holds leases.

    It has to be another one for every copy of the folder, in which the folder's own name is the
    same: an image of a machine, a container's layer, a home directory that several nodes mount.

    Args:
        folder: Exists. A lock in it keeps two processes of this machine from asking at a time.
        name: The folder's own, which lies in it.
    """
    boot = ""
    with suppress(OSError):  # Linux only; elsewhere the host has to do
        boot = _BOOT_ID.read_text().strip()
    status = folder.stat()
    return f"{name} {socket.gethostname()} {boot} {status.st_dev}:{status.st_ino}"


@contextmanager
def leased(store: Store, folder: str, *, owner: str, what: str) -> Iterator[Lease]:
    """Hold the lease of a name for the `with` block, waiting for it as long as it takes.

    Args:
        store: Where it is.
        folder: Of its objects in the store.
        owner: Who wants it, see `owner_of`. A lease of the same owner is taken at once: it must
            have died, as no two may ask under the same name at a time.
        what: What it is for, for the line that says that this process waits.

    Raises:
        OutputsError: If the store fails.
    """
    lease = _take(store, folder, owner=owner, what=what)
    try:
        yield lease
    finally:
        lease.release()


def _take(store: Store, folder: str, *, owner: str, what: str) -> Lease:
    facts = {
        "owner": owner,
        "host": socket.gethostname(),
        "process": os.getpid(),
        "token": uuid.uuid4().hex,
    }
    seen: tuple[int, bytes] | None = None
    looked, silent, waits = time.monotonic(), 0.0, False
    while True:
        number = _newest(store, folder)
        content = store.read(_name(folder, number)) or b"" if number else b""
        holder = _parse(content)
        now = time.monotonic()
        silent += min(now - looked, LOOKS_THAT_COUNT * LOOK_SECONDS)
        looked = now
        if seen != (number, content):
            seen, silent = (number, content), 0.0
        is_free = not number or holder.get("released") or holder.get("owner") == owner
        if is_free or silent >= DEAD_AFTER_SECONDS:
            if number and not is_free:
                logger.warning(
                    "%s has given no sign of life for %.0f s: its %s is taken over.",
                    _in_words(holder),
                    silent,
                    what,
                )
            if _create(store, folder, number + 1, facts):
                lease = Lease(store, folder, number + 1, facts, what=what)
                if lease._counts(store):
                    for old in _numbers(store, folder):
                        if old <= number:
                            store.remove(_name(folder, old))
                    lease.begin()
                    return lease
            time.sleep(0.2)  # another one was quicker
            continue
        if not waits:
            waits = True
            logger.info("Waiting for %s, which computes %s.", _in_words(holder), what)
        time.sleep(LOOK_SECONDS)


def _name(folder: str, number: int) -> str:
    return f"{folder}/{number:08d}"


def _numbers(store: Store, folder: str) -> list[int]:
    return [int(name) for name in store.sizes(folder) if name.isdecimal()]


def _newest(store: Store, folder: str) -> int:
    """Return the number of the lease that counts; 0 where there has never been one."""
    return max(_numbers(store, folder), default=0)


def _create(store: Store, folder: str, number: int, facts: dict[str, Any]) -> bool:
    return store.create(_name(folder, number), json.dumps(facts).encode())


def _write(store: Store, folder: str, number: int, facts: dict[str, Any]) -> None:
    store.write(_name(folder, number), json.dumps(facts).encode())


def _parse(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except ValueError:  # one that is being written; it changes, or nobody writes it any more
        return {}
    return found if isinstance(found, dict) else {}


def _in_words(holder: dict[str, Any]) -> str:
    if "host" not in holder:
        return "another run"
    return f"process {holder.get('process')} on {holder['host']}"
