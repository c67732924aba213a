"""Taking features as a Prefect task."""

from tasks.delivery import compute, stage_task
from training.store import StageRequest, StageResult


@stage_task()
def features(request: StageRequest) -> StageResult:
    """Take the features of every layer of the pretrained backbone, and of a random one."""
    return compute(request)
