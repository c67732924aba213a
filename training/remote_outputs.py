"""Outputs at an address: a folder on this computer that is kept like what is in a store.

Stages compute in that folder, as in any other; around each of them, this module brings what is
needed and stores what was made. The store has the same layout, so that a copy of it is an outputs
folder. Besides, every stage has a `files.json` there, with the sha256 of all its files, written
first, and `result.json` last: the stage is there completely or not at all. Of a cached stage only
what is small is fetched (`SMALL`), the rest when something is computed from it, verified file by
file.

For outputs in an ordinary folder everything here does nothing.
"""

import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from data.catalogue import FILE_NAME as CATALOGUE
from data.manifest import FILE_NAME as MANIFEST
from data.patience import Patience
from training import remote_checkpoints, remote_store, store
from training.lock import locked
from training.remote_lock import Lease, leased, owner_of
from training.remote_store import ONCE, Inventory, LostError, Store, is_address, tidy_address
from training.stage_files import (
    CHECKPOINTS,
    HARDWARE,
    NOT_FETCHED,
    TRACKING,
    FileRecord,
    OutputsError,
    digest_of,
    lies_elsewhere,
    sha256_of,
    sha256_of_bytes,
)
from training.stages import STAGES
from training.store import StageRequest, StageResult, write_atomically

logger = logging.getLogger(__name__)

MARKER = ".address.json"
"""File of a folder that is kept for an address: that, and a name of the folder's own."""

CACHE_VARIABLE = "ROTVIT_CACHE"
"""Environment variable for where such folders are; else below the user's cache directory."""

RESULT, INVENTORY = "result.json", "files.json"

SMALL = (
    *("config.yaml", HARDWARE, "metrics.jsonl", "resumes.json", CATALOGUE, MANIFEST),
    "index.html",
)
"""What is fetched of a cached stage: what keys, tables, charts and the page are made of."""

_LEFT_OUT = re.compile(r"prefect-[^/]*\.json|\.[^/]*|result\.json[^/]*|(files|not-fetched)\.json")
_FOLDERS_LEFT_OUT = (CHECKPOINTS, TRACKING, "fetched")

AT_THE_START = Patience(attempts=3)
"""How often a store is asked that has not answered yet."""

_AT_ONCE = 8
_SMALL_BYTES = 2**24
"""Files up to this size are sent or fetched several at once; libraries divide larger ones."""

_RECORD = ("config.yaml", "run.json", "report/index.html", "results.json")
"""Files of a run's record, in the order in which they are stored."""


def local_folder(outputs: Path | str) -> Path:
    """Return the folder on this computer in which outputs are computed, absolute.

    Of a path that is the path itself, of an address a folder of its own, which is made.

    Raises:
        OutputsError: If it is an address that outputs cannot have, or the folder cannot be made.
    """
    place = str(outputs)
    if not is_address(place):
        return Path(place).expanduser().resolve()
    address = tidy_address(place)
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "rotation-vit"
    name = re.sub(r"[^\w.-]+", "-", remote_store.without_login(address))[:60]
    folder = Path(os.environ.get(CACHE_VARIABLE) or caches).expanduser().resolve()
    folder = folder / f"{name}-{digest_of(address)[:12]}"
    draft = folder / f"{MARKER}.{uuid.uuid4().hex}"
    try:
        if not (folder / MARKER).is_file():
            folder.mkdir(parents=True, exist_ok=True)
            draft.touch(mode=0o600)  # an address may have a password in it
            draft.write_text(json.dumps({"address": address, "folder": uuid.uuid4().hex}))
            with suppress(FileExistsError):  # of two at once, the first names it
                (folder / MARKER).hardlink_to(draft)
            draft.unlink()
    except OSError as error:
        raise OutputsError(
            f"The folder for the outputs of {remote_store.without_login(address)} on this computer "
            f"must be writable, {folder} is not: {error.strerror}. Choose another place with "
            f"{CACHE_VARIABLE}."
        ) from error
    return folder


def address_of(outputs: Path) -> str:
    """Return the address that a folder is kept for, or else its path; as it may be shown."""
    mirror = _mirror(outputs)
    return mirror.store.shown if mirror else str(outputs)


