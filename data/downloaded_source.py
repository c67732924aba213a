"""Images that were downloaded, or that are fetched file by file as they are read."""

import logging
import shutil
import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from data.catalogue import Catalogue, RemoteFile, folder_of
from data.fetching import STAGE, fetch
from data.folder_source import EXTENSIONS, SPLIT_NAMES
from data.parquet_source import read_rows
from data.patience import Patience, Stop, check_stop, never
from data.records import DatasetError, Record, Source, Split, spread

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scratch:
    """Where and how files are fetched that are not kept.

    Attributes:
        directory: Folder for two files at a time; made, and removed with what is left in it.
        patience: How often and how long servers are asked.
        stop: Asked while waiting; true ends it.
        stage: What to refresh where a publisher has replaced a file, for messages.
    """

    directory: Path
    patience: Patience
    stop: Stop = never
    stage: str = STAGE

    def remove(self) -> None:
        """Remove the folder, once everything is read."""
        shutil.rmtree(self.directory, ignore_errors=True)


class DownloadedSource(Source):
    """The source behind a catalogue."""

    def __init__(
        self, catalogue: Catalogue, directory: Path, scratch: Scratch | None = None
    ) -> None:
        """Take a finished download.

        Args:
            catalogue: One of `catalogue.read(directory)`.
            directory: Of the download.
            scratch: For files that are not kept; None if no image will be read.
        """
        self.spec = catalogue.spec
        self.counts = catalogue.counts
        self.class_names = catalogue.class_names
        self._catalogue, self._scratch = catalogue, scratch
        self._folder = folder_of(directory, catalogue.spec)
        values: Sequence[Any] = catalogue.values or range(len(self.class_names or ()))
        self._labels = {value: number for number, value in enumerate(values)}
        if not catalogue.kept:
            self.sample_place = "its first file"

    def identity(self) -> dict[str, Any]:
        """Return what the catalogue says about the content; no place and no time."""
        return self._catalogue.identity()

    def records(self, split: Split, start: int = 0) -> Iterator[Record]:
        """Yield the images of `split` in the order of the files and of the rows in them.

        Raises:
            DatasetError: If a file is damaged or a server refuses.
            DownloadError: If a file must be fetched and cannot be.
            InterruptedError: If the scratch's `stop` said so.
        """
        if self._catalogue.layout == "archive":
            yield from self._unpacked(split)[start:]
            return
        first, jobs = 0, []
        for file in self._catalogue.files_of(split):
            skipped = min(file.rows, max(0, start - first))
            if skipped < file.rows:
                jobs.append((file, first + skipped, skipped))
            first += file.rows
        paths = self._paths([file for file, _, _ in jobs])
        try:
            for path, (_, number, skip) in zip(paths, jobs, strict=True):
                yield from self._rows(path, split, number, skip)
        finally:
            paths.close()

    def sample(self, split: Split, count: int) -> Iterator[Record]:
        """Yield images that stand for all of `split`: of files that are not kept, of the first.

        It stays in the scratch folder, where `records` finds it and deletes it when it is read.

        Raises:
            DatasetError: As `records`.
            DownloadError: As `records`.
            InterruptedError: As `records`.
        """
        if self._catalogue.kept:
            yield from super().sample(split, count)
            return
        scratch, file = self._scratch_folder(), self._catalogue.files_of(split)[0]
        _log.info(
            "Fetching %s (%.0f MB), to begin with and for a sample.", file.name, file.size / 1e6
        )
        path = _fetch(file, scratch, scratch.stop)
        for start, length in spread(file.rows, count):
            yield from islice(self._rows(path, split, start, start), length)

    def _rows(self, path: Path, split: Split, number: int, skip: int) -> Iterator[Record]:
        return read_rows(
            path,
            split,
            number,
            skip=skip,
            image=self._catalogue.image,
            label=self._catalogue.label,
            values=self._labels,
        )

    def _paths(self, files: Sequence[RemoteFile]) -> Generator[Path, None, None]:
        if self._catalogue.kept:
            yield from (self._folder / file.name for file in files)
            return
        yield from _fetched(files, self._scratch_folder())

    def _scratch_folder(self) -> Scratch:
        if self._scratch is None:
            raise DatasetError(f"{self.spec} is too large to be kept, and has no scratch folder.")
        return self._scratch

    def _unpacked(self, split: Split) -> list[Record]:
        root = self._folder / self._catalogue.root
        named = [name for name, ours in SPLIT_NAMES.items() if ours == split]
        part = next((root / name for name in named if (root / name).is_dir()), root)
        return [
            Record(f"{part.name}/{folder}/{path.name}", path, label)
            for label, folder in enumerate(self._catalogue.folders)
            for path in sorted((part / folder).iterdir())
            if path.suffix.lower() in EXTENSIONS
        ]


def _fetch(file: RemoteFile, scratch: Scratch, stop: Stop) -> Path:
    """Return where a file lies, once it is there."""
    target = scratch.directory / file.name
    fetch(file, target, patience=scratch.patience, stop=stop, stage=scratch.stage)
    return target


def _fetched(files: Sequence[RemoteFile], scratch: Scratch) -> Generator[Path, None, None]:
    """Yield where each file lies while it is needed; the next one is fetched meanwhile."""
    closing = threading.Event()

    def job(file: RemoteFile) -> Path:
        return _fetch(file, scratch, lambda: closing.is_set() or scratch.stop())

    executor = ThreadPoolExecutor(1, thread_name_prefix="fetch")
    try:
        coming = executor.submit(job, files[0]) if files else None
        for number, file in enumerate(files):
            assert coming is not None
            path = _result(coming, file, scratch)
            if number + 1 < len(files):
                coming = executor.submit(job, files[number + 1])
            yield path
            path.unlink(missing_ok=True)
    finally:
        closing.set()
        executor.shutdown(wait=True)


def _result(coming: "Future[Path]", file: RemoteFile, scratch: Scratch) -> Path:
    while not wait([coming], timeout=0.2).done:
        check_stop(scratch.stop, file.name)
    return coming.result()
