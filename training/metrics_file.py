"""A stage's `metrics.jsonl`: written so that a resume loses no line and doubles none.

One JSON object a line: `step` (counted from 1), `epoch`, and metrics by key; null for what is not
a finite number.
"""

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
"""Name of the file, below a stage's directory."""


class MetricsFile:
    """Writes one line per logged step; a context manager.

    `position` is saved in every checkpoint and handed back on resume.
    """

    def __init__(self, directory: Path, *, position: int | None) -> None:
        self._path = directory / METRICS
        self._path.touch()
        size = self._path.stat().st_size
        if position is not None and size < position:
            logger.warning(
                "%s has %d bytes, the checkpoint counted %d: lines of earlier steps are lost.",
                self._path,
                size,
                position,
            )
        # Lines after the checkpoint belong to steps that are taken again.
        self._length = min(position or 0, size)
        os.truncate(self._path, self._length)
        self._file = self._path.open("ab", buffering=0)
        self._pending = b""
        """Lines for which there is no space on the disk yet."""
        self._waits = False

    def log(self, metrics: Mapping[str, float], *, step: int, epoch: float) -> None:
        """Record metrics of a step (counted from 1), at that many epochs."""
        # JSON has no nan.
        finite = {name: v if math.isfinite(v) else None for name, v in metrics.items()}
        row = {"step": step, "epoch": round(epoch, 6), **finite}
        self._pending += json.dumps(row).encode() + b"\n"
        with suppress(OSError):  # training goes on, and tries again with the next line
            self._write()

    def position(self) -> int:
        """Return the length of the file in bytes, with all of it on disk.

        Raises:
            OSError: If lines cannot be written; they are kept, and tried again.
        """
        self._write()
        os.fsync(self._file.fileno())
        return self._length

    def _write(self) -> None:
        try:
            while self._pending:
                written = self._file.write(self._pending)
                self._length += written
                self._pending = self._pending[written:]
        except OSError as error:
            if not self._waits:
                logger.warning("Metrics cannot be written, they wait for better times: %s", error)
            self._waits = True
            raise
        self._waits = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with suppress(OSError):
            self._write()
        self._file.close()


class MetricsTail:
    """Reads the file while another process writes it."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / METRICS
        self._offset = 0

    def new_rows(self) -> list[dict[str, Any]]:
        """Return the rows written since the last call; all of them where the file was cut."""
        try:
            with self._path.open("rb") as file:
                file.seek(max(0, self._offset - 1))
                if self._offset and file.read(1) != b"\n":  # a resume cut it
                    self._offset = 0
                    file.seek(0)
                complete = file.read().rpartition(b"\n")[0]
        except FileNotFoundError:
            return []
        self._offset += len(complete) + 1 if complete else 0
        return list(_parse(complete.decode(errors="replace")))


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """Return the rows of a stage's `metrics.jsonl`; none where it has not got one."""
    path = directory / METRICS
    if not path.is_file():
        return []
    return list(_parse(path.read_text(encoding="utf-8")))


def _parse(text: str) -> Iterator[dict[str, Any]]:
    for line in text.splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue  # a line that a power cut left unfinished
