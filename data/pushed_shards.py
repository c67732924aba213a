"""Prepared images at an address: copied there with a digest of every image, and taken from there.

An address gets what a prepared directory holds, the images' digests beside every shard, and last of
all `pushed.json`, which makes it count. The directory gets the digests and `pushed.json` too; it
needs its pixels no more, then. Another machine can take everything but the pixels from there.
"""

import hashlib
import io
import json
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from data import manifest
from data.jpeg_shards import JpegShard
from data.manifest import Manifest, ShardEntry
from data.patience import Patience, RefusedError, Stop, check_stop, never, persist
from data.records import DatasetError
from data.remote_files import check_writable, put, read_whole, sha256_at, size_at
from data.shard_cache import digest_of_image
from data.shards import (
    SUFFIXES,
    PixelFormat,
    file_sha256,
    pixels_path,
    record_path,
    write_json,
    written_whole,
)
from data.specs import is_url

FILE_NAME = "pushed.json"
"""Written last, here and there."""

FORMAT = 1
"""Raised when the layout at an address changes."""

_INDEX = ".index"


@dataclass(frozen=True, slots=True)
class Pushed:
    """Where the pixels of a prepared directory lie, and how to tell that they are these."""

    format: int
    """Layout at the address."""
    address: str
    """Of the folder that has the shards."""
    fingerprint: str
    """Of the manifest."""
    indexes: Mapping[str, str]
    """SHA-256 of the file of digests of each shard, by the shard's name."""

    def url(self, entry: ShardEntry, pixel_format: PixelFormat) -> str:
        """Return the address of a shard's pixels."""
        return f"{self.address}/{entry.name}{SUFFIXES[pixel_format]}"


def checked_address(given: str) -> str:
    """Return an address as it is written down: of a path on this computer `file://…`.

    Raises:
        DatasetError: If it has a user, a password or a query, which would be written down, too.
    """
    if not is_url(given):
        return Path(given).expanduser().resolve().as_uri()
    address = given.rstrip("/")
    parts = urlsplit(address)
    if parts.username or parts.password or parts.query or parts.fragment:
        raise DatasetError(
            "An address of shards is written down, so it must have no user, password or query; the "
            "library of its store finds credentials in the environment. Got one with them, of "
            f"{parts.scheme}://{parts.hostname or ''}{parts.path}."
        )
    return address


def index_path(directory: Path, name: str) -> Path:
    """Return where the digests of the images of shard `name` lie."""
    return directory / f"{name}{_INDEX}"


def read(directory: Path) -> Pushed | None:
    """Return what `pushed.json` of a directory says, or None if there is none.

    Raises:
        DatasetError: If it cannot be read.
    """
    try:
        written = (directory / FILE_NAME).read_bytes()
    except FileNotFoundError:
        return None
    return _parsed(written, str(directory / FILE_NAME))


def read_index(directory: Path, name: str, pushed: Pushed) -> NDArray[np.uint64] | None:
    """Return where a shard's images begin and their digests, or None if the file is damaged.

    Returns:
        `(n + 1, 2)`: first byte in the file of pixels and digest of each image; in the last row
        where the last image ends, and nothing.
    """
    try:
        written = index_path(directory, name).read_bytes()
    except OSError:
        return None
    if hashlib.sha256(written).hexdigest() != pushed.indexes.get(name):
        return None
    return np.load(io.BytesIO(written))  # type: ignore[no-any-return]


