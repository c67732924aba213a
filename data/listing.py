"""From the name of a remote source to its catalogue, before any image is fetched.

Of a table only the last bytes are read: they say how many rows it has, which columns, and what the
classes are called. So what a source lacks is known before the gigabytes have come.
"""

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any

from data import hub
from data.archives import unsafe_name
from data.catalogue import Catalogue, RemoteFile
from data.parquet_source import class_names, divide, image_column, label_column
from data.patience import DownloadError, Patience, Stop, check_stop, persist
from data.records import DatasetError, Split
from data.remote_files import Found, find, read_range
from data.specs import KNOWN, Archive

KEEP_BYTES = 10 * 10**9
"""Sources up to this size are downloaded whole; of larger ones each file is fetched as it is read,
and deleted then, so that nobody needs 150 GB twice."""

FOOTER_BYTES = 2**16
"""How much of a file's end is read at first; enough for most descriptions of a table."""

_AT_ONCE = 8
_log = logging.getLogger(__name__)


def list_source(spec: str, patience: Patience, stop: Stop) -> Catalogue:
    """Find out what a remote source holds.

    A source with an archive elsewhere is taken from there if its tables cannot be listed.

    Args:
        spec: Value of `data.source`, for which `data.specs.is_remote` holds.
        patience: How often and how long servers are asked.
        stop: Asked while waiting; true ends it.

    Raises:
        DatasetError: If it is not there, may not be read, or holds no images in tables.
        DownloadError: If its servers do not answer as often as they are asked.
        InterruptedError: If `stop` said so.
    """
    archive = KNOWN[spec].archive if spec in KNOWN else None
    if archive is None:
        return _list_tables(spec, patience, stop)
    try:
        return _list_tables(spec, replace(patience, attempts=min(3, patience.attempts)), stop)
    except (DownloadError, DatasetError) as error:
        _log.warning("%s Taking %s from %s instead.", error, spec, archive.url)
        return list_archive(spec, archive, patience, stop)


def list_archive(spec: str, archive: Archive, patience: Patience, stop: Stop) -> Catalogue:
    """Return what a source holds that is taken from its archive; errors as `list_source`."""
    (found,) = persist(lambda: find(archive.url, patience), archive.url, patience, stop)
    return Catalogue(
        spec=spec,
        origin=archive.url,
        files=[
            RemoteFile(
                name=archive.url.rpartition("/")[2],
                url=archive.url,
                size=found.size,
                checksum=archive.checksum,
            )
        ],
        counts=KNOWN[spec].counts,
        class_names=list(archive.classes.values()),
        layout="archive",
        root=archive.root,
        folders=list(archive.classes),
    )


def _list_tables(spec: str, patience: Patience, stop: Stop) -> Catalogue:
    if spec.startswith("parquet:"):
        origin, files = spec.partition(":")[2], _list_address(spec, patience, stop)
    else:
        origin, files = hub.list_files(spec, patience, stop)
    for file in files:
        reason = unsafe_name(file.name)
        if reason:
            raise DatasetError(f"{spec} must have plain names of files, {file.name!r}: {reason}.")
    footers = _read_footers(files, patience, stop)
    files = [
        replace(file, rows=int(footer.num_rows))
        for file, footer in zip(files, footers, strict=True)
    ]
    features = features_of(footers[0])
    image, label = image_column(spec, features), label_column(features)
    names = class_names(features, label)
    for file, footer in zip(files, footers, strict=True):
        other = features_of(footer)
        if image not in other or (label is not None and other.get(label) != features[label]):
            raise DatasetError(
                f"{spec} must have the same columns and classes in all files, {file.name} has "
                f"{other} and {files[0].name} has {features}."
            )
    kept = sum(file.size for file in files) <= KEEP_BYTES
    if not kept and label is not None and names is None:
        _log.warning(
            "%s: the classes must be declared in the files (ClassLabel) where they are too large "
            "to be kept; it is read without labels.",
            spec,
        )
        label = None
    counts = {split: sum(f.rows for f in files if f.split == split) for split in _splits(files)}
    if spec in KNOWN and counts != KNOWN[spec].counts:
        _log.warning("%s has %s images here, published are %s.", spec, counts, KNOWN[spec].counts)
    return Catalogue(
        spec=spec,
        origin=origin,
        files=files,
        counts=counts,
        class_names=names,
        kept=kept,
        image=image,
        label=label,
    )


def _splits(files: Sequence[RemoteFile]) -> list[Split]:
    return list(dict.fromkeys(file.split for file in files if file.split is not None))


def _list_address(spec: str, patience: Patience, stop: Stop) -> list[RemoteFile]:
    pattern = spec.partition(":")[2]
    found = persist(lambda: find(pattern, patience), pattern, patience, stop)
    if not found:
        raise DatasetError(f"{spec} must match Parquet files; none match.")
    names = _short_names(found)
    return [
        RemoteFile(
            name=names[number],
            url=found[number].url,
            size=found[number].size,
            version=found[number].version,
            split=split,
        )
        for split, numbers in divide(spec, [name.rpartition("/")[2] for name in names]).items()
        for number in numbers
    ]


def _short_names(found: Sequence[Found]) -> list[str]:
    """Return the files' names, with as many folders as tell them apart."""
    parts = [each.url.partition("?")[0].split("/") for each in found]
    depth = 1
    while len({"/".join(part[-depth:]) for part in parts}) < len(parts):
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]


def _read_footers(files: Sequence[RemoteFile], patience: Patience, stop: Stop) -> list[Any]:
    """Return the descriptions of all files; the first error ends the reading of the others."""
    failed = threading.Event()

    def stopped() -> bool:
        return failed.is_set() or stop()

    pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="footers")
    try:
        jobs = [pool.submit(_read_footer, file, patience, stopped) for file in files]
        waiting = set(jobs)
        while waiting:
            done, waiting = wait(jobs, timeout=0.2, return_when=FIRST_EXCEPTION)
            check_stop(stop, f"the descriptions of {len(files)} files")
            for job in done:
                job.result()
        return [job.result() for job in jobs]
    finally:
        # One that waits for a server ends by itself, nobody waits for it.
        failed.set()
        pool.shutdown(wait=False, cancel_futures=True)


def _read_footer(file: RemoteFile, patience: Patience, stop: Stop) -> Any:
    """Return the description at the end of a Parquet file."""
    import pyarrow
    import pyarrow.parquet

    def tail(length: int) -> bytes:
        start = max(0, file.size - length)
        return persist(
            lambda: read_range(file.url, start, file.size, patience, stop),
            file.name,
            patience,
            stop,
        )

    def read() -> Any:
        content = tail(FOOTER_BYTES)
        needed = int.from_bytes(content[-8:-4], "little") + 8
        if content[-4:] == b"PAR1" and len(content) < needed <= file.size:
            content = tail(needed)
        return pyarrow.parquet.read_metadata(pyarrow.BufferReader(content[-needed:]))

    try:
        return read()
    except pyarrow.ArrowException:
        _log.warning("%s: its end is no table's; reading it once more.", file.name)
    try:
        return read()  # a part of a file cannot be verified, so one wrong one proves nothing
    except pyarrow.ArrowException as error:
        raise DatasetError(
            f"{file.url} must be a Parquet file, it is not: {str(error).rstrip('.')}."
        ) from error


def features_of(footer: Any) -> Any:
    """Return the columns of a table, by its description, as `datasets` knows them."""
    import datasets

    return datasets.Features.from_arrow_schema(footer.schema.to_arrow_schema())
