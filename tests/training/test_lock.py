import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from training.lock import holder, locked

HOLD = """
import sys, time
from pathlib import Path
from training.lock import locked
with locked(Path(sys.argv[1]), what="a stage"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_holder_waits_for_the_first(tmp_path: Path) -> None:
    order: list[str] = []

    def second() -> None:
        with locked(tmp_path / "lock", what="a stage"):
            order.append("second")

    with locked(tmp_path / "lock", what="a stage"):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.5)
        order.append("first")
    thread.join(timeout=10)
    assert order == ["first", "second"]


def test_the_kernel_drops_the_lock_of_a_killed_holder(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "lock")], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    started = time.monotonic()
    with locked(tmp_path / "lock", what="a stage"):
        pass
    assert time.monotonic() - started < 2


def test_the_holder_is_named_as_long_as_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lock"
    assert holder(path) is None
    with locked(path, what="a stage"):
        assert holder(path) == f"process {os.getpid()}"
    assert holder(path) is None
    assert path.is_file()

    def refuse(handle: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert holder(path) is None


def test_waiting_ends_when_asked(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "lock", what="a stage"),
        pytest.raises(InterruptedError, match="another run's a stage"),
        locked(tmp_path / "lock", what="a stage", give_up=lambda: True),
    ):
        pass
