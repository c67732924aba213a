"""What a terminal shows of a run: a bar per stage, log lines above them, and a closing table."""

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.table import Column, Table
from rich.text import Text

from data.records import printable
from training import progress
from training.presets import Preset
from training.progress import Progress
from training.wording import (
    Pace,
    duration,
    scores_in_words,
    seeds_in_words,
    spread_in_words,
    stage_title,
    turn_in_words,
    variant_in_words,
)

if TYPE_CHECKING:
    from training.canary import Reading
    from training.upright import Photo

LOGGERS = ("flows", "tasks", "training", "models", "data")
"""Loggers whose lines are shown."""

RAW_OUTPUT = "training.child"
"""Logger of what a stage's process prints besides its log: tracebacks, chatter of libraries. It
belongs in the log file."""

LINE_EVERY_SECONDS = 10.0
"""Shortest time between two lines of progress where there is no terminal to draw bars on."""


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


@contextmanager
def bar(title: str, *columns: ProgressColumn) -> Iterator[Callable[[int, int], None]]:
    """Show one bar on a terminal for the `with` block; yield what moves it: (done, total).

    Args:
        title: Before it.
        columns: After the usual ones.
    """
    shown = sys.stderr.isatty()
    with Bars(
        *Bars.get_default_columns(),
        *columns,
        console=Console(stderr=True),
        transient=True,
        disable=not shown,
    ) as bars:
        task = bars.add_task(title, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


class StateRow(NamedTuple):
    """What `rotvit status` says of a stage, in words; the key is empty where nothing is there."""

    stage: str
    state: str
    why: str
    key: str


def states_table(rows: Iterable[StateRow], *, keys: bool) -> Table:
    """Return the table of `rotvit status`.

    Args:
        rows: One per stage.
        keys: Whether the keys are shown.
    """
    table = _table("stage", "state", "why", *(["key"] if keys else []))
    for row in rows:
        table.add_row(row.stage, _coloured(row.state), row.why, *([row.key] if keys else []))
    return table


def presets_table(presets: Mapping[str, Preset]) -> Table:
    """Return the table of `rotvit presets`."""
    table = _table("preset", "what, and what it needs")
    for name, preset in presets.items():
        table.add_row(name, Text.assemble(preset.summary, "\n", (preset.needs, "dim")))
    return table


def canary_table(readings: "Sequence[Reading]") -> Table:
    """Return the table of `rotvit canary`."""
    table = _table("batches", "told apart", "right", "99.9 % interval", "chance")
    for reading in readings:
        low, high = reading.interval
        table.add_row(
            reading.batches,
            reading.question,
            Text(f"{reading.share:.3f}", "red" if reading.leaks else ""),
            f"{low:.3f} – {high:.3f}",
            f"{reading.chance:.2f}",
        )
    return table


def classes_table(
    images: Sequence[Path], rows: Sequence[Sequence[float]], names: Sequence[str], top: int
) -> Table:
    """Return the table of `rotvit predict` for a model that tells classes.

    Args:
        images: Paths of the photos.
        rows: Of each photo, the probability of every class.
        names: Of the classes.
        top: Most classes to show of a photo.
    """
    table = _table("image", "class")
    table.add_column("probability", justify="right")
    for image, row in zip(images, rows, strict=True):
        best = sorted(range(len(row)), key=lambda label: -row[label])[:top]
        for place, label in enumerate(best):
            name = _text(printable(str(image))) if place == 0 else Text()
            table.add_row(name, _text(names[label]), f"{row[label]:.3f}")
    return table


def turns_table(images: Sequence[Path], rows: Sequence[Sequence[float]]) -> Table:
    """Return the table of `rotvit predict` for a model that tells which way up photos are.

    Args:
        images: Paths of the photos.
        rows: Of each photo, the probabilities of 0, 90, 180 and 270 degrees counter-clockwise.
    """
    table = _table("image", "which way up")
    for degrees in (0, 90, 180, 270):
        table.add_column(f"{degrees}°", justify="right")
    for image, row in zip(images, rows, strict=True):
        turned = 90 * max(range(len(row)), key=lambda turn: row[turn])
        shares = [f"{share:.3f}" for share in row]
        table.add_row(_text(printable(str(image))), turn_in_words(turned), *shares)
    return table


def photos_table(photos: Sequence["Photo"]) -> Table:
    """Return the table of `rotvit upright`: what was turned or skipped, and why."""
    table = _table("photo", "found")
    table.add_column("probability", justify="right")
    table.add_column("", overflow="fold")
    for photo in photos:
        found = "" if photo.turned is None else turn_in_words(photo.turned).partition(";")[0]
        share = "" if photo.probability is None else f"{photo.probability:.3f}"
        done = f"skipped: {photo.reason}" if photo.outcome == "skipped" else photo.outcome
        table.add_row(_text(printable(photo.name)), found, share, _text(done))
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
        words = [scores_in_words(name, row), seeds_in_words(name, results)]
        table.add_row(
            stage_title(name),
            "\n".join(filter(None, words)),
            _coloured(row["status"]),
            duration(row["wall_seconds"]),
        )
    for name, variant in results.get("variants", {}).items():
        scores, state, seconds = variant_in_words(variant["stages"])
        table.add_row(name, scores, _coloured(state), duration(seconds))
    table.caption, table.caption_justify = spread_in_words(results) or None, "left"
    return table


def closing_paths(results: Mapping[str, Any], outputs: Path) -> Iterator[tuple[str, Path]]:
    """Yield what to open after a run: a word and a path."""
    run = outputs / "runs" / results["run"]
    yield "results", run / "results.json"
    copy = run / "report" / "index.html"
    if copy.is_file():  # also after a run that ended before the report stage
        yield "report", copy
    elif "report" in results["stages"]:
        yield "report", Path(results["stages"]["report"]["directory"]) / "index.html"


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
        table.add_column(name, overflow="fold", no_wrap=name in {"stage", "state", "preset", "key"})
    return table


def _text(words: object) -> Text:
    return Text(str(words))  # names may hold what rich takes for markup


def _coloured(state: str) -> Text:
    styles = {"cached": "green", "computed": "green", "resumed": "cyan", "missing": "dim"}
    return Text(state, style=styles.get(state, "yellow"))
