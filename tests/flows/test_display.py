import io
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from flows import display
from training import progress
from training.progress import Progress

RESULTS: dict[str, Any] = {
    "run": "drawn-seed0-12345678",
    "stages": {
        "prepare_data": {
            "directory": "/out/prepare_data/a",
            "status": "cached",
            "wall_seconds": 3.2,
            "counts": {"train": 3334, "test": 1000},
            "skipped": 2,
        },
        "prepare_transfer_data": {
            "directory": "/out/prepare_data/a",
            "status": "cached",
            "wall_seconds": 3.2,
            "counts": {"train": 3334, "test": 1000},
            "skipped": 2,
        },
        "pretrain": {
            "directory": "/out/pretrain/b",
            "status": "resumed",
            "wall_seconds": 131,
            "rotation_accuracy": 0.898,
        },
        "linear_probe": {
            "directory": "/out/linear_probe/c",
            "status": "computed",
            "wall_seconds": 9,
            "top1": 0.553,
            "random_backbone_top1": 0.241,
        },
        "feature_analysis": {
            "directory": "/out/feature_analysis/d",
            "status": "computed",
            "wall_seconds": 9,
            "layers": [
                {"name": "embedding", "top1": 0.2},
                {"name": "block 1", "top1": 0.65},
                {"name": "block 2", "top1": 0.61},
            ],
        },
        "report": {"directory": "/out/report/e", "status": "computed", "wall_seconds": 1},
    },
}


def plain_console() -> Console:
    return Console(file=io.StringIO(), width=100)


def terminal_console(width: int = 110) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)


CURSOR_CODES = re.compile(r"\x1b\[[?\d;]*[A-Za-z]|\r")
ERASE_LINE = "\x1b[2K"


def raw(console: Console) -> str:
    file: Any = console.file
    return str(file.getvalue())


def written(console: Console) -> str:
    """Everything that was written, without the codes that move the cursor."""
    return CURSOR_CODES.sub("", raw(console))


def last_frame(console: Console) -> list[str]:
    """The bars as they were drawn last."""
    return CURSOR_CODES.sub("", raw(console).rpartition(ERASE_LINE)[2]).splitlines()


def lines_of(table: Any) -> list[str]:
    console = plain_console()
    console.print(table)
    return [line.rstrip() for line in written(console).splitlines()]


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("time.monotonic", made)
    return made


def test_without_a_terminal_a_line_is_written_every_ten_seconds_at_most(clock: Clock) -> None:
    console = plain_console()
    with display.shown(console):
        for second in range(1, 36):
            clock.now = 1000.0 + second
            progress.report(Progress("linear_probe", 20 * second, 700, "steps", "epoch 2"))
    lines = written(console).splitlines()
    assert len(lines) == 3
    assert lines[0].endswith("linear-probe: 200 of 700 steps (29%), 20 steps/s, 25 s left, epoch 2")


def test_without_a_terminal_lines_are_plain_and_not_broken(clock: Clock) -> None:
    console = plain_console()
    with display.shown(console):
        clock.now += 11
        progress.report(Progress("pretrain", 1, 3, "steps", "x" * 300 + " [red]"))
    (line,) = written(console).splitlines()
    assert line.endswith("x" * 300 + " [red]")


def test_on_a_terminal_every_stage_has_one_bar(clock: Clock) -> None:
    console = terminal_console()
    with display.shown(console):
        for step in (300, 360, 420):
            clock.now += 2
            progress.report(Progress("pretrain", step, 1395, "steps", "epoch 5 [of 15]"))
        progress.report(Progress("prepare_data", 7, 7, "images"))
    frame = last_frame(console)
    assert frame[0].startswith("pretrain ")
    assert "420/1,395 steps" in frame[0]
    assert "30 steps/s, 32 s left" in frame[0]
    assert "epoch 5 [of 15]" in frame[0]
    assert frame[1].startswith("prepare-data ")
    assert "7/7 images" in frame[1]


def test_a_bar_that_counts_something_else_does_not_mix_the_rates(clock: Clock) -> None:
    console = terminal_console()
    with display.shown(console):
        progress.report(Progress("prepare_data", 0, 500, "images"))
        clock.now += 1
        progress.report(Progress("prepare_data", 500, 500, "images"))
        clock.now += 1
        progress.report(Progress("prepare_data", 0, 40, "images"))
        clock.now += 2
        progress.report(Progress("prepare_data", 8, 40, "images"))
    assert "8/40 images 4 images/s, 8 s left" in last_frame(console)[0]


