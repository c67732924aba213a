"""How a stage becomes a Prefect task: its cache key, its retries, what it does in the end.

Prefect shows the same truth as the outputs folder: its cache key is the stage's key with the
stage's name in it, and its record lies beside what the stage made, so deleting the one deletes
the other. Prefect does not look whether the files that a record names are sound; `deliver` does.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import wraps
from typing import Any
from uuid import UUID

from prefect import Task, task
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import TaskRunContext
from prefect.states import Completed

from tasks import stage_processes
from tasks.child_process import StageFailedError, StageStoppedError, run_in_child
from tasks.gpu_slot import gpu_slot
from tasks.live_status import live_status
from training import remote_outputs, store
from training.errors import is_final
from training.stages import STAGES
from training.store import StageRequest, StageResult

StageTask = Task[[StageRequest], StageResult | State[StageResult]]
RetryCondition = Callable[[Task[..., Any], TaskRun, State[Any]], bool]

WAITS_SECONDS = (5.0,)
"""Waits before the attempts at a stage, the last one repeated: a training that crashed has nothing
to wait for."""

GROWING_WAITS_SECONDS = (5.0, 15.0, 45.0, 120.0, 300.0)
"""The same for what depends on networks and storage, which need time to recover."""

MOST_RETRIES = 50
"""Attempts in all, however much progress each of them makes."""


def stage_task(
    *, waits: Sequence[float] = WAITS_SECONDS, fruitless: int = 2
) -> Callable[[Callable[[StageRequest], StageResult]], StageTask]:
    """Make a task of a function that runs a stage; a decorator.

    Args:
        waits: Seconds before the second, third, ... attempt; the last one is repeated.
        fruitless: Attempts in a row that may get no further than the one before, after the first
            such attempt. Each goes on from what is on disk.
    """

    def decorate(function: Callable[[StageRequest], StageResult]) -> StageTask:
        @wraps(function)
        def run(request: StageRequest) -> StageResult | State[StageResult]:
            result = function(request)
            if result.status != "cached":
                return result
            # Another run has made it since `deliver` looked, or Prefect's own record is gone.
            return Completed(name="Cached", message="It was there already.", data=result)

        made: StageTask = task(
            name=function.__name__.replace("_", "-"),
            task_run_name="{request.title}",
            cache_key_fn=_cache_key,
            persist_result=True,
            result_serializer="json",
            retries=MOST_RETRIES,
            retry_delay_seconds=list(waits),
            retry_condition_fn=_while_there_is_progress(fruitless),
        )(run)
        return made

    return decorate


def deliver(delivering: StageTask, request: StageRequest) -> StageResult:
    """Call a stage's task: *Cached* in Prefect's UI exactly where its result verifies.

    Raises:
        LostError: If what it builds on is damaged at the address of the outputs, and not here.
    """
    verdict = store.inspect(request)
    if verdict.result is None:
        remote_outputs.fetch_inputs(request)
        stage_processes.prepare()  # it imports while Prefect begins the task
    is_cached = verdict.result is not None and remote_outputs.is_stored(request)
    made = delivering.with_options(result_storage=request.outputs, refresh_cache=not is_cached)(
        request
    )
    if isinstance(made, State):
        made = made.result()
    # Not one that was here and is not stored: another machine may have stored its own meanwhile.
    return verdict.result if verdict.result and is_cached else made


def compute(request: StageRequest) -> StageResult:
    """Return a stage's result: the one that is there, or a new one, from a process of its own."""
    found = store.inspect(request).result
    if found and remote_outputs.is_stored(request):
        return found
    return remote_outputs.compute_once(request, _compute_here)


def _compute_here(request: StageRequest) -> StageResult:
    with live_status(request) as status, ExitStack() as slot:
        if STAGES[request.stage].trains and status:
            slot.enter_context(gpu_slot(status.name_state))
        return run_in_child(request)


def _cache_key(context: TaskRunContext, parameters: Mapping[str, Any]) -> str:
    request: StageRequest = parameters["request"]
    place = request.directory.relative_to(request.outputs)
    return f"{place}/prefect-{request.stage}.json"


def _while_there_is_progress(fruitless: int) -> RetryCondition:
    """Return what tells Prefect to try a stage again: what may go better the next time.

    A plain function, as Prefect takes nothing else (an object that is called would be taken for
    "never" without a word).
    """
    reached: dict[UUID, dict[int, int]] = {}
    """How far each failed attempt came, by task run and attempt; Prefect may ask twice."""

    def is_worth_a_retry(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
        error = state.result(raise_on_failure=False)
        if is_final(error) or isinstance(error, StageStoppedError):
            return False
        came = reached.setdefault(task_run.id, {})
        came[task_run.run_count] = error.reached if isinstance(error, StageFailedError) else 0
        return attempts_without_progress(list(came.values())) <= fruitless

    return is_worth_a_retry


def attempts_without_progress(reached: Sequence[int]) -> int:
    """Return how many of the last attempts brought nothing.

    Args:
        reached: How far each attempt came, in any unit; 0 where there was nothing.
    """
    fruitless = best = 0
    for amount in reached:
        fruitless = 0 if amount > best else fruitless + 1
        best = max(best, amount)
    return fruitless
