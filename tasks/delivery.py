"""How a stage becomes a Prefect task: its cache key, its retries, what it does in the end.

Prefect shows the same truth as the outputs folder: its cache key is the stage's key with the
stage's name in it, and its record lies beside what the stage made, so deleting the one deletes
the other. Prefect does not look whether the files that a record names are sound; `deliver` does.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from importlib import import_module
from typing import Any
from uuid import UUID

from prefect import Task, task
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import TaskRunContext

from tasks.child_process import StageFailedError, StageStoppedError, run_in_child
from tasks.gpu_slot import gpu_slot
from tasks.live_status import live_status
from training import store
from training.errors import USER_ERRORS
from training.stages import STAGES
from training.store import StageRequest, StageResult

StageTask = Task[[StageRequest], StageResult]

RETRIES = 2
"""Attempts in a row that may end without a newer checkpoint than the one before had, after the
first such attempt. Each goes on from the newest checkpoint."""

MOST_RETRIES = 50
"""Attempts in all, however much progress each of them makes."""

RETRY_DELAY_SECONDS = 5


def stage_task(function: Callable[[StageRequest], StageResult]) -> StageTask:
    """Make a task of a function that runs a stage; a decorator."""
    decorate = task(
        name=function.__name__.replace("_", "-"),
        task_run_name="{request.stage}",
        cache_key_fn=_cache_key,
        persist_result=True,
        result_serializer="json",
        retries=MOST_RETRIES,
        retry_delay_seconds=RETRY_DELAY_SECONDS,
        retry_condition_fn=_is_worth_a_retry,
    )
    made: StageTask = decorate(function)
    return made


def deliver(delivering: StageTask, request: StageRequest) -> StageResult:
    """Call a stage's task: *Cached* in Prefect's UI exactly where its result verifies."""
    verdict = store.inspect(request)
    result = delivering.with_options(
        result_storage=request.outputs, refresh_cache=verdict.result is None
    )(request)
    return verdict.result or result


def compute(request: StageRequest) -> StageResult:
    """Return a stage's result: the one that is there, or a new one.

    Long stages run in a process of their own. Torch is imported here only if a short one must be
    computed.
    """
    found = store.inspect(request).result
    if found:
        return found
    stage = STAGES[request.stage]
    if stage.in_child:
        with live_status(request) as status, ExitStack() as slot:
            if stage.trains and status:
                slot.enter_context(gpu_slot(status.name_state))
            return run_in_child(request)
    from training.runner import run_stage

    module = import_module(f"training.{stage.module or stage.name}")
    return run_stage(request, module.compute)


def _cache_key(context: TaskRunContext, parameters: Mapping[str, Any]) -> str:
    request: StageRequest = parameters["request"]
    place = request.directory.relative_to(request.outputs)
    return f"{place}/prefect-{request.stage}.json"


_steps_reached: dict[UUID, dict[int, int]] = {}
"""Step of the newest checkpoint at the end of each failed attempt, by task run and attempt."""


def _is_worth_a_retry(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Retry what may go better the next time, as long as there is progress. May be asked twice."""
    error = state.result(raise_on_failure=False)
    if isinstance(error, (*USER_ERRORS, StageStoppedError)):
        return False
    reached = _steps_reached.setdefault(task_run.id, {})
    reached[task_run.run_count] = error.step if isinstance(error, StageFailedError) else 0
    return attempts_without_progress(list(reached.values())) <= RETRIES


def attempts_without_progress(steps: Sequence[int]) -> int:
    """Return how many of the last attempts brought nothing.

    Args:
        steps: Step of the newest checkpoint after each attempt, 0 where there was none.
    """
    fruitless = best = 0
    for step in steps:
        fruitless = 0 if step > best else fruitless + 1
        best = max(best, step)
    return fruitless
