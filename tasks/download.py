"""The download as a Prefect task."""

from tasks.delivery import GROWING_WAITS_SECONDS, compute, stage_task
from training.store import StageRequest, StageResult


@stage_task(waits=GROWING_WAITS_SECONDS, fruitless=5)
def download(request: StageRequest) -> StageResult:
    """Download images; a retry goes on from the byte where the last attempt ended."""
    return compute(request)
