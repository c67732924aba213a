"""A whole run that is asked to stop: its stage saves, and the same command goes on from there."""

import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from training import stage_files

pytestmark = pytest.mark.slow


@pytest.fixture
def command(tiny_values: dict[str, Any], tmp_path: Path) -> list[str]:
    """A pretraining that takes for ever, with no checkpoint until it is asked to stop."""
    values = {
        **tiny_values,
        "pretrain": {**tiny_values["pretrain"], "epochs": 100_000},
        "checkpoint": {"every_seconds": 3600},
    }
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    outputs = str(tmp_path / "outputs")
    rotvit = [sys.executable, "-m", "flows.cli"]
    return [*rotvit, "pretrain", "--config", str(config), "--outputs", outputs]


def wait_for_training(outputs: Path) -> Path:
    """Return the stage's directory once its first epoch is done."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for path in outputs.glob("pretrain/*/metrics.jsonl"):
            if "val/loss" in path.read_text():
                return path.parent
        time.sleep(0.1)
    raise AssertionError("the training did not begin")


def newest_step(directory: Path) -> int:
    step = stage_files.newest_step(directory)
    assert step is not None
    return step


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_it_saves_stops_and_goes_on(
    command: list[str], tmp_path: Path, number: int, code: int
) -> None:
    reached: list[int] = []
    for _ in range(2):
        run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
        directory = wait_for_training(tmp_path / "outputs")
        if reached:  # the second run has to get beyond the first one
            metrics = directory / "metrics.jsonl"
            size = metrics.stat().st_size
            while metrics.stat().st_size <= size:
                time.sleep(0.05)
        children = psutil.Process(run.pid).children(recursive=True)
        started = time.monotonic()
        run.send_signal(number)
        _, errors = run.communicate(timeout=60)
        assert time.monotonic() - started < 30
        assert run.returncode == code, errors
        assert "The same command resumes" in errors
        psutil.wait_procs(children, timeout=30)
        assert not any(child.is_running() for child in children), "a child was left behind"
        reached.append(newest_step(directory))
    assert reached[1] > reached[0]
    log = next((tmp_path / "outputs").glob("runs/*/log.txt")).read_text()
    assert f"resumes from step {reached[0]}" in log


def test_a_second_ctrl_c_does_not_wait_for_the_step(
    tiny_values: dict[str, Any], command: list[str], tmp_path: Path
) -> None:
    """One step of this network takes far longer than the test waits."""
    config = Path(command[command.index("--config") + 1])
    values = yaml.safe_load(config.read_text())
    values["model"] |= {"image_size": 64, "embed_dim": 384, "num_heads": 6, "depth": 12}
    values["pretrain"] |= {"batch_size": 54}
    config.write_text(yaml.safe_dump(values))
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    child = wait_for_child(run)
    time.sleep(2)  # it is in its first step
    run.send_signal(signal.SIGINT)
    time.sleep(1)
    assert child.is_running(), "the step goes on"
    started = time.monotonic()
    run.send_signal(signal.SIGINT)
    run.communicate(timeout=60)
    assert run.returncode == 130
    child.wait(timeout=10)
    assert time.monotonic() - started < 10
    assert not list((tmp_path / "outputs").glob("pretrain/*/checkpoints/*")), "nothing is half done"


def wait_for_child(run: subprocess.Popen[str]) -> psutil.Process:
    """Return the stage's process once it has begun to train."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for child in psutil.Process(run.pid).children(recursive=True):
            with suppress(psutil.Error):  # another stage's process, which has just ended
                words = child.cmdline()
                if "training.pretrain" in words:
                    directory = Path(words[words.index("training.pretrain") + 1])
                    if (directory / "metrics.jsonl").exists():
                        return child
        time.sleep(0.1)
    raise AssertionError("the training did not begin")
