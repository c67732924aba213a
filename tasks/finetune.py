"""Fine-tuning as a Prefect task."""

from tasks.delivery import compute, stage_task
from training.store import StageRequest, StageResult


@stage_task()
def finetune(request: StageRequest) -> StageResult:
    """Fine-tune head and last blocks, or all; a retry goes on from the newest checkpoint."""
    return compute(request)
