"""Being stopped: finish the step, save, leave with the code that means "resume me"."""

import ctypes
import logging
import os
import signal
import sys
import time
from types import FrameType

logger = logging.getLogger(__name__)

EXIT_RESUME = 75
"""Exit status of a stage that was stopped and saved: the same command resumes it. (The BSD
convention's EX_TEMPFAIL: try again later.)"""

INSISTS_WITHIN_SECONDS = 10.0
"""A second request within this time stops at once."""

STOP_SECONDS = 28.0
"""Time from the moment that a flow's process is told to stop until it should have ended: Prefect's
worker kills it after 30."""

PARENT_DIED = signal.SIGHUP
"""What the kernel sends when the parent dies."""

PARENT_STOPS = signal.SIGUSR1
"""How a parent passes a stop on. Like its death no SIGTERM, so that one stop that reaches both
parent and child (a service manager signals every process of a group) never counts as two."""

_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


class Ending:
    """How long a process that waits for stages has, once it is told to stop."""

    def __init__(self) -> None:
        self._told_at: float | None = None

    def begin(self) -> None:
        """Forget an earlier stop: this process waits for a stage again."""
        self._told_at = None

    def told(self) -> None:
        """Take note that it is to end from now on."""
        self._told_at = self._told_at or time.monotonic()

    def seconds(self, most: float, *, keep: float = 0.0) -> float:
        """Return how long something may take: `most`, or what is left of `STOP_SECONDS`.

        Args:
            most: Longest time, in seconds, where nobody waits for this process to end.
            keep: Seconds that are kept for what comes after it.
        """
        if self._told_at is None:
            return most
        left = self._told_at + STOP_SECONDS - keep - time.monotonic()
        return max(0.0, min(most, left))


ENDING = Ending()
"""That of this process."""


class Stopped(Exception):
    """A stage was asked to stop, and has saved its state."""

    def __init__(self, step: int, *, saved_step: int | None) -> None:
        """Say where a resume will start: at `step` unless it could not be saved."""
        place = "the beginning" if saved_step is None else f"step {saved_step}"
        place = "there" if saved_step == step else f"from {place}"
        super().__init__(f"Stopped after step {step}; the same command resumes {place}.")
        self.step = step


class StopRequest:
    """Whether somebody asked this process to stop."""

    def __init__(self) -> None:
        # Plain values: a lock, as events have, could be held when the next signal arrives.
        self._asked = False
        self._insists_until = 0.0

    def __bool__(self) -> bool:
        return self._asked

    def listen(self, *, parent: int | None = None, passed_on: bool = False) -> None:
        """Take SIGTERM, SIGINT and the parent's death as requests. Main thread only.

        Args:
            parent: The process whose death counts (Linux only); none for no such process.
            passed_on: Whether a parent passes on SIGTERM and SIGINT, which may reach this process
                by themselves, too: then a second one stops nothing at once.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_parent if passed_on else self._on_signal)
        signal.signal(PARENT_STOPS, self._on_parent)
        if parent is not None:
            signal.signal(PARENT_DIED, self._on_parent)
            if not hear_of_death(parent, PARENT_DIED):
                self._asked = True

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now < self._insists_until:
            # Nothing is harmed: a checkpoint has its final name only when it is whole.
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._insists_until = now + INSISTS_WITHIN_SECONDS
        self._asked = True

    def _on_parent(self, number: int, frame: FrameType | None) -> None:
        self._asked = True


def end_with(parent: int | None) -> None:
    """Let this process be killed when its parent dies: for work that saves nothing on the way.

    Args:
        parent: The process whose death counts (Linux only); none for no such process.
    """
    if parent is not None and not hear_of_death(parent, signal.SIGKILL):
        raise InterruptedError("The process that asked for this stage has ended.")


def hear_of_death(parent: int, number: signal.Signals) -> bool:
    """Ask the kernel for a signal when the parent dies (Linux only); say whether it still lives."""
    if sys.platform != "linux":
        return True
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(number))
    return os.getppid() == parent  # or it died before we asked to be told
