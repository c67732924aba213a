"""The flow: prepare, pretrain, probe, fine-tune, compare, analyse, report."""

import logging
from pathlib import Path
from typing import Any

from prefect import flow

from tasks.delivery import StageTask, deliver
from tasks.feature_analysis import feature_analysis
from tasks.finetune import finetune
from tasks.from_scratch import from_scratch
from tasks.linear_probe import linear_probe
from tasks.prepare_data import prepare_data
from tasks.pretrain import pretrain
from tasks.report import report
from training import preflight, store
from training.run_record import RunRecord
from training.settings import Settings
from training.stages import plan, stage_named
from training.tracking import wandb_mode

logger = logging.getLogger("training.flow")

TASKS: dict[str, StageTask] = {
    "prepare_data": prepare_data,
    "prepare_transfer_data": prepare_data.with_options(name="prepare-transfer-data"),
    "pretrain": pretrain,
    "linear_probe": linear_probe,
    "finetune_1": finetune.with_options(name="finetune-1"),
    "finetune_2": finetune.with_options(name="finetune-2"),
    "from_scratch": from_scratch,
    "feature_analysis": feature_analysis,
    "report": report,
}
"""The task that delivers each stage, in the order in which they run."""


@flow(name="rotation-vit", flow_run_name="{settings.preset}-seed{settings.seed}")
def rotation_vit(
    settings: Settings = Settings(),  # noqa: B008 (frozen, so sharing it is safe)
    outputs: Path = Path("outputs"),
    until: str | None = None,
    refresh: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Pretrain a Vision Transformer by rotation prediction and measure what it learned.

    Stages that are done are cached, one that was interrupted resumes.

    Args:
        settings: Everything that the run depends on.
        outputs: Folder of everything that is written.
        until: Last stage to run, with what it needs; by default all of them.
        refresh: Stages to compute again from the beginning.

    Returns:
        The content of the run's `results.json`.
    """
    outputs = outputs.expanduser().resolve()
    preflight.check(settings, outputs, until)
    again = {stage_named(name).name for name in refresh}
    if settings.tracking.wandb == "auto" and wandb_mode(settings.tracking) == "disabled":
        logger.info("W&B is off: no key found. Set WANDB_API_KEY, or tracking.wandb=offline.")
    record = RunRecord(settings, outputs)
    try:
        for stage in plan(settings, until):
            request = store.make_request(stage, settings, outputs, record.stages, record.name)
            if stage.name in again:
                store.discard(request)
            record.add(deliver(TASKS[stage.name], request))
    except BaseException:
        record.write(state="failed")
        raise
    record.write(state="finished")
    return record.results()
