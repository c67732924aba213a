"""What a terminal shows of a run: a bar per stage, log lines above them, and a closing table."""

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.table import Column, Table
from rich.text import Text

from training import progress
from training.presets import Preset
from training.progress import Progress

LOGGERS = ("flows", "tasks", "training", "models", "data")
"""Loggers whose lines are shown."""

RAW_OUTPUT = "training.child"
"""Logger of what a stage's process prints besides its log: tracebacks, chatter of libraries. It
belongs in the log file."""

LINE_EVERY_SECONDS = 10.0
"""Shortest time between two lines of progress where there is no terminal to draw bars on."""

PACE_OVER_SECONDS = 60.0
"""The pace is taken over this much time, so that it follows the machine's load."""


class Pace:
    """How fast a count rises, from what was reported in the last minute.

    What was done before the first report (a resumed stage begins in the middle) does not count.
    """

    def __init__(self) -> None:
        self._reports: deque[tuple[float, int]] = deque()

    def add(self, now: float, done: int) -> None:
        """Take a report in; one that goes back starts the count anew."""
        if self._reports and done < self._reports[-1][1]:
            self._reports.clear()
        self._reports.append((now, done))
        while now - self._reports[0][0] > PACE_OVER_SECONDS and len(self._reports) > 2:
            self._reports.popleft()

    @property
    def per_second(self) -> float | None:
        """Units per second; none before it can be known."""
        if not self._reports:
            return None
        (began, first), (ended, last) = self._reports[0], self._reports[-1]
        return (last - first) / (ended - began) if ended > began and last > first else None

    def words(self, done: int, total: int, unit: str) -> str:
        """Return rate and time left, or nothing where they are not known."""
        rate = self.per_second
        if rate is None:
            return ""
        speed = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
        left = f", {duration((total - done) / rate)} left" if done < total else ""
        return f"{speed} {unit}/s{left}"


@contextmanager
def shown(console: Console) -> Iterator[None]:
    """Show progress and log lines on a console for the `with` block."""
    lines = _LogLines(console)
    listener: _BarPerStage | _LineNowAndThen
    with ExitStack() as stack:
        if console.is_terminal:
            listener = stack.enter_context(_BarPerStage(console))
        else:
            listener = _LineNowAndThen(console)
        stack.enter_context(progress.listening(listener))
        for name in LOGGERS:
            logger = logging.getLogger(name)
            level = logger.level
            logger.setLevel(logging.INFO)
            logger.addHandler(lines)
            stack.callback(logger.setLevel, level)
            stack.callback(logger.removeHandler, lines)
        yield


def states_table(rows: Sequence[tuple[str, str, str]]) -> Table:
    """Return the table of `rotvit status`.

    Args:
        rows: Stage, state and why, in words.
    """
    table = _table("stage", "state", "why")
    for stage, state, why in rows:
        table.add_row(stage, _coloured(state), why)
    return table


def presets_table(presets: Mapping[str, Preset]) -> Table:
    """Return the table of `rotvit presets`."""
    table = _table("preset", "what, and what it needs")
    for name, preset in presets.items():
        table.add_row(name, Text.assemble(preset.summary, "\n", (preset.needs, "dim")))
    return table


def closing_table(results: Mapping[str, Any]) -> Table:
    """Return the table that ends a run.

    Args:
        results: Content of `results.json`.
    """
    table = _table("stage", "score on test", "state")
    table.add_column("time", justify="right", no_wrap=True)
    seen = set()
    for name, row in results["stages"].items():
        if row["directory"] in seen:  # pretraining and transfer on the same prepared images
            continue
        seen.add(row["directory"])
        table.add_row(
            stage_title(name),
            scores_in_words(name, row),
            _coloured(row["status"]),
            duration(row["wall_seconds"]),
        )
    return table


def closing_paths(results: Mapping[str, Any], outputs: Path) -> Iterator[tuple[str, Path]]:
    """Yield what to open after a run: a word and a path."""
    run = outputs / "runs" / results["run"]
    yield "results", run / "results.json"
    if "report" in results["stages"]:
        copy = run / "report" / "index.html"
        original = Path(results["stages"]["report"]["directory"]) / "index.html"
        yield "report", copy if copy.is_file() else original


def stage_title(name: str) -> str:
    """Return a stage's name as the command line writes it."""
    return name.replace("_", "-")


