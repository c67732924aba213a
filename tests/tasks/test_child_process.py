"""A stage in a process of its own: real children, really killed."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from data import prepare
from data.claims import Claims
from data.sources import open_source
from tasks import child_process, stage_processes, stage_server
from tasks.child_process import StageFailedError, StageStoppedError, run_in_child
from training import attempts, progress, stage_files, store
from training.configure import validate
from training.errors import DivergedError
from training.lock import locked
from training.progress import Progress
from training.settings import Settings, merge
from training.stage_files import newest_step
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
        outputs = tmp_path / "our outputs"
        results = run_stages(settings, outputs, "prepare_data")
        return store.make_request(STAGES["pretrain"], settings, outputs, results)

    return build


@pytest.fixture(params=["forked", "afresh"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a test run with forked processes, and with those of systems where none are forked."""
    monkeypatch.setattr(stage_processes, "FORKS", request.param == "forked")


def child_of(process: psutil.Process) -> psutil.Process:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for child in process.children(recursive=True):
            with suppress(psutil.Error):  # another stage's process, which has just ended
                if "training.pretrain" in child.cmdline():
                    return child
        time.sleep(0.05)
    raise AssertionError("the stage's process did not start")


def server_of(process: psutil.Process) -> psutil.Process:
    """Return the server that a process has its stages forked from."""
    for child in process.children():
        if "tasks.stage_server" in child.cmdline():
            return child
    raise AssertionError("no server runs")


def wait_for_steps(request: StageRequest) -> None:
    """Wait until the child trains: its first logged steps are in the metrics file."""
    path = request.directory / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (path.is_file() and path.stat().st_size):
        assert time.monotonic() < deadline, "the child did not train"
        time.sleep(0.05)


def signal_once_training(
    request: StageRequest, number: int, *, saved: bool = False
) -> threading.Thread:
    """Send the child a signal while it trains, or once it has saved its state."""

    def act() -> None:
        wait_for_steps(request)
        while saved and newest_step(request.directory) is None:
            time.sleep(0.01)
        child_of(psutil.Process()).send_signal(number)

    thread = threading.Thread(target=act)
    thread.start()
    return thread


@pytest.mark.usefixtures("both_ways")
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
    killer = signal_once_training(request, signal.SIGKILL, saved=True)
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


@pytest.mark.usefixtures("both_ways")
def test_a_child_that_is_told_to_stop_saves_first(request_of: RequestOf) -> None:
    request = request_of(merge(LONG, {"checkpoint": {"every_seconds": 3600}}))
    stopper = signal_once_training(request, signal.SIGTERM)
    with pytest.raises(StageStoppedError, match="goes on from what it has saved"):
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
    server = server_of(psutil.Process(parent.pid))
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    child.wait(timeout=30)
    server.wait(timeout=10)
    assert store.inspect(request).state == "partial"


