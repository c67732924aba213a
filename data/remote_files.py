"""Reading files at addresses, one attempt at a time: HTTP with ranges, the rest through fsspec.

HTTP goes through the session of `huggingface_hub`, which honours proxies and `HF_HUB_OFFLINE`. The
Hub's token is sent to the Hub alone; a redirect to another host drops it.
"""

import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.patience import (
    Patience,
    RefusedError,
    Stop,
    TryAgainError,
    asked_wait,
    check_stop,
    never,
    persist,
    try_again,
)
from data.records import DatasetError
from data.shards import written_whole

CHUNK = 2**22
"""Bytes that are read at once from a store other than HTTP: each is a request, which waits some
30 ms, and must come within `BLOCK_SECONDS`, also over a slow link."""

BLOCK_SECONDS = 20.0
"""Longest time that a store other than HTTP may take for one part of a file; shorter than the 25 s
that a stopped stage has."""


@dataclass(frozen=True, slots=True)
class Stream:
    """An opened file."""

    start: int
    """Where the bytes begin: what was asked for, or 0 where the server cannot."""
    size: int | None
    """Bytes of the whole file; None if the server does not say."""
    version: str | None
    """What the server calls this content; None if it does not say."""
    chunks: Iterator[bytes]


@dataclass(frozen=True, slots=True)
class Found:
    """A file that is there."""

    url: str
    size: int
    version: str | None


@contextmanager
def opened(
    url: str, patience: Patience, *, start: int = 0, end: int | None = None, version: str = ""
) -> Iterator[Stream]:
    """Open a file at an address.

    Args:
        url: `https://`, or any other address that fsspec knows.
        patience: Over HTTP its `stall_seconds` bounds every wait for bytes; the library of another
            store has time limits of its own.
        start: First byte wanted.
        end: Byte to end before; None for the end of the file.
        version: Content that the bytes before `start` are of; with another one the server begins
            at 0.

    Raises:
        TryAgainError: If the server or the network failed, also while the bytes are read.
        RefusedError: If the server refuses.
        DatasetError: If the address is none, or its store needs one more package.
    """
    if not _is_http(url):
        with ExitStack() as stack:
            with _errors_of_fsspec(url):
                filesystem, path = _filesystem(url)
                details = filesystem.info(path)
                file = stack.enter_context(filesystem.open(path, "rb", cache_type="none"))
                file.seek(start)
            # What the caller does with the pieces is no error of the store.
            wanted = (details["size"] if end is None else end) - start
            yield Stream(start, details["size"], _version(details), _pieces(url, file, wanted))
        return
    headers = {"Accept-Encoding": "identity", **_hub_headers(url)}
    if start or end is not None:
        headers["Range"] = f"bytes={start}-{'' if end is None else end - 1}"
    if start and version:
        headers["If-Range"] = version
    with (
        _errors_of_http(url),
        _session().stream(
            "GET", url, headers=headers, timeout=patience.stall_seconds, follow_redirects=True
        ) as response,
    ):
        _check_status(response, url)
        begins, size = _extent(response)
        etag = response.headers.get("ETag", "")
        # Weak tags promise no equal bytes.
        known = etag if etag and not etag.startswith("W/") else None
        # As they come: pieces of a fixed size would keep back what came before a cut.
        yield Stream(begins, size, known, response.iter_raw())


def watched(chunks: Iterator[bytes], what: str, patience: Patience, stop: Stop) -> Iterator[bytes]:
    """Yield pieces as long as they come fast enough and nobody asks for a stop.

    Both are looked at after a piece, which the caller has by then.

    Args:
        chunks: Of a `Stream`.
        what: What they are of, for messages.
        patience: `least_bytes` must come in `stall_seconds`.
        stop: True ends it.

    Raises:
        TryAgainError: If next to nothing comes.
        InterruptedError: If `stop` said so.
    """
    since, came = time.monotonic(), 0
    for piece in chunks:
        yield piece
        check_stop(stop, what)
        came += len(piece)
        now = time.monotonic()
        if now - since > patience.stall_seconds:
            if came < patience.least_bytes:
                raise TryAgainError(f"only {came} bytes came in {now - since:.0f} s")
            since, came = now, 0


def read_range(url: str, start: int, end: int, patience: Patience, stop: Stop = never) -> bytes:
    """Return the bytes from `start` to before `end`; errors as those of `opened` and `watched`."""
    with opened(url, patience, start=start, end=end) as stream:
        if stream.start != start:
            raise DatasetError(
                f"The server of {url} must send parts of files, it sends whole ones only. "
                "Download the file yourself and use parquet:<path>."
            )
        content = b"".join(watched(stream.chunks, url, patience, stop))
    if len(content) != end - start:
        raise TryAgainError(f"{len(content)} bytes came instead of {end - start}")
    return content


