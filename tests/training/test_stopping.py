"""Signals to real processes: once is a request, twice is at once."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from training.stopping import EXIT_RESUME, PARENT_STOPS, Stopped, end_with

LISTENER = """
import os, sys, time
from training.stopping import StopRequest

stop = StopRequest()
stop.listen(
    parent=int(sys.argv[1]) if len(sys.argv) > 1 else None, passed_on="PASSED_ON" in os.environ
)
print("ready", flush=True)
deadline = time.monotonic() + 20
while not stop and time.monotonic() < deadline:
    time.sleep(0.01)
print("asked" if stop else "not asked", flush=True)
time.sleep(float(os.environ.get("SAVING_SECONDS", "0")))
print("saved", flush=True)
"""


def listener(
    *arguments: str, saving_seconds: float = 0, **environment: str
) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", LISTENER, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "SAVING_SECONDS": str(saving_seconds), **environment},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def rest_of(process: subprocess.Popen[str]) -> str:
    """What it writes until it ends. (`communicate` misses what a `readline` has buffered.)"""
    assert process.stdout is not None
    with process:
        return process.stdout.read()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_signal_is_a_request_and_the_process_goes_on(number: int) -> None:
    process = listener()
    process.send_signal(number)
    output = rest_of(process)
    assert output == "asked\nsaved\n"
    assert process.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_one_within_ten_seconds_stops_at_once(number: int) -> None:
    process = listener(saving_seconds=20)
    process.send_signal(number)
    assert process.stdout is not None
    assert process.stdout.readline() == "asked\n"
    started = time.monotonic()
    process.send_signal(number)
    output = rest_of(process)
    assert output == ""
    assert process.returncode == -number
    assert time.monotonic() - started < 5


@pytest.mark.slow
def test_a_stop_passed_on_by_the_parent_does_not_count_as_a_second_one() -> None:
    """A service manager signals parent and child, and the parent passes its signal on."""
    process = listener(saving_seconds=1)
    process.send_signal(signal.SIGTERM)
    assert process.stdout is not None
    assert process.stdout.readline() == "asked\n"
    process.send_signal(PARENT_STOPS)
    assert rest_of(process) == "saved\n"
    assert process.returncode == 0


@pytest.mark.slow
def test_a_signal_that_is_passed_on_besides_does_not_count_as_a_second_one() -> None:
    """A batch system signals a launcher and its processes; the launcher passes its own on."""
    process = listener(saving_seconds=1, PASSED_ON="1")
    process.terminate()
    assert process.stdout is not None
    assert process.stdout.readline() == "asked\n"
    process.terminate()
    assert rest_of(process) == "saved\n"
    assert process.returncode == 0


def test_a_parent_that_died_before_the_process_listened_counts_too() -> None:
    process = listener("1")  # not our number: whoever started it is gone
    output = rest_of(process)
    assert output == "asked\nsaved\n"


def test_a_parent_that_lives_is_no_request() -> None:
    process = listener(str(os.getpid()))
    assert process.stdout is not None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.terminate()
    assert rest_of(process) == "asked\nsaved\n"


def test_the_message_says_from_where_a_resume_starts() -> None:
    assert "after step 7; the same command resumes there" in str(Stopped(7, saved_step=7))
    assert "resumes from step 4" in str(Stopped(7, saved_step=4)), "the last save failed"
    assert "resumes from the beginning" in str(Stopped(7, saved_step=None))
    assert EXIT_RESUME == 75


ORPHAN = """
import subprocess, sys, os, time
code = (
    "import sys, time; from training.stopping import end_with; end_with(int(sys.argv[1]));"
    "print('ready', flush=True); time.sleep(60)"
)
child = subprocess.Popen([sys.executable, "-c", code, str(os.getpid())], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of others does not tell")
def test_work_that_saves_nothing_ends_with_whoever_asked_for_it() -> None:
    parent = subprocess.Popen([sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    assert child.is_running()
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "it goes on"
        time.sleep(0.05)
    parent.stdout.close()


def test_work_whose_parent_is_gone_already_does_not_begin() -> None:
    with pytest.raises(InterruptedError, match="has ended"):
        end_with(os.getppid() + 1)
