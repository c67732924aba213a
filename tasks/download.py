"""The download as a Prefect task."""

from tasks.delivery import compute, stage_task
from training.store import StageRequest, StageResult


@stage_task
def download(request: StageRequest) -> StageResult:
    """Download images; a retry goes on from the byte where the last attempt ended."""
    return compute(request)
