"""What Prefect's UI shows of a task while it runs: an artifact with its progress, named states.

Everything is sent by a daemon thread, the newest only, without retries, and whatever goes wrong is
swallowed: a server that is slow or gone can neither delay nor fail the stage. (With Prefect 3.8.8
a direct call blocks for about 70 s when the server is away, and raises then.)
"""

import contextvars
import logging
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID

from prefect import get_client
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.client.schemas.objects import State
from prefect.context import TaskRunContext
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prefect.states import Running

from training import progress
from training.progress import Progress
from training.store import StageRequest
from training.wording import Pace

logger = logging.getLogger(__name__)

EVERY_SECONDS = 2.0
"""Time between two messages to the server."""


class LiveStatus:
    """Progress and states of one task run, sent beside it."""

    def __init__(self, request: StageRequest, task_run_id: UUID) -> None:
        self._request, self._task_run_id = request, task_run_id
        self._artifact: UUID | None = None
        self._latest: Progress | None = None
        self._sent: Progress | None = None
        self._pace = Pace()
        self._states: deque[tuple[str, str]] = deque()
        self._resumed = False
        self._stop = threading.Event()
        # A copy of the context: the settings, and the task run that the artifact belongs to.
        self._thread = threading.Thread(
            target=contextvars.copy_context().run, args=(self._run,), daemon=True, name="status"
        )
        self._thread.start()

    def __call__(self, report: Progress) -> None:
        """Take a report of progress in."""
        if report.stage != self._request.title:
            return
        if report.resumed_from and not self._resumed:
            self._resumed = True
            step = f"{report.resumed_from:,}"
            self.name_state(f"Resumed from step {step}", f"Step {step} of {report.total:,}.")
        self._pace.add(time.monotonic(), report.done)
        self._latest = report

    def name_state(self, name: str, message: str) -> None:
        """Give the state of the running task run another name."""
        self._states.append((name, message))

    def close(self) -> None:
        """Send what is left, but wait no longer than a few seconds for it."""
        self._states.clear()  # a late one must not follow the final state
        self._stop.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        while not self._stop.wait(EVERY_SECONDS):
            self._send()
        self._send()

    def _send(self) -> None:
        for send in (self._send_states, self._send_progress):
            try:
                with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
                    send()
            except Exception as error:  # see the top of this file
                logger.debug("Not sent to Prefect: %s", error)

    def _send_states(self) -> None:
        while self._states and not self._stop.is_set():
            name, message = self._states[0]
            with get_client(sync_client=True) as client:
                state: State[None] = Running(name=name, message=message)
                client.set_task_run_state(self._task_run_id, state, force=True)
            self._states.popleft()

    def _send_progress(self) -> None:
        latest = self._latest
        if latest is None or latest is self._sent:
            return
        percent = 100 * latest.done / latest.total if latest.total else 0.0
        words = describe(latest, self._pace)
        if self._artifact is None:
            stage = self._request.stage.replace("_", "-")
            # One key for all attempts: its history is that of the stage.
            made = create_progress_artifact(
                percent, key=f"progress-{stage}-{self._request.key}", description=words
            )
            assert isinstance(made, UUID)  # a coroutine only where an event loop runs
            self._artifact = made
        else:
            update_progress_artifact(self._artifact, percent, words)
        self._sent = latest


def describe(report: Progress, pace: Pace) -> str:
    """Say how far a stage is: amount, detail, rate and time left, and where it resumed."""
    parts = [
        f"{report.done:,} of {report.total:,} {report.unit}",
        report.detail,
        pace.words(report.done, report.total, report.unit),
        f"resumed from {report.resumed_from:,}" if report.resumed_from else "",
    ]
    return ", ".join(part for part in parts if part)


@contextmanager
def live_status(request: StageRequest) -> Iterator[LiveStatus | None]:
    """Show a stage's progress in Prefect's UI; outside a task run nothing is shown."""
    context = TaskRunContext.get()
    if context is None:
        yield None
        return
    status = LiveStatus(request, context.task_run.id)
    try:
        with progress.listening(status):
            yield status
    finally:
        status.close()