def test_a_forked_process_computes_the_same_bytes_as_a_fresh_one(
    request_of: RequestOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_of({"hardware": {"threads": 2}})
    found = set()
    for forks in (True, False):
        monkeypatch.setattr(stage_processes, "FORKS", forks)
        assert run_in_child(request).status == "computed"
        found.add(stage_files.sha256_of(request.directory / "model" / "model.safetensors"))
        shutil.rmtree(request.directory)
    assert len(found) == 1


def test_a_server_that_was_killed_between_two_stages_is_replaced(request_of: RequestOf) -> None:
    request = request_of()
    run_in_child(request)
    first = server_of(psutil.Process())
    shutil.rmtree(request.directory)
    run_in_child(request)
    assert server_of(psutil.Process()) == first, "it is kept as long as it lives"
    first.kill()
    shutil.rmtree(request.directory)
    assert run_in_child(request).status == "computed"
    assert server_of(psutil.Process()) != first


def test_a_server_that_is_killed_meanwhile_is_an_error_and_the_stage_saves(
    request_of: RequestOf,
) -> None:
    request = request_of(merge(LONG, {"checkpoint": {"every_seconds": 3600}}))

    def kill() -> None:
        wait_for_steps(request)
        server_of(psutil.Process()).kill()

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(StageFailedError, match="server that pretrain was forked from has died"):
        run_in_child(request)
    killer.join()
    assert store.inspect(request).state == "partial"


def test_a_server_that_cannot_start_is_an_error_with_its_last_words(
    request_of: RequestOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_of()
    monkeypatch.setenv("PYTHONHOME", "/nowhere")
    with pytest.raises(StageFailedError, match=r"(?s)ended with exit status 1.*encodings"):
        run_in_child(request)


def test_the_child_has_the_environment_the_folder_and_the_command_line_of_a_fresh_one(
    request_of: RequestOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_of(LONG)
    store.write_config(request)
    server = None
    for number in ("1", "2"):
        place = tmp_path / number
        place.mkdir()
        stage_processes.prepare()  # before all this is so
        monkeypatch.chdir(place)
        monkeypatch.setenv("OURS", number)
        with stage_processes.start("pretrain", request.directory) as child:
            assert child.stdout is not None
            seen = psutil.Process(child.pid)
            before, server = server, server_of(psutil.Process())
            assert seen.parent() == server != before
            while "training.pretrain" not in seen.cmdline():
                time.sleep(0.01)
            words = [word for word in seen.cmdline() if word]
            assert words[1:] == [
                *("-P", "-m", "training.pretrain", str(request.directory)),
                *("--events", "--parent", str(server.pid)),
            ]
            assert seen.cwd() == str(place)
            assert seen.environ()["OURS"] == number
            assert os.getsid(child.pid) == child.pid
            child.send_signal(signal.SIGKILL)
            assert child.wait() == -signal.SIGKILL


def test_the_server_forks_from_one_thread_and_asks_nothing_of_cuda(request_of: RequestOf) -> None:
    run_in_child(request_of())
    server = server_of(psutil.Process())
    tasks = Path(f"/proc/{server.pid}/task")
    names = [path.read_text().strip() for path in tasks.glob("*/comm")]
    assert sorted(set(names) - {"jemalloc_bg_thd"}) == [names[0]]
    assert len(names) - names.count("jemalloc_bg_thd") == 1, names
    code = (
        "import importlib, torch; from training.stages import STAGES; asked = []\n"
        "torch._C._cuda_getDeviceCount = lambda: asked.append(1) or 0\n"
        "torch.cuda.is_available = torch.cuda.init = lambda: asked.append(1)\n"
        "for item in STAGES.values(): importlib.import_module('training.' + "
        "(item.module or item.name))\n"
        "assert not asked"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_server_of_several_threads_refuses_to_fork() -> None:
    over = threading.Event()
    thread = threading.Thread(target=over.wait, name="another")
    thread.start()
    try:
        with pytest.raises(RuntimeError, match="another"):
            stage_server._check_that_forking_is_safe()
    finally:
        over.set()
        thread.join()


def test_a_stage_that_keeps_nothing_of_an_attempt_is_ended_at_once() -> None:
    code = "import signal, time; signal.signal(signal.SIGUSR1, signal.SIG_IGN); print(flush=True)"
    with subprocess.Popen(
        [sys.executable, "-c", code + "; time.sleep(60)"], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        started = time.monotonic()
        child_process._stop(child, saves=False)
        assert time.monotonic() - started < child_process.GRACE_SECONDS / 2
        assert child.returncode == -signal.SIGKILL


def test_a_child_helps_with_what_another_run_computes_and_takes_over_from_it(
    tiny_settings: Settings, tmp_path: Path
) -> None:
    """The test itself is the other run: it holds the stage's lock, wants help and makes nothing."""
    request = store.make_request(STAGES["prepare_data"], tiny_settings, tmp_path, {})
    source = open_source(*store.data_source(request.stage, tiny_settings))
    made_from = prepare.digest_of_origin(source, tiny_settings.prepared_size, "raw")
    plan = {**prepare._tools(), "made_from": made_from, "counts": dict(source.counts)}
    heard: list[Progress] = []
    deadline = time.monotonic() + 60
    with ThreadPoolExecutor(1) as pool, progress.listening(heard.append):
        with locked(attempts.lock_path(request), what=request.title):
            Claims(request.directory).invite(plan)
            running = pool.submit(run_in_child, request)
            while len(list(request.directory.glob("*-00000.json"))) < 2:
                assert time.monotonic() < deadline, "nobody helps"
                time.sleep(0.05)
            shards = sorted(path.name for path in request.directory.glob("*.npy"))
            assert shards == ["test-00000.npy", "train-00000.npy"]
            assert not running.done()
            assert max(item.done for item in heard) == 81
        assert running.result(timeout=60).status == "computed"
    assert store.inspect(request).state == "cached"