def check(outputs: Path) -> None:
    """Make sure that the store of an outputs folder can be read and written.

    Raises:
        OutputsError: If it cannot.
    """
    if mirror := _mirror(outputs):
        mirror.check()


def look(request: StageRequest) -> None:
    """Let a stage's directory be as the store has it, as far as that is small.

    What is there already stays, if the store has no other result. A damaged one in the store does
    not count.

    Raises:
        OutputsError: If the store fails.
    """
    if mirror := _mirror(request.outputs):
        mirror.look(request)


def is_stored(request: StageRequest) -> bool:
    """Whether the store had the result that is here, when it was last looked at."""
    mirror = _mirror(request.outputs)
    return mirror is None or mirror.is_stored(request.directory)


def newest_step(request: StageRequest) -> int | None:
    """Return the step of the newest checkpoint in the store, for a stage that trains."""
    mirror = _mirror(request.outputs)
    if mirror is None or not STAGES[request.stage].trains:
        return None
    return remote_checkpoints.newest_step(mirror.store, _place(request.directory))


def fetch_inputs(request: StageRequest) -> None:
    """Fetch all that a stage is computed from.

    Raises:
        LostError: If some of it is damaged or gone in the store. Whoever looks at that stage again
            finds that it is missing.
        OutputsError: If the store fails.
    """
    for item in request.inputs.values():
        # A download is read where images are prepared; others see what it says about itself.
        if not item.stage.startswith("download") or request.stage.startswith("prepare"):
            fetch(item.directory)


def fetch(directory: Path) -> None:
    """Fetch all files of a finished stage that are not here; see `fetch_inputs`.

    Args:
        directory: Of the stage, `<outputs>/<stage>/<key>`.
    """
    if mirror := _mirror(directory.parent.parent):
        mirror.fetch(directory)


def bring(directory: Path) -> None:
    """Fetch all of a stage of which only the directory is known, if the store has it."""
    if mirror := _mirror(directory.parent.parent):
        mirror.adopt(directory)
        mirror.fetch(directory)


def compute_once(
    request: StageRequest, compute: Callable[[StageRequest], StageResult]
) -> StageResult:
    """Compute a stage and store it, unless another machine does or has done so.

    Args:
        request: For the stage; its inputs have been fetched.
        compute: Computes it in its directory.

    Returns:
        What `compute` returned, or the result that is there.

    Raises:
        OutputsError: If the store fails.
        Exception: What `compute` raises.
    """
    mirror = _mirror(request.outputs)
    return mirror.compute_once(request, compute) if mirror else compute(request)


@contextmanager
def alone_with(request: StageRequest) -> Iterator[None]:
    """Let no other machine compute a stage during the `with` block.

    Raises:
        OutputsError: If the store fails.
    """
    mirror = _mirror(request.outputs)
    if mirror is None:
        yield
        return
    with mirror.lease(request):
        yield


def refreshed_by(request: StageRequest) -> str:
    """Return what `note_refresh` was last given for a stage, by any machine; empty for nothing.

    Raises:
        OutputsError: If the store fails.
    """
    mirror = _mirror(request.outputs)
    place = _refresh_note(request)
    content = mirror.store.read(place) if mirror else _read(request.outputs / place)
    return (content or b"").decode()


def note_refresh(request: StageRequest, run_id: str) -> None:
    """Remember which flow run had a stage computed again.

    Raises:
        OutputsError: If the store fails.
    """
    place, content = _refresh_note(request), run_id.encode()
    if mirror := _mirror(request.outputs):
        mirror.store.write(place, content)
    else:
        write_atomically(request.outputs / place, content)


def forget(request: StageRequest) -> None:
    """Remove what the store has of a stage, checkpoints included; call it in `alone_with`."""
    if mirror := _mirror(request.outputs):
        mirror.forget(request.directory)


def store_record(directory: Path, *, must: bool) -> None:
    """Store the record of a run.

    Args:
        directory: `<outputs>/runs/<name>`.
        must: Whether it is an error if it cannot be; a warning otherwise.

    Raises:
        OutputsError: If it cannot, and must.
    """
    if mirror := _mirror(directory.parent.parent):
        try:
            mirror.store_record(directory, patient=must)
        except OutputsError as error:
            if must:
                raise
            logger.warning("The record of the run is not stored yet: %s", error)


