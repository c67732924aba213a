"""The report as a Prefect task."""

from tasks.delivery import compute, stage_task
from training.store import StageRequest, StageResult


@stage_task()
def report(request: StageRequest) -> StageResult:
    """Draw the tables and figures of all stages as one page."""
    return compute(request)