def read_block(url: str, start: int, end: int, patience: Patience, stop: Stop = never) -> bytes:
    """Return the bytes from `start` to before `end` of a large file, by one request.

    Nothing is asked about the file before, as is done by `read_range`, whose errors this raises.
    """
    if _is_http(url):
        return read_range(url, start, end, patience, stop)
    with _errors_of_fsspec(url, once_good=True):
        filesystem, path = _shared_filesystem(url)
        if filesystem.async_impl:
            from fsspec.asyn import sync

            # Cancelled where it takes too long, which the library of a store need not do.
            content: bytes = sync(
                filesystem.loop,
                filesystem._cat_file,
                path,
                start=start,
                end=end,
                timeout=BLOCK_SECONDS,
            )
        else:
            content = filesystem.cat_file(path, start=start, end=end)
    if len(content) != end - start:
        raise TryAgainError(f"{len(content)} bytes came instead of {end - start}")
    return content


def read_whole(url: str, patience: Patience, stop: Stop = never) -> bytes:
    """Return the content of a small file; errors as those of `opened` and `watched`."""
    with opened(url, patience) as stream:
        content = b"".join(watched(stream.chunks, url, patience, stop))
    if stream.size not in (None, len(content)):
        raise TryAgainError(f"{len(content)} bytes came instead of {stream.size}")
    return content


def put(path: Path, url: str) -> None:
    """Copy a file to an address, over what is there.

    Raises:
        TryAgainError: If the store or the network failed, or the copy has another length.
        RefusedError: If the store refuses, or is a web server.
        DatasetError: If the address is none, or its store needs one more package.
    """
    check_writable(url)
    with _errors_of_fsspec(url):
        filesystem, remote = _filesystem(url)
        if not filesystem.async_impl:  # those that are have no folders
            filesystem.makedirs(filesystem._parent(remote), exist_ok=True)
        if url.startswith("file:"):  # whole or not at all there too, and safe from a loss of power
            with written_whole(Path(remote)) as target, path.open("rb") as file:
                shutil.copyfileobj(file, target)
        else:
            filesystem.put_file(str(path), remote)
    size = size_at(url)
    if size != path.stat().st_size:
        raise TryAgainError(f"the copy has {size} bytes instead of {path.stat().st_size}")


def sha256_at(url: str, patience: Patience, stop: Stop = never) -> str:
    """Return the SHA-256 of a file at an address, which is read in full.

    Args:
        url: Where it is.
        patience: How often and how long the store is asked.
        stop: Asked while waiting; true ends it with `InterruptedError`.

    Raises:
        DownloadError: If every attempt failed.
        RefusedError: If the store refuses, or has no such file.
        DatasetError: If the address is none.
    """

    def compute() -> str:
        digest = hashlib.sha256()
        with opened(url, patience) as stream:
            for piece in watched(stream.chunks, url, patience, stop):
                digest.update(piece)
        return digest.hexdigest()

    return persist(compute, url, patience, stop)


def check_writable(url: str) -> None:
    """Raise if files cannot be put at an address, as far as the address says.

    Raises:
        RefusedError: If it is one of a web server.
    """
    if _is_http(url):
        raise RefusedError(
            f"Files must be put into a store such as s3://, gs:// or file://, web servers as that "
            f"of {url} take none."
        )


def size_at(url: str) -> int | None:
    """Return the length of a file in a store other than HTTP, or None if it is not there.

    Raises:
        TryAgainError: As `opened`.
        RefusedError: As `opened`.
        DatasetError: As `opened`.
    """
    with _errors_of_fsspec(url):
        filesystem, path = _filesystem(url)
        try:
            filesystem.invalidate_cache()  # what was listed before it was written
            return int(filesystem.info(path)["size"])
        except FileNotFoundError:
            return None


def find(pattern: str, patience: Patience) -> list[Found]:
    """Return the files that an address names, in the order of their names.

    Args:
        pattern: An address; with `*` and the like where the kind of store can be listed, which
            HTTP cannot.
        patience: As that of `opened`.

    Raises:
        TryAgainError: If the server or the network failed.
        DatasetError: If the server refuses, or the pattern is one of HTTP.
    """
    if _is_http(pattern):
        if re.search(r"[*\[\]]", pattern):
            raise DatasetError(
                f"An address of one Parquet file must have no wildcards, got {pattern!r}: web "
                "servers do not list their files. Use hub:<owner>/<name>, or name one file as "
                "source and another one as test_source."
            )
        with opened(pattern, patience, end=1) as stream:
            if stream.size is None:
                raise DatasetError(f"The server of {pattern} must say how long the file is.")
            return [Found(pattern, stream.size, stream.version)]
    with _errors_of_fsspec(pattern):
        filesystem, path = _filesystem(pattern)
        details = filesystem.glob(path, detail=True)
        return [
            Found(filesystem.unstrip_protocol(name), found["size"], _version(found))
            for name, found in sorted(details.items())
            if found["type"] == "file"
        ]


