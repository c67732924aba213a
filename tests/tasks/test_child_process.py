"""A stage in a process of its own: real children, really killed."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tasks.child_process import StageFailedError, StageStoppedError, run_in_child
from training import progress, store
from training.configure import validate
from training.errors import DivergedError
from training.progress import Progress
from training.settings import Settings, merge
from training.stages import STAGES
from training.store import StageRequest, StageResult

RunStages = Callable[..., dict[str, StageResult]]
RequestOf = Callable[..., StageRequest]

pytestmark = pytest.mark.slow

LONG = {"pretrain": {"epochs": 4000}, "tracking": {"log_every_steps": 20}}


@pytest.fixture
def request_of(run_stages: RunStages, tiny_values: dict[str, Any], tmp_path: Path) -> RequestOf:
    """The request of a pretraining, with changed settings."""

    def build(changes: dict[str, Any] | None = None) -> StageRequest:
        settings: Settings = validate(merge(tiny_values, changes or {}))
        results = run_stages(settings, tmp_path / "outputs", "prepare_data")
        return store.make_request(STAGES["pretrain"], settings, tmp_path / "outputs", results)

    return build


def child_of(process: psutil.Process) -> psutil.Process:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for child in process.children(recursive=True):
            if "training.pretrain" in child.cmdline():
                return child
        time.sleep(0.05)
    raise AssertionError("the stage's process did not start")


def wait_for_steps(request: StageRequest) -> None:
    """Wait until the child trains: its first logged steps are in the metrics file."""
    path = request.directory / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (path.is_file() and path.stat().st_size):
        assert time.monotonic() < deadline, "the child did not train"
        time.sleep(0.05)


def signal_once_training(request: StageRequest, number: int) -> threading.Thread:
    def act() -> None:
        wait_for_steps(request)
        child_of(psutil.Process()).send_signal(number)

    thread = threading.Thread(target=act)
    thread.start()
    return thread


def test_the_child_returns_its_result_and_its_progress_is_heard_here(
    request_of: RequestOf, caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[Progress] = []
    caplog.set_level("INFO")
    with progress.listening(heard.append):
        result = run_in_child(request_of())
    assert result.status == "computed"
    assert result.scores["steps"] == 18
    assert (heard[-1].stage, heard[-1].done, heard[-1].total) == ("pretrain", 18, 18)
    assert "pretrain: epoch 3 of 3" in caplog.text


def test_a_users_own_module_of_our_name_does_not_stand_in_for_ours(
    request_of: RequestOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data.py").write_text("raise SystemExit('not ours')")
    request = request_of()
    monkeypatch.chdir(tmp_path)
    assert run_in_child(request).status == "computed"


def test_an_error_of_the_child_is_raised_here_as_its_type(request_of: RequestOf) -> None:
    changes = {"pretrain": {"base_lr": 1e30, "clip_norm": None, "warmup_epochs": 0}}
    with pytest.raises(DivergedError, match="base_lr"):
        run_in_child(request_of(changes))


def test_a_killed_child_is_a_failure_that_a_retry_resumes(request_of: RequestOf) -> None:
    request = request_of(merge(LONG, {"checkpoint": {"every_steps": 5}}))
    killer = signal_once_training(request, signal.SIGKILL)
    with pytest.raises(StageFailedError, match="SIGKILL"):
        run_in_child(request)
    killer.join()
    reached = store.inspect(request).step
    assert reached is not None
    assert reached >= 5

    killer = threading.Thread(target=lambda: child_of(psutil.Process()).send_signal(signal.SIGTERM))
    killer.start()
    with pytest.raises((StageStoppedError, StageFailedError)):
        run_in_child(request)
    killer.join()


def test_a_child_that_is_told_to_stop_saves_first(request_of: RequestOf) -> None:
    request = request_of(merge(LONG, {"checkpoint": {"every_seconds": 3600}}))
    stopper = signal_once_training(request, signal.SIGTERM)
    with pytest.raises(StageStoppedError, match="saved its state"):
        run_in_child(request)
    stopper.join()
    assert store.inspect(request).state == "partial"


def test_when_the_parent_is_killed_the_child_saves_and_ends(request_of: RequestOf) -> None:
    request = request_of(merge(LONG, {"checkpoint": {"every_seconds": 3600}}))
    store.write_config(request)
    code = (
        "import sys; from pathlib import Path; from training.store import read_config;"
        "from tasks.child_process import run_in_child;"
        "run_in_child(read_config(Path(sys.argv[1])))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(request.directory)])
    wait_for_steps(request)
    child = child_of(psutil.Process(parent.pid))
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    child.wait(timeout=30)
    assert store.inspect(request).state == "partial"
