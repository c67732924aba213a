"""Attempts of the chaos benchmark: a pretraining in a process that can be hit, and what it left."""

import json
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training import checkpoint, pretrain, runner, stage_files
from training.stage_files import CHECKPOINTS
from training.store import StageRequest

FILE_LIMIT = 30_000
"""Largest file, in bytes, of an attempt on the full disk: smaller than any file of weights."""

WAIT_SECONDS = 60
"""Longest time that an attempt may take, and twice what an orphan may."""


@dataclass
class Attempt:
    """A forked process that runs the stage.

    It is forked from this one, which has imported torch and computed nothing with it, so that an
    attempt takes a second and not five. For the kernel it is a process like any other.
    """

    pid: int
    request: StageRequest
    code: int | None = None

    def wait(self) -> int:
        """Return the exit status, negative for a signal."""
        deadline = time.monotonic() + WAIT_SECONDS
        while self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                raise TimeoutError(f"An attempt hung; its log: {log_of(self.request)}")
            else:
                time.sleep(0.002)
        return self.code

    def sleep(self, seconds: float) -> None:
        """Wait, but not longer than the attempt runs."""
        self.until(lambda: False, seconds)

    def until(self, happened: Callable[[], bool], seconds: float = WAIT_SECONDS) -> None:
        """Wait for something to happen while the attempt runs."""
        deadline = time.monotonic() + seconds
        while self.code is None and time.monotonic() < deadline and not happened():
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            time.sleep(0.002)

    def signal(self, number: int) -> None:
        """Send a signal, unless the attempt has ended."""
        if self.code is None:
            os.kill(self.pid, number)


@dataclass
class Try:
    """One pretraining from nothing to the end, with faults on the way."""

    request: StageRequest
    random: random.Random
    undisturbed_seconds: float
    lost: int = 0
    """Most steps that one fault has cost."""

    def start(
        self, *, slow: bool = False, full: bool = False, parent: int | None = None
    ) -> Attempt:
        """Type the command again."""
        return Attempt(fork(lambda: self._run(slow=slow, full=full, parent=parent)), self.request)

    def _run(self, *, slow: bool, full: bool, parent: int | None) -> int:
        if slow:
            _slow_down_writes(self.random.random())
        if full:
            resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_LIMIT, FILE_LIMIT))
        arguments = [str(self.request.directory)]
        if parent is not None:
            arguments += ["--parent", str(parent)]
        with log_of(self.request).open("a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            return runner.main(pretrain.compute, arguments)

    def instant(self) -> float:
        """Return a random instant of a run, in seconds from its start."""
        return self.random.uniform(0, self.undisturbed_seconds)

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.request.directory / CHECKPOINTS

    def sound_checkpoints(self) -> list[Path]:
        """Return the checkpoints that a resume could start from, newest first."""
        found = sorted(self.checkpoints.glob("step-*"), reverse=True)
        return [path for path in found if "damaged" not in path.name and _is_sound(path)]

    def sound_steps(self) -> list[int]:
        """Return their steps."""
        return [int(path.name.split("-")[1]) for path in self.sound_checkpoints()]

    def steps_taken(self) -> int:
        """Step of the last line of the metrics file."""
        path = self.request.directory / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        return int(json.loads(lines[-1])["step"]) if lines else 0

    def is_done(self) -> bool:
        """Whether the run has a result."""
        return (self.request.directory / "result.json").is_file()

    def check_nothing_lost(self) -> None:
        """Raise if a step that was taken is in no checkpoint."""
        if not self.is_done():
            saved, taken = max(self.sound_steps(), default=0), self.steps_taken()
            assert saved >= taken, f"step {taken} was taken, {saved} is saved"

    def count_lost(self) -> None:
        """Compare what was done with what is saved; called when a fault has hit."""
        if not self.is_done():
            self.lost = max(self.lost, self.steps_taken() - max(self.sound_steps(), default=0))


def fork(function: Callable[[], int]) -> int:
    """Call a function in a child; its return value becomes the exit status."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        code = function()
    finally:
        os._exit(code)


def log_of(request: StageRequest) -> Path:
    """Return the file to which all attempts of a try write."""
    return request.outputs / "log"


def _slow_down_writes(seed: float) -> None:
    """Have every part of a save take up to 30 ms longer, so that a kill can hit between any two."""
    source = random.Random(seed)
    for name in ("save_file", "sha256_of", "sync_path", "_write_json", "_sync"):
        original = getattr(checkpoint, name)

        def slowed(*arguments: Any, _original: Any = original) -> Any:
            time.sleep(source.uniform(0, 0.03))
            return _original(*arguments)

        setattr(checkpoint, name, slowed)


def _is_sound(directory: Path) -> bool:
    """An independent check: every file has the recorded digest."""
    try:
        files = json.loads((directory / "manifest.json").read_bytes())["files"]
        return all(
            stage_files.sha256_of(directory / name) == record["sha256"]
            for name, record in files.items()
        )
    except (OSError, ValueError, KeyError):
        return False
