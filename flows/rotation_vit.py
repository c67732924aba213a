"""The flow: download, prepare, pretrain, probe, fine-tune, compare, analyse, report."""

import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.runtime import deployment, flow_run

from flows.hooks import (
    after_crash,
    close_orphans,
    go_on_after_crash,
    note_end,
    tidy_up_after_others,
)
from flows.parameters import Outputs, RunParameters, StageName, run_name
from tasks.artifacts import publish
from tasks.delivery import StageTask, deliver
from tasks.download import download
from tasks.feature_analysis import feature_analysis
from tasks.features import features
from tasks.finetune import finetune
from tasks.from_scratch import from_scratch
from tasks.frozen_tokens import frozen_tokens
from tasks.label_efficiency import label_efficiency
from tasks.linear_probe import linear_probe
from tasks.prepare_data import prepare_data
from tasks.pretrain import pretrain
from tasks.report import report
from tasks.wandb_secret import wandb_key_of_secret
from training import attempts, preflight
from training.remote_store import LostError
from training.run_record import RunRecord
from training.settings import Settings
from training.stages import plan, refreshed
from training.steps import steps
from training.wandb_key import HOW_TO_TURN_ON, is_off_for_want_of_a_key

logger = logging.getLogger("training.flow")

TASKS: dict[str, StageTask] = {
    "download": download,
    "download_transfer": download.with_options(name="download-transfer"),
    "prepare_data": prepare_data,
    "prepare_transfer_data": prepare_data.with_options(name="prepare-transfer-data"),
    "pretrain": pretrain,
    "features": features,
    "linear_probe": linear_probe,
    "frozen_tokens": frozen_tokens,
    "finetune_1": finetune.with_options(name="finetune-1"),
    "finetune_2": finetune.with_options(name="finetune-2"),
    "finetune_all": finetune.with_options(name="finetune-all"),
    "from_scratch": from_scratch,
    "feature_analysis": feature_analysis,
    "label_efficiency": label_efficiency,
    "report": report,
}
"""The task that delivers each stage, in the order in which they run."""

ENDS_BADLY: dict[str, Any] = {
    "on_failure": [note_end],
    "on_crashed": [note_end, after_crash],
    "on_cancellation": [note_end, close_orphans],
}
"""Hooks of every flow."""


@flow(name="rotation-vit", flow_run_name=run_name, **ENDS_BADLY)
def rotation_vit(
    settings: Settings = Settings(),  # noqa: B008 (frozen, so sharing it is safe)
    outputs: Outputs = "outputs",
    overrides: Sequence[str] = (),
    until: StageName | None = None,
    refresh: Sequence[StageName] = (),
) -> dict[str, Any]:
    """Pretrain a Vision Transformer by rotation prediction and measure what it learned.

    Stages that are done are cached, one that was interrupted resumes.

    Args:
        settings: Everything that the run depends on; given as a whole, or not at all.
        outputs: Folder of everything that is written, or its address: s3://bucket/prefix.
        overrides: Single settings laid over the others, as path.to.setting=value.
        until: Last stage to run, with what it needs; by default all of them.
        refresh: Stages to compute again from the beginning.

    Returns:
        The content of the run's `results.json`.
    """
    given = RunParameters(settings=settings, overrides=overrides, outputs=outputs)
    return run_stages(*given.resolved(), until=until, refresh=refresh)


def run_stages(
    settings: Settings, outputs: Path, *, until: str | None = None, refresh: Sequence[str] = ()
) -> dict[str, Any]:
    """Run stages in order, inside a flow run.

    Args:
        settings: Everything that the run depends on.
        outputs: Absolute.
        until: Last stage to run, with what it needs; none for all of them.
        refresh: Stages to compute again from the beginning, under every seed.

    Returns:
        The content of the run's `results.json`.
    """
    for name in ("training", "models", "data"):
        # Prefect attaches its handler to these (pyproject.toml), but leaves their level alone.
        logging.getLogger(name).setLevel(logging.INFO)
    if (flow_run.run_count or 0) > 1:
        go_on_after_crash()
    with suppress(Exception):  # other runs' business must not end this one
        tidy_up_after_others()
    again = refreshed(refresh, plan(settings, until))
    preflight.check(settings, outputs, until)
    if is_off_for_want_of_a_key(settings.tracking):
        logger.info(HOW_TO_TURN_ON)
    with wandb_key_of_secret(settings.tracking):
        record = RunRecord(settings, outputs, until=until, command=_command())
        try:
            while not _went_through(settings, outputs, record, until, again):
                pass  # what was lost at the address of the outputs is computed again
        except BaseException:
            with suppress(OSError):  # a full disk must not hide what has ended the run
                record.write(state="failed")
            raise
        record.write(state="finished")
        return record.results()


def _went_through(
    settings: Settings, outputs: Path, record: RunRecord, until: str | None, again: Sequence[str]
) -> bool:
    """Run the stages; say whether nothing was found to be lost that they build on."""
    for step in steps(settings, outputs, record.found, until, record.name):
        stage, request = step.stage, step.request
        assert request  # of all that it needs, the results have been added
        record.begin(request)
        if stage.name in again:
            attempts.refresh(request, str(flow_run.id))
        try:
            result = deliver(TASKS[stage.name], request)
        except LostError as error:
            logger.warning("%s", error)
            return False
        record.add(result, step.variant)
        if stage.name.startswith("download"):  # now it is known what the images are
            preflight.check(settings, outputs, until)
        publish(record.results(), request, record.directory)
    return True


def _command() -> list[str] | None:
    """Return what started a run of a deployment; None where no deployment is run."""
    if not deployment.name:
        return None
    return ["prefect", "deployment", "run", f"{flow_run.flow_name}/{deployment.name}"]