def push(
    directory: Path,
    address: str,
    *,
    report: Callable[[int, int], None],
    patience: Patience,
    stop: Stop = never,
) -> Pushed:
    """Copy a finished prepared directory to an address, from where it can be read.

    Shards are read once in full and held against their SHA-256 before they go. What is there
    already, from an earlier attempt, stays.

    Args:
        directory: What `data.prepare` has finished; with all pixels.
        address: A folder that any store which fsspec can write to has or makes.
        report: Called after every shard with the number of bytes done and in all.
        patience: How often the store is asked.
        stop: Asked between shards; true ends it.

    Raises:
        DatasetError: If a shard is damaged, other images are at the address, or the store refuses.
        DownloadError: If the store fails as often as it is asked.
        InterruptedError: If `stop` said so.
    """
    address = checked_address(address)
    check_writable(address)
    found = manifest.read(directory)
    before = None
    with suppress(DatasetError):  # one that cannot be read, or is of another version, is replaced
        before = _read_at(address, patience, stop)
    if before is not None and before.fingerprint != found.fingerprint:
        raise DatasetError(
            f"{address} must be empty or hold these images, it holds others. Delete it, or push to "
            "another address."
        )
    entries = found.entries
    total, done = sum(entry.size for entry in entries), 0
    indexes = {}
    for entry in entries:
        check_stop(stop, entry.name)
        indexes[entry.name] = _write_index(directory, entry, found.pixel_format)
        _push_shard(directory, entry, found.pixel_format, address, patience, stop)
        done += entry.size
        report(done, total)
    pushed = Pushed(FORMAT, address, found.fingerprint, indexes)
    _put(directory / manifest.FILE_NAME, address, patience, stop)
    write_json(directory / FILE_NAME, asdict(pushed))
    _put(directory / FILE_NAME, address, patience, stop)
    return pushed


def check_there(directory: Path, pushed: Pushed, *, patience: Patience, stop: Stop = never) -> None:
    """Read all pixels at the address, and hold them against what the manifest here says of them.

    Args:
        directory: That was pushed.
        pushed: Where to.
        patience: How often the store is asked.
        stop: Asked while waiting; true ends it.

    Raises:
        DatasetError: If others are there, or the store refuses.
        DownloadError: If the store fails as often as it is asked.
        InterruptedError: If `stop` said so.
    """
    found = manifest.read(directory)
    for entry in found.entries:
        url = pushed.url(entry, found.pixel_format)
        if sha256_at(url, patience, stop) != entry.sha256:
            raise DatasetError(
                f"{url} must be as it was prepared, it has another SHA-256. Delete it there, and "
                "push again; nothing was deleted here."
            )


def check_complete(
    directory: Path, pushed: Pushed, *, patience: Patience, stop: Stop = never
) -> None:
    """Look whether all pixels are at the address still, by their sizes.

    Args:
        directory: That was pushed, and whose pixels are deleted.
        pushed: Where to.
        patience: How often the store is asked.
        stop: Asked while waiting; true ends it.

    Raises:
        DatasetError: If some are not, or the store refuses.
        DownloadError: If the store fails as often as it is asked.
        InterruptedError: If `stop` said so.
    """
    found = manifest.read(directory)
    for entry in found.entries:
        url = pushed.url(entry, found.pixel_format)
        if persist(partial(size_at, url), url, patience, stop) != entry.size:
            raise DatasetError(
                f"{url} must be as it was pushed, with {entry.size:,} bytes; it is not, and the "
                f"pixels are deleted here. Delete {directory}, prepare the images once more, and "
                "push them."
            )


def take(
    address: str,
    directory: Path,
    *,
    made_from: str,
    report: Callable[[int, int], None],
    patience: Patience,
    stop: Stop = never,
) -> Manifest | None:
    """Make `directory` a prepared one whose pixels are at an address, if they are there.

    Args:
        address: Of a folder, as `push` was given it.
        directory: Made if missing; only one process may write to it.
        made_from: What the manifest there must say that the images were made from.
        report: Called after every shard with the number of images that are known and in all.
        patience: How often the store is asked.
        stop: Asked between shards; true ends it.

    Returns:
        The manifest, or None if nothing was pushed there.

    Raises:
        DatasetError: If other images are there, files do not fit each other, or the store refuses.
        DownloadError: If the store fails as often as it is asked.
        InterruptedError: If `stop` said so.
    """
    address = checked_address(address)
    pushed = _read_at(address, patience, stop)
    if pushed is None:
        return None
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as aside:  # it declares a directory finished
        path = Path(aside) / manifest.FILE_NAME
        _get(f"{address}/{path.name}", path, patience, stop)
        found = manifest.read(path.parent)
    if (found.made_from, found.fingerprint) != (made_from, pushed.fingerprint):
        raise DatasetError(
            f"{address} must hold images made from this source with these settings, it holds "
            "others. Delete it and push again, or leave it out."
        )
    total, done = sum(found.counts.values()), 0
    for entry in found.entries:
        for path, sha256 in (
            (record_path(directory, entry.name), entry.record_sha256),
            (index_path(directory, entry.name), pushed.indexes.get(entry.name)),
        ):
            check_stop(stop, entry.name)
            if not (path.is_file() and file_sha256(path) == sha256):
                _get(f"{address}/{path.name}", path, patience, stop)
            if file_sha256(path) != sha256:
                raise DatasetError(
                    f"{address}/{path.name} must be as it was pushed, it has another SHA-256. "
                    "Push again from the machine that prepared the images."
                )
        done += entry.images
        report(done, total)
    write_json(directory / FILE_NAME, {**asdict(pushed), "address": address})
    manifest.write(directory, found)
    return found


