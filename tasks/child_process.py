"""A stage in a process of its own: its log, its progress, its end.

Prefect raises SIGTERM in the middle of a bytecode and needs the main thread for it; a segmentation
fault or the kernel's out-of-memory killer must cost one attempt, not the flow. So the stage runs
in a child. One that resumes saves its state when it is told to stop or when its parent dies; the
others, which take seconds to minutes, are ended at once.
"""

import json
import logging
import os
import signal
import subprocess
import time
from contextlib import suppress
from multiprocessing.connection import wait
from typing import IO, Any

from tasks import stage_processes
from tasks.stage_processes import SERVER_DIED, ServerDiedError, StageProcess
from training import attempts, progress, stage_files
from training.errors import ERRORS_BY_NAME
from training.stages import STAGES
from training.stopping import ENDING, EXIT_RESUME, PARENT_STOPS
from training.store import StageRequest, StageResult
from training.wording import ended_by

logger = logging.getLogger("training.child")

GRACE_SECONDS = 25
"""Time for the child's last checkpoint, of `stopping.STOP_SECONDS`."""


class StageFailedError(RuntimeError):
    """A stage's process ended without a result."""

    def __init__(self, message: str, *, reached: int) -> None:
        """Say why, and how far it came: see `attempts.progress_on_disk`."""
        super().__init__(message)
        self.reached = reached


class StageStoppedError(RuntimeError):
    """A stage's process was asked to stop, from outside this run; it saves its state if it can."""


def run_in_child(request: StageRequest) -> StageResult:
    """Return a stage's result: the one that is there, or what a child process makes.

    Raises:
        StageStoppedError: If the child was stopped by somebody else.
        StageFailedError: If it crashed or was killed.
        ValueError: A user's mistake, as the type that the child raised.
    """
    with stage_files.full_disk_explained(request.outputs):
        found = attempts.begin_or_help(request)
    if found:
        return found
    stage = STAGES[request.stage]
    ENDING.begin()
    try:
        started = stage_processes.start(stage.module_name, request.directory)
    except ServerDiedError as error:
        raise StageFailedError(str(error), reached=attempts.progress_on_disk(request)) from error
    with started as child:
        assert child.stdout is not None
        try:
            events = _follow(child.stdout)
            code = child.wait()
        except BaseException:  # Prefect's TerminationSignal, KeyboardInterrupt, SystemExit
            _stop(child, saves=stage.resumes)
            raise
    return _result_of(request, code, events)


def _follow(stream: IO[str]) -> dict[str, Any]:
    """Pass the child's log and progress on as they come; return its last words."""
    last: dict[str, Any] = {}
    for line in stream:
        try:
            event = json.loads(line)
        except ValueError:
            event = None
        if not isinstance(event, dict):
            logger.info("%s", line.rstrip())  # a library that writes to the terminal, a traceback
        elif "log" in event:
            level, name, message = event["log"]
            logging.getLogger(name).log(level, "%s", message)
        elif "progress" in event:
            progress.report(progress.Progress(*event["progress"]))
        else:
            # Of several processes that fail, the first is the one that the others fail of.
            last = {**event, **last}
    return last


def _stop(child: StageProcess, *, saves: bool) -> None:
    ENDING.told()
    child.send_signal(PARENT_STOPS if saves else signal.SIGKILL)
    try:
        _let_end(child, GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):  # it has ended; what it started holds its output
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    except BaseException:  # asked again: at once. A checkpoint is complete or absent.
        child.send_signal(signal.SIGKILL)
        raise


def _let_end(child: StageProcess, seconds: float) -> None:
    """Wait for a process to end, reading what it prints, so that it does not wait for a reader."""
    deadline = time.monotonic() + seconds

    def left() -> float:
        return max(0.0, deadline - time.monotonic())

    assert child.stdout is not None
    output = child.stdout.fileno()
    while wait([output], left()) and os.read(output, 2**16):
        pass
    child.wait(left())


def _result_of(request: StageRequest, code: int, events: dict[str, Any]) -> StageResult:
    if code in (0, SERVER_DIED) and "result" in events:
        return StageResult.model_validate(events["result"])
    # Of several processes, one may have failed while they were to stop.
    if code == EXIT_RESUME and not events.keys() & {"killed", "error"}:
        raise StageStoppedError(f"{request.title} was stopped; it goes on from what it has saved.")
    reached = attempts.progress_on_disk(request)
    if "killed" in events:
        raise StageFailedError(f"{request.title} failed: {events['killed']}", reached=reached)
    if "error" in events:
        name, message = events["error"]["type"], events["error"]["message"]
        if name in ERRORS_BY_NAME:
            raise ERRORS_BY_NAME[name](message)
        raise StageFailedError(f"{request.title} failed with {name}: {message}", reached=reached)
    if "lost" in events:
        raise StageFailedError(f"{request.title} failed: {events['lost']}", reached=reached)
    if code == SERVER_DIED:
        raise StageFailedError(
            f"The server that {request.stage} was forked from has died, and the stage with it, "
            "which saved its state if it could.",
            reached=reached,
        )
    if code < 0:
        raise StageFailedError(
            f"The process of {request.title} {ended_by(-code)}.", reached=reached
        )
    raise StageFailedError(
        f"The process of {request.title} ended with exit status {code}.", reached=reached
    )
