"""The feature analysis as a Prefect task."""

from tasks.delivery import compute, stage_task
from training.store import StageRequest, StageResult


@stage_task()
def feature_analysis(request: StageRequest) -> StageResult:
    """Probe every layer of the pretrained backbone, and of a random one."""
    return compute(request)