def _is_http(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def _session() -> Any:
    from huggingface_hub import get_session

    return get_session()


def _hub_headers(url: str) -> dict[str, str]:
    from huggingface_hub import constants
    from huggingface_hub.utils._headers import build_hf_headers

    if not url.startswith(f"{constants.ENDPOINT}/"):
        return {}
    return dict(build_hf_headers(library_name="rotation-vit"))


@contextmanager
def _errors_of_http(url: str) -> Iterator[None]:
    from huggingface_hub import errors

    try:
        yield
    except errors.OfflineModeIsEnabled as error:
        raise offline(url) from error
    except errors.HTTPError as error:  # type: ignore[attr-defined]  # the HTTP client's, whichever
        raise try_again(error) from error


def offline(what: str) -> RefusedError:
    """Return the error of a download that the environment forbids."""
    return RefusedError(
        f"{what} must be downloaded, and HF_HUB_OFFLINE forbids it. Unset it for this run; "
        "afterwards the images are on this computer."
    )


def gated(repository: str) -> RefusedError:
    """Return the error of a data set on the Hub whose terms must be accepted first."""
    from huggingface_hub import constants, get_token

    page = f"{constants.ENDPOINT}/datasets/{repository}"
    if get_token() is None:
        return RefusedError(
            f"{repository} is given only to those who accepted its terms, and there is no token. "
            f"Open {page}, log in and accept them, then set HF_TOKEN to a token of that account "
            f"({constants.ENDPOINT}/settings/tokens)."
        )
    return RefusedError(
        f"{repository} is given only to those who accepted its terms, and the account of this "
        f"token has not, or the token may not read it. Open {page}, accept the terms, and set "
        "HF_TOKEN to a token of that account with the right to read gated repositories."
    )


def _check_status(response: Any, url: str) -> None:
    status = response.status_code
    if status in (200, 206):
        return
    if status in (408, 416, 425, 429) or status >= 500:
        wait = asked_wait(response.headers.get("Retry-After"))
        raise TryAgainError(f"the server answered {status} {response.reason_phrase}", wait)
    found = re.search(r"/datasets/([^/]+/[^/]+)/resolve/", url)
    if found and response.headers.get("X-Error-Code") == "GatedRepo":
        raise gated(found[1])
    hint = " The address may be misspelt, or need a login." if status in (401, 403, 404) else ""
    message = f"{url} must be readable, the server answered {status}.{hint}"
    raise RefusedError(message, missing=status == 404)


def _extent(response: Any) -> tuple[int, int | None]:
    """Return where the content begins and how long the whole file is."""
    if response.status_code == 206:
        found = re.fullmatch(
            r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", "").strip()
        )
        if not found:
            raise TryAgainError("the server does not say which part of the file it sends")
        return int(found[1]), int(found[2])
    length = response.headers.get("Content-Length", "")
    return 0, int(length) if length.isdigit() else None


def _filesystem(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise DatasetError(f"{url} needs one more package: {error}") from error
    except ValueError as error:
        raise DatasetError(f"{url} must be an address that fsspec knows: {error}") from error
    return filesystem, path


_stores: dict[str, Any] = {}
os.register_at_fork(after_in_child=_stores.clear)  # a child has not the thread that serves them


def _shared_filesystem(url: str) -> tuple[Any, str]:
    """Return a store for all threads, where its library allows that, and the path in it.

    fsspec makes one for each thread otherwise, with connections of its own.
    """
    scheme, _, rest = url.partition("://")
    place = f"{scheme}://{rest.partition('/')[0]}"
    filesystem = _stores.get(place)
    if filesystem is not None:
        return filesystem, filesystem._strip_protocol(url)
    filesystem, path = _filesystem(url)
    if filesystem.async_impl:  # its work is done in a thread of its own, whoever asks
        _stores[place] = filesystem
    return filesystem, path


def _pieces(url: str, file: Any, wanted: int) -> Iterator[bytes]:
    while wanted > 0:
        with _errors_of_fsspec(url):
            piece = file.read(min(CHUNK, wanted))
        if not piece:
            return
        wanted -= len(piece)
        yield piece


def _version(details: dict[str, Any]) -> str | None:
    for name in ("ETag", "etag", "md5Hash", "LastModified", "updated", "mtime"):
        if details.get(name):
            return str(details[name]).strip('"')
    return None


@contextmanager
def _errors_of_fsspec(url: str, *, once_good: bool = False) -> Iterator[None]:
    """Turn what the library of a store raises into our errors.

    Args:
        url: What was to be reached.
        once_good: Whether the same has worked before, so that what nobody knows may pass.
    """
    try:
        yield
    except (FileNotFoundError, PermissionError) as error:
        raise RefusedError(
            f"{url} must be readable, it is not: {error}. Look at the address and at the "
            "credentials of its store.",
            missing=isinstance(error, FileNotFoundError),
        ) from error
    except OSError as error:
        raise try_again(error) from error
    except DatasetError:
        raise
    except Exception as error:  # the library of a store has errors of its own
        status = getattr(error, "status", None) or getattr(error, "code", None)
        if once_good and status not in (401, 403, 404):
            raise try_again(error) from error
        reason = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(": .")
        raise RefusedError(f"{url} must be readable, its store's library says {reason}.") from error
