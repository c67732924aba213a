"""Downloading remote sources into one directory: catalogue first, then the files that are kept."""

import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from data import catalogue
from data.archives import extract
from data.catalogue import Catalogue, checksum_of, count_files, folder_of, kept_files
from data.fetching import STAGE, fetch
from data.listing import features_of, list_archive, list_source
from data.parquet_source import class_names, values_in
from data.patience import DownloadError, Patience, RefusedError, Stop, never
from data.records import DatasetError
from data.shards import digest_of
from data.specs import KNOWN

_GB = 10**9
_log = logging.getLogger(__name__)


def download(
    specs: Sequence[str],
    directory: Path,
    *,
    report: Callable[[int, int], None],
    patience: Patience,
    stop: Stop = never,
    stage: str = STAGE,
) -> list[Catalogue]:
    """Make `directory` hold what `specs` name, or, of what is too large, what it consists of.

    Cut off, it goes on with the same commit of the same data set, from the byte where it was. A
    directory that was finished once needs the network only for what is missing or damaged.

    A source with an archive elsewhere is taken from there, as a whole, if its tables cannot be
    fetched. From then on it is pinned to the archive.

    Args:
        specs: Sources for which `data.specs.is_remote` holds.
        directory: Made if missing. Only one download may write to it at a time.
        report: Called with the number of bytes that are there and in all, of files that are kept.
        patience: How often and how long servers are asked.
        stop: Asked often; true ends it, what came is kept.
        stage: What to refresh where a publisher has replaced a file, for messages.

    Returns:
        One catalogue for each of `specs`, as written.

    Raises:
        DatasetError: If a source is not there, may not be read, holds no images, or does not fit
            on the disk.
        DownloadError: If a server fails as often as it is asked.
        InterruptedError: If `stop` said so.
    """
    directory.mkdir(parents=True, exist_ok=True)
    begun = _begun(specs, directory)
    found = begun or [list_source(spec, patience, stop) for spec in specs]
    if not begun:
        catalogue.write(directory, found)
    _check_disk(directory, found)

    def fetch_files(number: int) -> None:
        kept = [each.size if each.kept else 0 for each in found]
        before, total = sum(kept[:number]), sum(kept)
        for file in found[number].files:

            def tell(done: int, before: int = before) -> None:
                report(before + done, total)

            if not _is_unpacked(directory, found[number]):
                target = folder_of(directory, found[number].spec) / file.name
                fetch(file, target, patience=patience, stop=stop, report=tell, stage=stage)
            before += file.size
            report(before, total)

    for number, each in enumerate(found):
        if not each.kept:
            continue
        try:
            fetch_files(number)
        except (DownloadError, RefusedError) as error:
            archive = _archive_instead(directory, each, error, patience, stop)
            if archive is None:
                raise
            # What came is of no use, and goes first: cut off here, the tables are tried once more.
            shutil.rmtree(folder_of(directory, each.spec), ignore_errors=True)
            found[number] = archive
            catalogue.write(directory, found)
            _check_disk(directory, found)
            fetch_files(number)
    found = [_completed(each, directory, stop) for each in found]
    catalogue.write(directory, found)
    return found


def digest(catalogues: Sequence[Catalogue]) -> str:
    """Return what tells the content of these sources from other content."""
    return digest_of([each.identity() for each in catalogues])


def _begun(specs: Sequence[str], directory: Path) -> list[Catalogue] | None:
    """Return the catalogues of an earlier attempt."""
    try:
        found = catalogue.read(directory)
    except DatasetError:
        return None
    return found if [each.spec for each in found] == list(specs) else None


def _archive_instead(
    directory: Path, lost: Catalogue, error: Exception, patience: Patience, stop: Stop
) -> Catalogue | None:
    """Return where else to take a source from whose tables could be listed and not fetched.

    None where there is no other place, or where it cannot be had either; and where the tables were
    here as a whole once: other files would make all outdated that was computed from them.
    """
    archive = KNOWN[lost.spec].archive if lost.spec in KNOWN else None
    if archive is None or lost.layout == "archive" or catalogue.was_finished(directory, lost):
        return None
    try:
        fewer = replace(patience, attempts=min(3, patience.attempts))  # one has been waited for
        found = list_archive(lost.spec, archive, fewer, stop)
    except (DownloadError, DatasetError) as other:
        _log.warning("%s cannot be taken from its archive either: %s", lost.spec, other)
        return None
    _log.warning("%s Taking %s from %s instead, as a whole.", error, lost.spec, archive.url)
    return found


def _completed(found: Catalogue, directory: Path, stop: Stop) -> Catalogue:
    """Return the catalogue with what only the files themselves tell."""
    folder = folder_of(directory, found.spec)
    if found.layout == "archive":
        root = folder / found.root
        if not _is_unpacked(directory, found):
            archive = KNOWN[found.spec].archive
            assert archive is not None
            (file,) = found.files
            extract(
                folder / file.name,
                folder / "unpacked",
                most_files=archive.most_files,
                most_bytes=archive.most_bytes,
                stop=stop,
            )
            shutil.rmtree(root, ignore_errors=True)
            (folder / "unpacked" / found.root).replace(root)
            (folder / file.name).unlink()
        return replace(found, unpacked=count_files(root))
    if not found.kept:
        return found
    _check_tables(found, directory)
    if found.label is not None and found.class_names is None:
        paths = [folder / file.name for file in found.files_of("train")]
        values = values_in(paths, found.label)
        found = replace(found, values=values, class_names=[str(value) for value in values])
    files = [
        file
        if file.checksum
        else replace(file, checksum=checksum_of(folder / file.name, "sha256:"))
        for file in found.files
    ]
    return replace(found, files=files)


def _check_tables(found: Catalogue, directory: Path) -> None:
    """Hold what was listed against the files, which are verified, while the list was not."""
    import pyarrow
    import pyarrow.parquet

    for path, file in zip(kept_files(directory, found), found.files, strict=True):
        try:
            footer = pyarrow.parquet.read_metadata(path)
            names = class_names(features_of(footer), found.label)
            if footer.num_rows == file.rows and (names or found.class_names) == found.class_names:
                continue
            reason = f"{footer.num_rows} images with classes {names}"
        except pyarrow.ArrowException as error:
            reason = str(error)
        (directory / catalogue.FILE_NAME).unlink()  # the next attempt lists anew
        raise DownloadError(
            f"{file.url} must be what was listed, {file.rows} images with classes "
            f"{found.class_names}; it is {reason}. Run the same command again."
        )


def _is_unpacked(directory: Path, found: Catalogue) -> bool:
    if found.layout != "archive" or not found.unpacked:
        return False
    root = folder_of(directory, found.spec) / found.root
    return count_files(root) == list(found.unpacked)


def _check_disk(directory: Path, found: Sequence[Catalogue]) -> None:
    missing = sum(
        file.size
        for each in found
        if each.kept and not _is_unpacked(directory, each)
        for file in each.files
        if not (folder_of(directory, each.spec) / file.name).is_file()
    )
    free = shutil.disk_usage(directory).free
    if missing > free:
        raise DatasetError(
            f"The download needs {missing / _GB:.1f} GB, the disk of {directory} has "
            f"{free / _GB:.1f} GB free. Free some space, or choose another --outputs directory."
        )
