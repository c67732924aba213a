"""Preparation as a Prefect task."""

from tasks.delivery import compute, stage_task
from training.store import StageRequest, StageResult


@stage_task
def prepare_data(request: StageRequest) -> StageResult:
    """Decode, crop and store images; a retry keeps the shards that are finished."""
    return compute(request)
