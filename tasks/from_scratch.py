"""The from-scratch baseline as a Prefect task."""

from tasks.delivery import compute, stage_task
from training.store import StageRequest, StageResult


@stage_task()
def from_scratch(request: StageRequest) -> StageResult:
    """Train the same network without pretraining; a retry goes on from the newest checkpoint."""
    return compute(request)
