"""A store at an address, such as `s3://bucket/prefix`: whole objects, asked for with patience.

All that is used of it: read, write, write only what is not there yet, list, remove. Everything goes
through fsspec, so that an address may be of any kind that it knows.
"""

import logging
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from data.patience import Patience
from training.stage_files import FULL_DISK, FileRecord, OutputsError, sha256_of, sync_path

logger = logging.getLogger(__name__)

T = TypeVar("T")

PATIENCE = Patience()
"""How often a store is asked that fails: eight times, in two minutes and its library's own time."""

ONCE = Patience(attempts=1)
"""For what is asked again later anyway."""

UNMENDABLE = frozenset(
    {
        *("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"),
        *("ProfileNotFound", "NoRegionError", "ParamValidationError", "InvalidRegionError"),
        *("UnauthorizedSSOTokenError", "SSOTokenLoadError", "TokenRetrievalError"),
        *("DefaultCredentialsError", "ClientAuthenticationError"),
    }
)
"""Errors of the libraries of S3, Google Cloud Storage and Azure that another attempt cannot mend:
by name, as none of these libraries has to be installed."""

_FOLDERS = ("file", "local")


class StoreAwayError(OutputsError):
    """A store failed as often as it was asked. May go better later."""


def is_address(place: str) -> bool:
    """Whether a place is an address, and not a path on this computer."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", place) is not None and ":/" in place


def tidy_address(place: str) -> str:
    """Return an address in the one form that all spellings of it have.

    Raises:
        OutputsError: If it is none that outputs can have.
    """
    # With one slash where it has been a `Path` on the way.
    found = re.fullmatch(r"([A-Za-z][A-Za-z0-9+.-]+):/(/?)(.*)", place)
    scheme = found[1].lower() if found else ""
    if not found or scheme in ("http", "https"):
        raise OutputsError(
            f"An address for outputs must be one of a store that can be written, such as "
            f"s3://bucket/prefix or gs://bucket/prefix; got {without_login(place)!r}."
        )
    rest = found[3].rstrip("/")
    if scheme in _FOLDERS:
        rest = os.path.abspath(rest if found[2] else f"/{rest}")  # noqa: PTH100 (follows no links)
    if not rest.strip("/"):
        raise OutputsError(f"An address for outputs must name a place, got {place!r}.")
    return f"{scheme}://{rest}"


class Store:
    """Objects below an address, by their names: `pretrain/<key>/result.json`.

    An object is written whole or not at all. Used by several threads at once.
    """

    def __init__(self, address: str, patience: Patience = PATIENCE) -> None:
        """Find the library for an address; nothing is asked of the store yet.

        Args:
            address: As `tidy_address` returns it.
            patience: How often a store is asked that fails.

        Raises:
            OutputsError: If there is no such kind of address, or it needs one more package.
        """
        import fsspec

        self.address = address
        self._patience = patience
        try:
            # What others write must be seen at once.
            self._files, root = fsspec.core.url_to_fs(address, use_listings_cache=False)
        except ImportError as error:
            extra = " (pip install 'rotation-vit[s3]')" if address.startswith("s3") else ""
            raise OutputsError(f"{self.shown} needs one more package: {error}{extra}.") from error
        except ValueError as error:
            raise OutputsError(
                f"The outputs' address must be of a kind that fsspec knows, {self.shown} is not: "
                f"{error}."
            ) from error
        self._root = root.rstrip("/")
        self._has_folders = not self._files.async_impl
        self._is_folder = address.partition(":")[0] in _FOLDERS
        # What fsspec does for libraries that have no way of their own to write only what is new:
        # sftp, smb, ftp and hdfs, among others. Two at once both find nothing, and both write.
        self._looks_before_it_writes = (
            self._has_folders
            and not self._is_folder
            and type(self._files).pipe_file is fsspec.AbstractFileSystem.pipe_file
        )

    @property
    def shown(self) -> str:
        """The address, as it may be shown."""
        return without_login(self.address)

    def patient(self, patience: Patience) -> "Store":
        """Return the same store, asked with another patience."""
        return Store(self.address, patience)

    def read(self, name: str) -> bytes | None:
        """Return an object's content; None where there is none."""

        def read() -> bytes | None:
            with suppress(FileNotFoundError):
                return bytes(self._files.cat_file(self._path(name)))
            return None

        return self._persist(read, name)

    def write(self, name: str, content: bytes) -> None:
        """Write an object, in place of one that is there."""

        def write() -> None:
            with self._placed(name) as path:
                self._files.pipe_file(path, content)

        self._persist(write, name)

    def create(self, name: str, content: bytes) -> bool:
        """Write an object unless there is one of that name; of several at once one succeeds.

        S3 and its like are asked with `If-None-Match: *`, Google Cloud Storage with
        `ifGenerationMatch=0`, a folder with `O_EXCL`. A store that knows none of that overwrites,
        or looks first and then writes, so that several at once may succeed: see `try_out`.

        Args:
            name: Of the object.
            content: Must differ from what anybody else writes.

        Returns:
            Whether the object is the one that was to be written.
        """

        def create() -> bool:
            path = self._path(name)
            if self._has_folders:
                self._files.makedirs(self._parent(path), exist_ok=True)
            if self._is_folder:
                return self._create_file(path, content)
            try:
                self._files.pipe_file(path, content, mode="create")
            except Exception as error:
                # Stores differ in how they say that it is there, and one whose answer was lost has
                # been asked again by its library: then what is there is ours.
                try:
                    found = bytes(self._files.cat_file(path))
                except FileNotFoundError:
                    raise error from None
                return found == content
            return True

        return self._persist(create, name)

    def try_out(self) -> bool:
        """Write, read, replace and remove an object; say whether `create` can be relied upon.

        Returns:
            Whether of several that create an object at once only one succeeds, as far as the store
            and its library show.

        Raises:
            OutputsError: If any of it is not possible.
        """
        name = f"locks/probe-{uuid.uuid4().hex}"
        is_made = self.create(name, b"first")
        is_exclusive = not self.create(name, b"second") and not self._looks_before_it_writes
        last = b"third"
        self.write(name, last)
        found = self.read(name)
        self.remove(name)
        if not is_made or found != last:
            raise OutputsError(
                f"The store of outputs must have what was written last, {self.shown} has {found!r} "
                f"instead of {last!r}: its library does not replace what is there. Choose an "
                "address of another kind, such as s3://bucket/prefix or a shared folder."
            )
        return is_exclusive

    def _create_file(self, path: str, content: bytes) -> bool:
        try:
            file = self._files.open(path, "xb")
        except FileExistsError:
            return bytes(self._files.cat_file(path)) == content
        try:
            with file:
                file.write(content)
        except BaseException:  # a full disk takes the name and not the content
            with suppress(Exception):
                self._files.rm_file(path)
            raise
        return True

    def sizes(self, folder: str) -> dict[str, int]:
        """Return the objects below a folder: their names, from there on, and sizes in bytes."""

        def sizes() -> dict[str, int]:
            start = self._path(folder).rstrip("/")
            try:
                found = self._files.find(start, detail=True)
            except FileNotFoundError:
                return {}
            return {
                name.removeprefix(f"{start}/"): int(details["size"])
                for name, details in found.items()
                if details["type"] == "file"
            }

        return self._persist(sizes, folder)

    def upload(self, path: Path, name: str) -> None:
        """Write a file's content as an object."""

        def upload() -> None:
            with self._placed(name) as target:
                self._files.put_file(str(path), target)

        self._persist(upload, name)

    def download(self, name: str, path: Path) -> bool:
        """Write an object's content to a file; say whether there is one."""

        def download() -> bool:
            try:
                self._files.get_file(self._path(name), str(path))
            except FileNotFoundError:
                return False
            return True

        return self._persist(download, name)

    def remove(self, name: str) -> None:
        """Remove an object, if it is there."""

        def remove() -> None:
            with suppress(FileNotFoundError):
                self._files.rm_file(self._path(name))

        self._persist(remove, name)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    @staticmethod
    def _parent(path: str) -> str:
        return path.rpartition("/")[0]

    @contextmanager
    def _placed(self, name: str) -> Iterator[str]:
        """Yield where to write an object so that it gets its name when it is whole."""
        path = self._path(name)
        if not self._has_folders:  # such stores take an object whole or not at all
            yield path
            return
        self._files.makedirs(self._parent(path), exist_ok=True)
        folder, _, last = path.rpartition("/")
        unfinished = f"{folder}/.{last}.{uuid.uuid4().hex}"
        try:
            yield unfinished
            self._files.mv(unfinished, path)
        except BaseException:
            with suppress(Exception):
                self._files.rm_file(unfinished)
            raise

    def _persist(self, action: Callable[[], T], name: str) -> T:
        """Do something that may fail for a while.

        Raises:
            StoreAwayError: If it failed as often as the patience goes.
            OutputsError: If another attempt cannot mend it.
        """
        for failures in range(1, self._patience.attempts + 1):
            try:
                return action()
            except Exception as error:  # the libraries of stores have errors of their own
                if not _may_pass(error) or failures == self._patience.attempts:
                    kind = StoreAwayError if _may_pass(error) else OutputsError
                    raise kind(self._explain(error, name)) from error
                seconds = self._patience.wait(failures, None)
                logger.warning(
                    "%s/%s: %s. Next attempt in %.0f s.", self.shown, name, _reason(error), seconds
                )
                time.sleep(seconds)
        raise AssertionError("the last attempt returns or raises")

    def _explain(self, error: Exception, name: str) -> str:
        if _may_pass(error):
            way_out = "Look at the network and run the same command again; it goes on there."
        elif _is_full(error):
            way_out = (
                "Free some space, there or in the folder for it on this computer, and run the same "
                "command again; what is finished is kept."
            )
        else:
            way_out = (
                "Look at the address and at the credentials: s3:// takes those of "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, of AWS_PROFILE, or of the machine's "
                "role, gs:// Google's application default credentials."
            )
        return (
            f"The outputs at {self.shown} must be readable and writable; {name} is not: "
            f"{_reason(error)}. {way_out}"
        )


