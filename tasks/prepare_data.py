"""Preparation as a Prefect task."""

from tasks.delivery import GROWING_WAITS_SECONDS, compute, stage_task
from training.store import StageRequest, StageResult


@stage_task(waits=GROWING_WAITS_SECONDS, fruitless=5)
def prepare_data(request: StageRequest) -> StageResult:
    """Decode, crop and store images; a retry keeps the shards that are finished."""
    return compute(request)
