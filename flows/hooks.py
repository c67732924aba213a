"""What happens when a flow run ends badly: the record and the UI say how to go on.

Prefect calls these in the flow's process, or, where that was killed, in one of the worker's.
"""

from typing import Any
from uuid import UUID

from prefect import Flow, get_client, runtime
from prefect.client.schemas.actions import ArtifactCreate
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    TaskRunFilter,
    TaskRunFilterState,
    TaskRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.logging.loggers import flow_run_logger
from prefect.states import Crashed

from flows.parameters import RunParameters
from training import run_record


def note_end(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Write state, newest checkpoint and the command that resumes into `run.json` and the UI."""
    logger = flow_run_logger(flow_run, flow)  # get_run_logger() does not work in a hook
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


def close_own_orphans() -> None:
    """Do the same at the start of another attempt at the current flow run.

    Where an automation found that the process was gone, no hook was called.
    """
    _close_task_runs(UUID(str(runtime.flow_run.id)), "Its process was killed.")


def _close_task_runs(flow_run_id: UUID, message: str) -> None:
    running = TaskRunFilterStateType(any_=[StateType.RUNNING, StateType.PENDING])
    with get_client(sync_client=True) as client:
        orphans = client.read_task_runs(
            flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id])),
            task_run_filter=TaskRunFilter(state=TaskRunFilterState(type=running)),
        )
        for orphan in orphans:
            ended: State[None] = Crashed(message=message)
            client.set_task_run_state(orphan.id, ended, force=True)
