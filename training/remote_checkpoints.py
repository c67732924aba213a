"""Checkpoints in a store: sent beside training, fetched where another machine goes on.

A checkpoint is `checkpoints/step-…/` there as it is here, with what it needs of the files beside it
in `beside/`, and `files.json` written last: one that is cut off does not count.
"""

import json
import logging
import shutil
import threading
import uuid
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from training import remote_store
from training.remote_lock import Lease
from training.remote_store import ONCE, Inventory, LostError, Store
from training.stage_files import (
    CHECKPOINTS,
    HARDWARE,
    KEEP_TOKENS,
    TRACKING,
    FileRecord,
    OutputsError,
    checkpoint_step,
    newest_checkpoint,
    sha256_of_bytes,
)
from training.stopping import ENDING
from training.store import write_atomically

logger = logging.getLogger(__name__)

BESIDE = (
    *("config.yaml", HARDWARE, "metrics.jsonl", "resumes.json", KEEP_TOKENS),
    f"{TRACKING}/run.json",
)
"""Files of a stage's directory that a resume needs with the checkpoint."""

KEEP = 2
"""Checkpoints kept in the store, as on disk (`training.checkpoint`, which imports torch)."""

LOOK_SECONDS = 2.0
"""Time between two looks whether there is a new checkpoint."""

AGAIN_SECONDS = 30.0
"""Time until a checkpoint is sent again that could not be."""

END_SECONDS = 20.0
"""Longest time that the end of a stage waits for its last checkpoint to be sent."""

RELEASE_SECONDS = 2.0
"""What is kept, of the time in which a process must end, for giving the lease back."""


def complete(store: Store, place: str) -> list[str]:
    """Return the names of a stage's checkpoints that are whole, the newest one last.

    Args:
        store: Where they are.
        place: Of the stage: `<stage>/<key>`.

    Raises:
        OutputsError: If the store fails.
    """
    found = (name.split("/") for name in store.sizes(f"{place}/{CHECKPOINTS}"))
    return sorted(
        name for name, *rest in found if rest == ["files.json"] and _step(name) is not None
    )


def newest_step(store: Store, place: str) -> int | None:
    """Return the step of a stage's newest checkpoint; it has not been verified."""
    names = complete(store, place)
    return _step(names[-1]) if names else None


def fetch_newest(store: Store, place: str, directory: Path) -> None:
    """Bring a stage's newest checkpoint that verifies, where it is newer than those here.

    Args:
        store: Where it is.
        place: Of the stage.
        directory: Of the stage, on this computer.

    Raises:
        OutputsError: If the store fails.
    """
    here = newest_checkpoint(directory)
    for name in reversed(complete(store, place)):
        if here is not None and name <= here.name:
            return
        try:
            _fetch(store, f"{place}/{CHECKPOINTS}/{name}", directory, name)
        except LostError as damage:
            logger.warning(
                "Checkpoint %s at %s is damaged (%s); the one before it is used.",
                name,
                store.shown,
                damage,
            )
            continue
        logger.info("Checkpoint %s was fetched from %s.", name, store.shown)
        return


def prune(store: Store, place: str, keep: int) -> None:
    """Remove all but the newest checkpoints of a stage, and what is left of those cut off."""
    kept = complete(store, place)[-keep:] if keep else []
    sizes = store.sizes(f"{place}/{CHECKPOINTS}")
    # First what makes them count.
    for name in sorted(sizes, key=lambda name: not name.endswith("/files.json")):
        if name.split("/")[0] not in kept:
            store.remove(f"{place}/{CHECKPOINTS}/{name}")


