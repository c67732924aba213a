"""The linear probe as a Prefect task."""

from tasks.delivery import compute, stage_task
from training.store import StageRequest, StageResult


@stage_task()
def linear_probe(request: StageRequest) -> StageResult:
    """Train a linear head on the frozen backbone, and on a random one."""
    return compute(request)