def _push_shard(
    directory: Path,
    entry: ShardEntry,
    pixel_format: PixelFormat,
    address: str,
    patience: Patience,
    stop: Stop,
) -> None:
    pixels = pixels_path(directory, entry.name, pixel_format)
    index = index_path(directory, entry.name)

    def is_there() -> bool:
        # The digests go after the pixels: where they are the same, the pixels are whole.
        if size_at(f"{address}/{pixels.name}") != entry.size or not size_at(
            f"{address}/{index.name}"
        ):
            return False
        return read_whole(f"{address}/{index.name}", patience, stop) == index.read_bytes()

    if not persist(is_there, f"{address}/{index.name}", patience, stop):
        for path in (pixels, record_path(directory, entry.name), index):
            _put(path, address, patience, stop)


def _write_index(directory: Path, entry: ShardEntry, pixel_format: PixelFormat) -> str:
    """Write a shard's digests, and return the SHA-256 of the file."""
    path = pixels_path(directory, entry.name, pixel_format)
    if not path.is_file() or file_sha256(path) != entry.sha256:
        raise DatasetError(
            f"{path} must be there as it was prepared, to be pushed. Where it is damaged, the "
            "prepare-data stage computes it again; where it was pushed and deleted, the images can "
            "be copied from the address that they are at."
        )
    begins = _begins(path, entry.images, pixel_format)
    index = np.zeros((entry.images + 1, 2), dtype="<u8")
    index[:, 0] = begins
    with path.open("rb") as file:
        file.seek(int(begins[0]))
        for number, size in enumerate(np.diff(begins)):
            index[number, 1] = digest_of_image(file.read(int(size)))
    target = index_path(directory, entry.name)
    with written_whole(target) as written:
        np.save(written, index)
    return file_sha256(target)


def _begins(path: Path, images: int, pixel_format: PixelFormat) -> NDArray[np.int64]:
    """Return where the images of a shard begin in its file, then where the last one ends."""
    if pixel_format == "jpeg":
        return JpegShard(path, images, side=1).begins
    mapped = np.load(path, mmap_mode="r")
    size = int(np.prod(mapped.shape[1:]))
    return np.arange(images + 1, dtype=np.int64) * size + path.stat().st_size - images * size


def _read_at(address: str, patience: Patience, stop: Stop) -> Pushed | None:
    url = f"{address}/{FILE_NAME}"
    try:
        written = persist(lambda: read_whole(url, patience, stop), url, patience, stop)
    except RefusedError as error:
        if error.missing:
            return None
        raise
    return _parsed(written, url)


def _parsed(written: bytes, where: str) -> Pushed:
    try:
        pushed = Pushed(**json.loads(written))
        if pushed.format != FORMAT:
            raise ValueError(f"format {pushed.format} instead of {FORMAT}")
    except (ValueError, TypeError) as error:
        raise DatasetError(
            f"{where} must say where prepared images lie, as this version writes it; reading it "
            f"failed: {error}. Push them again."
        ) from error
    return pushed


def _put(path: Path, address: str, patience: Patience, stop: Stop) -> None:
    url = f"{address}/{path.name}"
    persist(lambda: put(path, url), url, patience, stop)


def _get(url: str, path: Path, patience: Patience, stop: Stop) -> None:
    content = persist(lambda: read_whole(url, patience, stop), url, patience, stop)
    with written_whole(path) as file:
        file.write(content)
