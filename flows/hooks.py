"""What happens when a flow run ends badly: the record and the UI say how to go on.

Prefect calls these in the flow's process, or, where that was killed, in one of the worker's.
"""

import logging
from contextlib import suppress
from logging import Logger, LoggerAdapter
from typing import Any
from uuid import UUID

from prefect import Flow, get_client, runtime
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import ArtifactCreate
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
    TaskRunFilter,
    TaskRunFilterState,
    TaskRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType, TaskRun
from prefect.logging.loggers import flow_run_logger
from prefect.states import Crashed

from flows.parameters import RunParameters
from flows.service import AUTO_RESUME, MOST_CRASHES, OUR_TAG
from training import run_record

AnyLogger = Logger | LoggerAdapter[Any]


def note_end(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Write state, newest checkpoint and the command that resumes into `run.json` and the UI."""
    # get_run_logger() does not work in a hook
    _note_end(flow_run, state, flow_run_logger(flow_run, flow))


def _note_end(flow_run: FlowRun, state: State[Any], logger: AnyLogger) -> None:
    try:
        parameters = RunParameters.model_validate(flow_run.parameters)
        settings, outputs = parameters.resolved()
    except ValueError as error:  # the run failed on just this, before it began
        logger.info("Nothing to resume: %s", error)
        return
    end = "cancelled" if state.is_cancelling() else state.type.value.lower()
    added = run_record.note_end(settings, outputs, state=end, message=state.message or "")
    if added is None:
        return
    checkpoint = added["last_checkpoint"] or "none"
    text = (
        f"# {end.capitalize()}\n\n{state.message or ''}\n\n"
        f"Last checkpoint: `{checkpoint}`\n\n"
        "To go on from there, press *Retry*, run the deployment again, or type\n\n"
        f"```\n{added['resume']}\n```\n"
    )
    artifact = ArtifactCreate(
        key="how-to-resume",
        type="markdown",
        description=f"{end}: how to resume",
        data=text,
        flow_run_id=flow_run.id,  # a hook runs outside of the flow run's context
    )
    with get_client(sync_client=True) as client:
        client.create_artifact(artifact)
    logger.info("To resume, run the deployment again or type: %s", added["resume"])


def close_orphans(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Close the task runs of a killed process, which would be shown as running for ever."""
    _close_task_runs(flow_run.id, f"Its flow run ended: {state.message}")


def after_crash(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Close the orphans, and leave a run that has crashed often to a person."""
    _bound_restarts(flow_run.id, flow_run_logger(flow_run, flow))
    close_orphans(flow, flow_run, state)


def go_on_after_crash() -> None:
    """Do the same at the start of another attempt at the current flow run.

    Where an automation found that the process was gone, no hook was called.
    """
    run_id = UUID(str(runtime.flow_run.id))
    with suppress(Exception):  # what the UI shows of earlier attempts must not end this one
        _bound_restarts(run_id, logging.getLogger("training.flow"))
        _close_task_runs(run_id, "Its process was killed.")


def tidy_up_after_others() -> None:
    """Do what the hooks of runs would have done that an automation found dead.

    Nobody was left there to call them. Called where a new run begins and where the server is set
    up.
    """
    ended = FlowRunFilter(
        tags=FlowRunFilterTags(all_=[OUR_TAG]),
        state=FlowRunFilterState(
            type=FlowRunFilterStateType(
                any_=[StateType.CRASHED, StateType.FAILED, StateType.CANCELLED]
            )
        ),
    )
    with get_client(sync_client=True) as client:
        orphans = _close_unfinished(client, ended, "Its process was killed.")
        for run_id in {orphan.flow_run_id for orphan in orphans if orphan.flow_run_id}:
            run = client.read_flow_run(run_id)
            if run.state is not None:
                _note_end(run, run.state, logging.getLogger("training.flow"))


def _bound_restarts(flow_run_id: UUID, logger: AnyLogger) -> None:
    """Take the tag that starts a crashed run again from one that has crashed `MOST_CRASHES` times.

    Crashes are counted, not starts: a process can die before Prefect counts it as one, and a person
    may press *Retry* as often as they like.
    """
    with get_client(sync_client=True) as client:
        run = client.read_flow_run(flow_run_id)
        if AUTO_RESUME not in run.tags:
            return
        states = client.read_flow_run_states(flow_run_id)
        if sum(state.is_crashed() for state in states) < MOST_CRASHES:
            return
        client.update_flow_run(flow_run_id, tags=set(run.tags) - {AUTO_RESUME})
    logger.warning(
        "This flow run has crashed %d times: from now on it is not started again by itself. Look "
        "at why it crashes, then press Retry or run the deployment again: it resumes.",
        MOST_CRASHES,
    )


def _close_task_runs(flow_run_id: UUID, message: str) -> None:
    with get_client(sync_client=True) as client:
        run = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id]))
        _close_unfinished(client, run, message)


def _close_unfinished(
    client: SyncPrefectClient, of_runs: FlowRunFilter, message: str
) -> list[TaskRun]:
    running = TaskRunFilterStateType(any_=[StateType.RUNNING, StateType.PENDING])
    orphans: list[TaskRun] = client.read_task_runs(
        flow_run_filter=of_runs,
        task_run_filter=TaskRunFilter(state=TaskRunFilterState(type=running)),
    )
    for orphan in orphans:
        ended: State[None] = Crashed(message=message)
        client.set_task_run_state(orphan.id, ended, force=True)
    return orphans