def _may_pass(error: Exception) -> bool:
    if isinstance(error, (PermissionError, FileNotFoundError, ImportError, TypeError)):
        return False
    if _is_full(error):
        return False
    return UNMENDABLE.isdisjoint(kind.__name__ for kind in type(error).__mro__)


def _is_full(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in FULL_DISK


def without_login(address: str) -> str:
    """Return a text with addresses in it without passwords.

    What stands alone before an @ is no secret: a user, or the container of `abfs://`. A password
    may have an @ in it, so that it goes on to the last one before the path.
    """
    return re.sub(r"(://[^/:@\s]*):[^/\s]*@", r"\1:***@", address)


def _reason(error: Exception) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return without_login(text).rstrip(": .")


class LostError(OutputsError):
    """What a store has is not what was stored."""


class Inventory(BaseModel):
    """The files of something that is stored as a whole."""

    model_config = ConfigDict(extra="forbid")

    result: str = ""
    """Sha256 of the `result.json` that they belong to; empty for a checkpoint."""
    files: dict[str, FileRecord]
    """By their names below the folder."""

    @classmethod
    def read(cls, content: bytes | None) -> Self:
        """Return what was written.

        Raises:
            LostError: If it is missing or cannot be read, or names what is outside of its folder.
        """
        if content is None:
            raise LostError("files.json is gone")
        try:
            found = cls.model_validate_json(content)
        except ValidationError as error:
            raise LostError(f"files.json cannot be read: {error.errors()[0]['msg']}") from error
        for name in found.files:
            if name.startswith("/") or ".." in name.split("/"):
                raise LostError(f"files.json names {name!r}, which is outside of its folder")
        return found

    def as_bytes(self) -> bytes:
        """Return what is to be written."""
        return self.model_dump_json(indent=1).encode()


def fetch(store: Store, name: str, path: Path, record: FileRecord) -> None:
    """Write an object to a file, verified, with the time that it had.

    Raises:
        LostError: If the object is gone or damaged.
        OutputsError: If the store fails.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        for _ in range(2):  # the first copy may have been damaged on its way
            if not store.download(name, draft):
                raise LostError(f"{name} is gone")
            if draft.stat().st_size == record.size and sha256_of(draft) == record.sha256:
                break
        else:
            raise LostError(f"{name} is damaged: its sha256 is not the recorded one")
        set_time(draft, record)
        sync_path(draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def set_time(path: Path, record: FileRecord) -> None:
    """Give a file the time that it had: large ones are recognised by it."""
    if record.modified_ns is not None:
        os.utime(path, ns=(record.modified_ns, record.modified_ns))