class Uploads:
    """Sends new checkpoints while a stage's process writes them; a context manager.

    It does so in a thread of the process that waits for the stage's, so that training neither fails
    nor waits where the store does: the checkpoint is sent again, or the next one is.
    """

    def __init__(self, store: Store, place: str, directory: Path, title: str, lease: Lease) -> None:
        """Start with what the store has.

        Args:
            store: Where to.
            place: Of the stage: `<stage>/<key>`.
            directory: Of the stage, on this computer.
            title: Of the stage, for messages.
            lease: The right to compute it. Once that is another's, so are the checkpoints in the
                store: nothing is sent or removed any more.
        """
        self._store = store.patient(ONCE)
        self._place, self._directory, self._title = place, directory, title
        self._lease = lease
        self._sent: str | None = None
        self._fails = False
        self._ended, self._given_up = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="checkpoints", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self._given_up.set()  # there is a result, or about to be one
        self._ended.set()
        self._thread.join(ENDING.seconds(END_SECONDS, keep=RELEASE_SECONDS))
        self._given_up.set()

    def _run(self) -> None:
        wait = LOOK_SECONDS
        while not self._ended.wait(wait):
            wait = LOOK_SECONDS if self._send_newest() else AGAIN_SECONDS
        self._send_newest()

    def _send_newest(self) -> bool:
        newest = newest_checkpoint(self._directory)
        if newest is None or newest.name == self._sent or self._given_up.is_set():
            return True
        try:
            self._check_lease()
            self._send_if_new(newest)
            self._check_lease()  # sending may have taken minutes
            prune(self._store, self._place, KEEP)
            self._sent = newest.name
        except Exception as error:  # whatever it is, training must not end of it
            if not newest.is_dir() or self._given_up.is_set():
                return True  # there are newer ones, or the stage has ended
            if not self._fails:
                logger.warning(
                    "Checkpoint %s of %s is not stored: %s Training goes on, and this is tried "
                    "again; a resume on another machine would start from %s.",
                    newest.name,
                    self._title,
                    error,
                    self._sent or "an earlier one, or the beginning",
                )
            self._fails = True
            return False
        if self._fails:
            logger.info("Checkpoint %s of %s is stored.", newest.name, self._title)
        self._fails = False
        return True

    def _send_if_new(self, checkpoint: Path) -> None:
        manifest = (checkpoint / "manifest.json").read_bytes()
        for name in complete(self._store, self._place):
            # What this attempt goes on from is the newest that was of use: a newer one was not.
            if name > checkpoint.name:
                self._store.remove(f"{self._folder(name)}/files.json")
            elif name == checkpoint.name:
                content = self._store.read(f"{self._folder(name)}/files.json")
                with suppress(LostError):
                    there = Inventory.read(content).files["manifest.json"]
                    if there.sha256 == sha256_of_bytes(manifest):
                        return
                self._store.remove(f"{self._folder(name)}/files.json")
        self._send(checkpoint, manifest)

    def _folder(self, name: str) -> str:
        return f"{self._place}/{CHECKPOINTS}/{name}"

    def _send(self, checkpoint: Path, manifest: bytes) -> None:
        folder = self._folder(checkpoint.name)
        files: dict[str, FileRecord] = {}
        records = {
            **json.loads(manifest)["files"],  # hashed when it was saved
            "manifest.json": {"sha256": sha256_of_bytes(manifest), "size": len(manifest)},
        }
        for name, record in records.items():
            self._check()
            self._store.upload(checkpoint / name, f"{folder}/{name}")
            files[name] = FileRecord(**record)
        for name in BESIDE:
            with suppress(FileNotFoundError):
                content = (self._directory / name).read_bytes()  # metrics grow meanwhile
                self._check()
                self._store.write(f"{folder}/beside/{name}", content)
                files[f"beside/{name}"] = FileRecord(
                    sha256=sha256_of_bytes(content), size=len(content)
                )
        self._check_lease()
        self._store.write(f"{folder}/files.json", Inventory(files=files).as_bytes())

    def _check_lease(self) -> None:
        self._check()
        if not self._lease.is_held(ONCE):
            self._given_up.set()
        self._check()

    def _check(self) -> None:
        if self._given_up.is_set():
            raise OutputsError("The stage has ended, or is another's.")


def _fetch(store: Store, folder: str, directory: Path, name: str) -> None:
    inventory = Inventory.read(store.read(f"{folder}/files.json"))
    root = directory / CHECKPOINTS
    draft = root / f".tmp-{uuid.uuid4().hex}"  # the name under which unfinished ones are removed
    try:
        for file, record in inventory.files.items():
            remote_store.fetch(store, f"{folder}/{file}", draft / file, record)
        beside = draft / "beside"
        for path in beside.rglob("*"):
            if path.is_file():
                write_atomically(directory / path.relative_to(beside), path.read_bytes())
        shutil.rmtree(beside, ignore_errors=True)
        draft.rename(root / name)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _step(name: str) -> int | None:
    return checkpoint_step(Path(name))
