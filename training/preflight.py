"""What can be known before the work starts: a user's mistakes cost seconds, not hours."""

import os
from pathlib import Path

from data.records import DatasetError, Source
from data.sources import open_source
from training.settings import Settings
from training.stages import plan
from training.store import OutputsError, data_source
from training.tracking import wandb_mode


def check(settings: Settings, outputs: Path, until: str | None = None) -> None:
    """Raise for whatever would make a stage of the plan fail on its inputs.

    Raises:
        ConfigError: If `until` names no stage, or W&B is to be online without a key.
        DatasetError: If a source cannot be used as the stages need it.
        OutputsError: If the outputs folder cannot be written.
    """
    stages = [stage.name for stage in plan(settings, until)]
    check_outputs(outputs)
    wandb_mode(settings.tracking)
    for name in stages:
        if name.startswith("prepare"):
            _check_source(name, settings, stages)


def check_outputs(outputs: Path) -> None:
    """Make the outputs folder where it is missing.

    Raises:
        OutputsError: If it cannot be written.
    """
    try:
        outputs.mkdir(parents=True, exist_ok=True)
        probe = outputs / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OutputsError(
            f"The outputs folder must be writable, {outputs} is not: {error.strerror}. "
            "Choose another one with --outputs."
        ) from error


def _check_source(name: str, settings: Settings, stages: list[str]) -> None:
    source = open_source(*data_source(name, settings))
    transfers = name == "prepare_transfer_data" or settings.transfer_is_pretrain_data
    if transfers and "linear_probe" in stages and source.class_names is None:
        raise DatasetError(
            f"The transfer stages need labelled images, {source.spec} has no labels. Set "
            "transfer.source to a source with one folder per class, or run `rotvit pretrain`, "
            "which needs no labels."
        )
    if name == "prepare_data" and "pretrain" in stages:
        _check_batch(source, "pretrain", settings.pretrain.batch_size, settings)


def _check_batch(source: Source, stage: str, batch_size: int, settings: Settings) -> None:
    held_out = settings.data.val_fraction
    share = 1 - held_out
    if "test" not in source.counts:
        share *= 1 - settings.data.test_fraction
    images = int(source.counts["train"] * share)
    if images < batch_size:
        raise DatasetError(
            f"{stage}.batch_size must be at most the number of training images; it is "
            f"{batch_size}, and {source.spec} has {images} once val and test are held out. "
            f"Set {stage}.batch_size to {max(1, images)} or less, or add images."
        )
