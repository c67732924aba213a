"""Pretraining as a Prefect task."""

from tasks.delivery import compute, stage_task
from training.store import StageRequest, StageResult


@stage_task()
def pretrain(request: StageRequest) -> StageResult:
    """Pretrain on rotations; a retry goes on from the newest checkpoint."""
    return compute(request)