def scores_in_words(name: str, row: Mapping[str, Any]) -> str:
    """Say what a stage measured.

    Args:
        name: The stage's.
        row: Its scores, by the names in `results.json`.
    """
    if name.startswith("prepare"):
        counts = ", ".join(f"{count:,} {split}" for split, count in row.get("counts", {}).items())
        skipped = row.get("skipped", 0)
        return f"{counts} images" + (f" ({skipped:,} skipped)" if skipped else "")
    if name == "feature_analysis":
        best = max(row["layers"], key=lambda layer: float(layer["top1"]))
        return f"best at {best['name']}: top-1 {best['top1']:.2f}"
    if "rotation_accuracy" in row:
        return f"rotation accuracy {row['rotation_accuracy']:.2f}"
    if "random_backbone_top1" in row:
        return f"top-1 {row['top1']:.2f} (random backbone {row['random_backbone_top1']:.2f})"
    return f"top-1 {row['top1']:.2f}" if "top1" in row else ""


def duration(seconds: float) -> str:
    """Return a time as people say it: `9 s`, `2 min 5 s`, `3 h 20 min`, `2 d 4 h`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(whole / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(whole / 3600)
    return f"{hours // 24} d {hours % 24} h"


class _BarPerStage:
    """Listener that draws bars."""

    def __init__(self, console: Console) -> None:
        self._bars = Bars(
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=8)),
            TextColumn("{task.fields[amount]}", justify="right", table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[pace]}", table_column=Column(no_wrap=True)),
            TextColumn(
                "{task.fields[detail]}",
                style="dim",
                markup=False,
                table_column=Column(no_wrap=True, overflow="ellipsis"),
            ),
            console=console,
            expand=True,
            refresh_per_second=4,
        )
        self._tasks: dict[str, tuple[TaskID, Pace]] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> "_BarPerStage":
        self._bars.start()
        return self

    def __exit__(self, *problem: object) -> None:
        with suppress(OSError):  # the terminal may be gone
            self._bars.stop()

    def __call__(self, report: Progress) -> None:
        with self._lock, suppress(OSError):
            if report.stage not in self._tasks:
                task = self._bars.add_task(
                    stage_title(report.stage), total=report.total, amount="", pace="", detail=""
                )
                self._tasks[report.stage] = task, Pace()
            task, pace = self._tasks[report.stage]
            pace.add(time.monotonic(), report.done)
            self._bars.update(
                task,
                completed=report.done,
                total=report.total,
                amount=f"{report.done:,}/{report.total:,} {report.unit}",
                pace=pace.words(report.done, report.total, report.unit),
                detail=report.detail,
            )


class _LineNowAndThen:
    """Listener that writes a plain line, but not often."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._paces: dict[str, Pace] = {}
        self._next = time.monotonic() + LINE_EVERY_SECONDS
        self._lock = threading.Lock()

    def __call__(self, report: Progress) -> None:
        with self._lock, suppress(OSError):
            now = time.monotonic()
            pace = self._paces.setdefault(report.stage, Pace())
            pace.add(now, report.done)
            if now < self._next:
                return
            self._next = now + LINE_EVERY_SECONDS
            share = f"{report.done / report.total:.0%}" if report.total else "0%"
            parts = [
                f"{report.done:,} of {report.total:,} {report.unit} ({share})",
                pace.words(report.done, report.total, report.unit),
                report.detail,
            ]
            line = f"{stage_title(report.stage)}: {', '.join(part for part in parts if part)}"
            self._console.print(_timed(time.time(), line), soft_wrap=True)


class _LogLines(logging.Handler):
    """Writes log lines above the bars."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.INFO)
        self._console = console
        self.addFilter(lambda record: record.name != RAW_OUTPUT)

    def emit(self, record: logging.LogRecord) -> None:
        line = _timed(record.created)
        if record.levelno >= logging.WARNING:
            line.append(f"{record.levelname.lower()}: ", style="bold yellow")
        line.append(record.getMessage())
        with suppress(OSError):
            self._console.print(line, soft_wrap=True)


def _timed(when: float, line: str = "") -> Text:
    return Text.assemble((time.strftime("%H:%M:%S ", time.localtime(when)), "dim"), line)


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 3, 0, 0))
    for name in columns:
        table.add_column(name, overflow="fold", no_wrap=name in {"stage", "state", "preset"})
    return table


def _coloured(state: str) -> Text:
    styles = {"cached": "green", "computed": "green", "resumed": "cyan", "missing": "dim"}
    return Text(state, style=styles.get(state, "yellow"))