def fetch_record(directory: Path) -> None:
    """Bring the record of a run, if the store has it.

    Args:
        directory: `<outputs>/runs/<name>`.

    Raises:
        OutputsError: If the store fails.
    """
    if mirror := _mirror(directory.parent.parent):
        mirror.fetch_record(directory)


class _Mirror:
    """A folder that is kept for an address."""

    def __init__(self, folder: Path, address: str, name: str) -> None:
        self._folder, self._name = folder, name
        self._store = Store(address, remote_store.PATIENCE)
        self._is_reached = self._can_be_written = False
        self._stored: dict[str, str] = {}
        """Sha256 of the result that the store has, by the stage's place."""
        self._distrusted: set[str] = set()
        """Sha256 of results in the store whose files turned out to be damaged."""
        self._sent: dict[str, bytes] = {}
        """What was last stored of records, by name."""

    @property
    def store(self) -> Store:
        """The store, asked less often until it has answered once: the address may be misspelt."""
        return self._store if self._is_reached else self._store.patient(AT_THE_START)

    def check(self) -> None:
        if self._can_be_written:
            return
        is_exclusive = self.store.try_out()
        self._is_reached = self._can_be_written = True
        if not is_exclusive:
            logger.warning(
                "The store of %s may write over what is there although it is asked not to: of two "
                "runs at once on one stage, both may compute it.",
                self.store.shown,
            )

    def look(self, request: StageRequest) -> None:
        directory = request.directory
        if self.adopt(directory) and store.inspect(request).stale == "damaged":
            # Sound in the store; nothing has to be computed again.
            logger.warning(
                "%s is damaged on this computer; it is fetched again from %s.",
                request.title,
                self.store.shown,
            )
            self._mark(directory, self.store.read(f"{_place(directory)}/{INVENTORY}"))

    def adopt(self, directory: Path) -> bool:
        """Take over the result that the store has, and what is small; say whether it has one."""
        place = _place(directory)
        problem: LostError | None = None
        for _ in range(2):  # it may be stored anew just now
            content = self.store.read(f"{place}/{RESULT}")
            self._is_reached = True
            if content is None or sha256_of_bytes(content) in self._distrusted:
                problem = None
                break
            try:
                if _read(directory / RESULT) != content:
                    self._adopt(directory, place, content)
            except LostError as error:
                problem = error
                continue
            self._stored[place] = sha256_of_bytes(content)
            return True
        if problem:
            logger.warning("%s at %s is damaged: %s.", place, self.store.shown, problem)
        self._stored.pop(place, None)
        (directory / NOT_FETCHED).unlink(missing_ok=True)  # nothing vouches for what is not here
        return False

    def _adopt(self, directory: Path, place: str, result: bytes) -> None:
        content = self.store.read(f"{place}/{INVENTORY}")
        inventory = Inventory.read(content)
        if inventory.result != sha256_of_bytes(result):
            raise LostError("its files.json belongs to another result")
        sizes = self.store.sizes(place)
        for name, record in inventory.files.items():
            if name not in sizes:
                raise LostError(f"{name} is gone")
            if sizes[name] != record.size:
                raise LostError(f"{name} has {sizes[name]} bytes instead of {record.size}")
        if (directory / RESULT).exists():  # of another computation
            shutil.rmtree(directory)
        for name in SMALL:
            if name in inventory.files:
                record = inventory.files[name]
                remote_store.fetch(self.store, f"{place}/{name}", directory / name, record)
        self._mark(directory, content)
        write_atomically(directory / RESULT, result)

    def _mark(self, directory: Path, inventory: bytes | None) -> None:
        if inventory is not None:
            write_atomically(directory / NOT_FETCHED, inventory)

    def is_stored(self, directory: Path) -> bool:
        result = _read(directory / RESULT)
        return result is not None and self._stored.get(_place(directory)) == sha256_of_bytes(result)

    def fetch(self, directory: Path) -> None:
        if not lies_elsewhere(directory):
            return
        place = _place(directory)
        inventory = Inventory.read(_read(directory / NOT_FETCHED))
        wanted = {
            name: record
            for name, record in inventory.files.items()
            if not _is_here(directory / name, record)
        }
        logger.info("Fetching %s of %s from %s.", _amount(wanted.values()), place, self.store.shown)

        def fetch(name: str) -> None:
            remote_store.fetch(self.store, f"{place}/{name}", directory / name, wanted[name])

        try:
            _each(fetch, wanted)
        except LostError as error:
            self._distrusted.add(inventory.result)
            with suppress(OutputsError):  # of who may only read: others find out by themselves
                if sha256_of_bytes(self.store.read(f"{place}/{RESULT}") or b"") == inventory.result:
                    for what in (RESULT, INVENTORY):  # or its maker would find all of it there
                        self.store.remove(f"{place}/{what}")
            raise LostError(
                f"{place} at {self.store.shown} is damaged: {error}. The same command computes it "
                "again."
            ) from error
        (directory / NOT_FETCHED).unlink(missing_ok=True)

    def compute_once(
        self, request: StageRequest, compute: Callable[[StageRequest], StageResult]
    ) -> StageResult:
        directory = request.directory
        while True:
            with self.lease(request) as lease:
                self.look(request)
                result = store.inspect(request).result
                if result is None:
                    self._withdraw(_place(directory))
                    result = self._compute(request, compute, lease)
                if self._publish(request, lease):
                    return result
            logger.warning(
                "Another run has taken over %s, as this one gave no sign of life; the result of "
                "that one counts.",
                request.title,
            )
            self._stored.pop(_place(directory), None)

    def _withdraw(self, place: str) -> None:
        """Let the store have no result that has to be computed again.

        Else whoever looks at the stage while it is computed, or after a stop, would put that one in
        the place of the work on the new one.
        """
        content = self.store.read(f"{place}/{RESULT}")
        if content is None:
            return
        # The checkpoints of a damaged one are as good as ever, of an outdated one they are as old.
        is_damaged = sha256_of_bytes(content) in self._distrusted
        self._clear(place, keep=CHECKPOINTS if is_damaged else "")
        self._stored.pop(place, None)

    def _compute(
        self,
        request: StageRequest,
        compute: Callable[[StageRequest], StageResult],
        lease: Lease,
    ) -> StageResult:
        if not STAGES[request.stage].trains:
            return compute(request)
        place, directory = _place(request.directory), request.directory
        remote_checkpoints.fetch_newest(self.store, place, directory)
        with remote_checkpoints.Uploads(self.store, place, directory, request.title, lease):
            return compute(request)

    @contextmanager
    def lease(self, request: StageRequest) -> Iterator[Lease]:
        """Hold the lease of a stage's key, waiting for it."""
        name = f"locks/{_place(request.directory).replace('/', '-')}"
        # With a lock that the kernel drops, nobody waits for a lease of who died on this machine.
        owner = owner_of(self._folder, self._name)
        with (
            locked(self._folder / f"{name}.lease", what=request.title),
            leased(self.store, name, owner=owner, what=request.title) as lease,
        ):
            yield lease

    def _publish(self, request: StageRequest, lease: Lease) -> bool:
        """Store a result; say whether it counts, which it does not where the lease was lost."""
        directory, place = request.directory, _place(request.directory)
        if self.is_stored(directory):
            return True
        result = (directory / RESULT).read_bytes()
        inventory = _take_stock(directory, result)
        content = inventory.as_bytes()
        there: dict[str, int] = {}
        begun = self.store.read(f"{place}/{INVENTORY}") == content
        if begun and sha256_of_bytes(result) not in self._distrusted:
            there = self.store.sizes(place)  # by an attempt that was cut off
        else:
            if not lease.is_held():
                return False
            self._clear(place, keep=CHECKPOINTS)
            self.store.write(f"{place}/{INVENTORY}", content)
        wanted = {
            name: record
            for name, record in inventory.files.items()
            if there.get(name) != record.size
        }
        _each(lambda name: self.store.upload(directory / name, f"{place}/{name}"), wanted)
        if not lease.is_held():
            return False
        self.store.write(f"{place}/{RESULT}", result)
        self._stored[place] = sha256_of_bytes(result)
        self._distrusted.discard(sha256_of_bytes(result))
        logger.info(
            "%s is stored at %s/%s: %s.",
            request.title,
            self.store.shown,
            place,
            _amount(inventory.files.values()),
        )
        if STAGES[request.stage].trains:  # as on disk: see runner.run_stage
            with suppress(OutputsError):
                remote_checkpoints.prune(self.store, place, request.stage == "pretrain")
        return True

    def forget(self, directory: Path) -> None:
        self._clear(_place(directory))
        self._stored.pop(_place(directory), None)

    def _clear(self, place: str, keep: str = "") -> None:
        # First what makes the others count.
        for name in (RESULT, INVENTORY):
            self.store.remove(f"{place}/{name}")
        for name in sorted(self.store.sizes(place), key=lambda name: not name.endswith(INVENTORY)):
            if not keep or not name.startswith(f"{keep}/"):
                self.store.remove(f"{place}/{name}")

    def store_record(self, directory: Path, *, patient: bool) -> None:
        store = self.store if patient else self.store.patient(ONCE)
        # A log of its own for every machine; it has written no other.
        names = {"log.txt": f"log-{self._name[:8]}.txt", **{name: name for name in _RECORD}}
        for name, stored_as in names.items():
            content = _read(directory / name)
            stored_as = f"runs/{directory.name}/{stored_as}"
            if content is None or self._sent.get(stored_as) == content:
                continue
            if name == "results.json":  # the command in run.json is for this machine
                content_there = _replaced(content, str(self._folder), self.store.shown)
            else:
                content_there = content
            store.write(stored_as, content_there)
            self._sent[stored_as] = content

    def fetch_record(self, directory: Path) -> None:
        for name in _RECORD:
            content = self.store.read(f"runs/{directory.name}/{name}")
            if content is not None:
                if name == "results.json":
                    content = _replaced(content, self.store.shown, str(self._folder))
                write_atomically(directory / name, content)


