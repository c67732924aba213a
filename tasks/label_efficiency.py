"""The curve of label efficiency as a Prefect task."""

from tasks.delivery import compute, stage_task
from training.store import StageRequest, StageResult


@stage_task()
def label_efficiency(request: StageRequest) -> StageResult:
    """Probe the frozen backbone with more and more labels, and a random one as control."""
    return compute(request)