@pytest.mark.parametrize("console", [plain_console(), terminal_console()], ids=["plain", "bars"])
def test_log_lines_are_shown_as_they_are_written(console: Console) -> None:
    with display.shown(console):
        logging.getLogger("training.loop").info("epoch %d [of 5]", 3)
        logging.getLogger("data.prepare").warning("odd")
        logging.getLogger("training.loop").debug("too much")
        logging.getLogger("prefect.engine").error("not ours")
        logging.getLogger("training.child").info("raw output of a child")
    logging.getLogger("training.loop").info("after the end")
    text = written(console)
    assert " epoch 3 [of 5]\n" in text
    assert "warning: odd\n" in text
    for unwanted in ("too much", "not ours", "raw output", "after the end"):
        assert unwanted not in text


def test_loggers_are_left_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    loggers = [logging.getLogger(name) for name in display.LOGGERS]
    for logger in loggers:
        monkeypatch.setattr(logger, "level", logging.ERROR)
    before = [(logger.level, list(logger.handlers)) for logger in loggers]

    def end_badly() -> None:
        with display.shown(plain_console()):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        end_badly()
    assert [(logger.level, list(logger.handlers)) for logger in loggers] == before


class GoneTerminal(io.StringIO):
    """A terminal whose window was closed."""

    gone = False

    def write(self, text: str) -> int:
        if self.gone:
            raise OSError(5, "Input/output error")
        return super().write(text)


@pytest.mark.parametrize("terminal", [False, True])
def test_a_terminal_that_is_gone_does_not_fail_the_stage(terminal: bool, clock: Clock) -> None:
    file = GoneTerminal()
    console = Console(file=file, force_terminal=terminal, width=80, color_system=None)
    with display.shown(console):
        file.gone = True
        clock.now += 60
        progress.report(Progress("pretrain", 1, 3, "steps"))
        logging.getLogger("training").info("one line")


def test_the_closing_table_says_what_every_stage_measured() -> None:
    lines = lines_of(display.closing_table(RESULTS))
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in lines[1:]}
    assert rows == {
        "prepare-data": "3,334 train, 1,000 test images (2 skipped) cached 3 s",
        "pretrain": "rotation accuracy 0.90 resumed 2 min 11 s",
        "linear-probe": "top-1 0.55 (random backbone 0.24) computed 9 s",
        "feature-analysis": "best at block 1: top-1 0.65 computed 9 s",
        "report": "computed 1 s",
    }


def test_one_preparation_for_both_purposes_has_one_row_and_two_have_two() -> None:
    assert sum("prepare" in line for line in lines_of(display.closing_table(RESULTS))) == 1
    apart = {**RESULTS["stages"]["prepare_transfer_data"], "directory": "/out/prepare_data/z"}
    stages = {**RESULTS["stages"], "prepare_transfer_data": apart}
    table = display.closing_table({**RESULTS, "stages": stages})
    assert sum("prepare" in line for line in lines_of(table)) == 2


def test_after_a_run_the_runs_own_copy_of_the_report_is_named(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "drawn-seed0-12345678"
    assert dict(display.closing_paths(RESULTS, tmp_path)) == {
        "results": run / "results.json",
        "report": Path("/out/report/e/index.html"),
    }
    (run / "report").mkdir(parents=True)
    (run / "report" / "index.html").touch()
    assert dict(display.closing_paths(RESULTS, tmp_path))["report"] == run / "report/index.html"


def test_a_run_without_a_report_names_none(tmp_path: Path) -> None:
    results = {"run": "x", "stages": {}}
    assert list(dict(display.closing_paths(results, tmp_path))) == ["results"]


def test_seeds_are_said_with_their_spread_and_a_row_for_each() -> None:
    row = {"directory": "/out/x", "status": "computed", "wall_seconds": 30}
    beside = {
        "seed 1": {
            "overrides": ["seed=1"],
            "stages": {
                "linear_probe": {**row, "top1": 0.601, "random_backbone_top1": 0.2},
                "from_scratch": {**row, "top1": 0.634, "status": "cached", "wall_seconds": 31},
                "label_efficiency": {**row, "points": []},
            },
        }
    }
    over = {
        "pretraining": "shared",
        "stages": {
            "linear_probe": {
                "top1": {"mean": 0.577, "std": 0.0339, "n": 2},
                "random_backbone_top1": {"mean": 0.2205, "std": 0.029, "n": 2},
            },
        },
    }
    lines = lines_of(display.closing_table({**RESULTS, "variants": beside, "over_seeds": over}))
    text = [" ".join(line.split()) for line in lines]
    at = text.index("linear-probe top-1 0.55 (random backbone 0.24) computed 9 s")
    assert text[at + 1] == "0.577 ± 0.034 (random 0.221 ± 0.029) over 2 seeds"
    assert text[-1] == "±: standard deviation between seeds (one pretraining)"
    assert text[-2] == "seed 1 linear-probe 0.60, from-scratch 0.63 computed, cached 1 min 31 s"