_mirrors: dict[Path, _Mirror] = {}


def _mirror(outputs: Path) -> _Mirror | None:
    """Return what keeps a folder for an address; None for an ordinary folder."""
    if outputs not in _mirrors:
        content = _read(outputs / MARKER)
        if content is None:
            return None
        found = json.loads(content)
        _mirrors[outputs] = _Mirror(outputs, found["address"], found["folder"])
    return _mirrors[outputs]


def _place(directory: Path) -> str:
    """Return the name of a stage's directory in the store."""
    return f"{directory.parent.name}/{directory.name}"


def _refresh_note(request: StageRequest) -> str:
    return f"locks/{_place(request.directory).replace('/', '-')}.refreshed"


def _take_stock(directory: Path, result: bytes) -> Inventory:
    """Return what a finished stage's directory holds.

    Raises:
        OutputsError: If a file is not the one that the result vouches for.
    """
    vouched = StageResult.model_validate_json(result).files
    files = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        left_out = name.split("/")[0] in _FOLDERS_LEFT_OUT or _LEFT_OUT.fullmatch(name)
        if left_out or not path.is_file():
            continue
        status = path.stat()
        record = FileRecord(
            sha256=sha256_of(path), size=status.st_size, modified_ns=status.st_mtime_ns
        )
        if name in vouched and vouched[name].sha256 != record.sha256:
            raise OutputsError(f"{path} is damaged, and not stored. Run the same command again.")
        files[name] = record
    return Inventory(result=sha256_of_bytes(result), files=files)


def _each(action: Callable[[str], None], files: dict[str, FileRecord]) -> None:
    """Do something for each file: several small ones at once, large ones one by one."""
    small = [name for name, record in files.items() if record.size <= _SMALL_BYTES]
    pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="outputs")
    try:
        for _ in pool.map(action, small):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
    for name in files.keys() - set(small):
        action(name)


def _is_here(path: Path, record: FileRecord) -> bool:
    """Whether a file is as it was made; its time is set to what it was then, too."""
    with suppress(FileNotFoundError):
        if path.stat().st_size == record.size and sha256_of(path) == record.sha256:
            remote_store.set_time(path, record)
            return True
    return False


def _amount(records: Iterable[FileRecord]) -> str:
    sizes = [record.size for record in records]
    return f"{len(sizes):,} files, {sum(sizes) / 10**6:,.1f} MB"


def _replaced(content: bytes, old: str, new: str) -> bytes:
    """Return JSON in which paths below one place are below another."""
    return content.replace(json.dumps(old)[1:-1].encode(), json.dumps(new)[1:-1].encode())


def _read(path: Path) -> bytes | None:
    with suppress(FileNotFoundError, NotADirectoryError):
        return path.read_bytes()
    return None
