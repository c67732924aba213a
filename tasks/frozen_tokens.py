"""The pass through the frozen blocks as a Prefect task."""

from tasks.delivery import compute, stage_task
from training.store import StageRequest, StageResult


@stage_task()
def frozen_tokens(request: StageRequest) -> StageResult:
    """Pass the labelled images through the frozen blocks once; a retry begins anew."""
    return compute(request)
