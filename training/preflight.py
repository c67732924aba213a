"""What can be known before the work starts: a user's mistakes cost seconds, not hours."""

import errno
import fcntl
from pathlib import Path
from uuid import uuid4

from data.records import DatasetError
from data.sources import Outline, outline
from data.splits import train_size
from training import remote_outputs, store
from training.settings import ConfigError, Settings
from training.stage_files import OutputsError
from training.stages import STAGES, plan, transfer_data
from training.store import data_source
from training.wandb_key import wandb_mode

TRANSFER_STAGES = (
    *("features", "linear_probe", "frozen_tokens", "finetune_1", "finetune_2", "finetune_all"),
    *("from_scratch", "feature_analysis", "label_efficiency"),
)
"""Stages that need labels."""

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""What file systems answer that have no locks, or whose server has none."""


def check(settings: Settings, outputs: Path, until: str | None = None) -> None:
    """Raise for whatever would make a stage of the plan fail on its inputs.

    Uses no network: of a data set that is not downloaded yet, what is published is held against
    the settings, or nothing. Call it again when a download is done.

    Raises:
        ConfigError: If `until` names no stage or one that is of no use, or W&B is to be online
            without a key.
        DatasetError: If a source cannot be used as the stages need it.
        OutputsError: If the outputs folder cannot be written, or has no locks.
    """
    stages = [stage.name for stage in plan(settings, until)]
    if "frozen_tokens" in stages and not settings.uses_frozen_tokens:
        raise ConfigError(
            "frozen-tokens are computed for images that are the same in every epoch of "
            "fine-tuning; set finetune.flip=false, finetune.crop_scale=none, "
            "data.crop_margin=0 and hardware.frozen_tokens=auto."
        )
    check_outputs(outputs)
    wandb_mode(settings.tracking)
    for name in stages:
        if name.startswith("prepare"):
            _check_source(name, settings, stages, outputs)


def check_outputs(outputs: Path) -> None:
    """Make the outputs folder where it is missing; ask the store where it is kept for an address.

    Raises:
        OutputsError: If it cannot be written, or files there cannot be locked.
    """
    try:
        outputs.mkdir(parents=True, exist_ok=True)
        probe = outputs / f".writable-{uuid4().hex}"
        try:
            with probe.open("wb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        if error.errno in NO_LOCKS:
            raise OutputsError(
                "Files in the outputs folder must be lockable, so that no two runs compute the "
                f"same; those in {outputs} are not: {error.strerror}. Mount it with locks (Lustre: "
                "flock; NFS: a lock daemon), or choose another one with --outputs."
            ) from error
        raise OutputsError(
            f"The outputs folder must be writable, {outputs} is not: {error.strerror}. "
            "Choose another one with --outputs."
        ) from error
    remote_outputs.check(outputs)


def _check_source(name: str, settings: Settings, stages: list[str], outputs: Path) -> None:
    downloads = _downloads(name, settings, outputs)
    source = outline(*data_source(name, settings), downloads=downloads)
    if source is None:
        return
    images = _training_images(source, settings)
    if name == "prepare_data" and "pretrain" in stages:
        _check_batch("pretrain", settings.pretrain.batch_size, images)
    if name == transfer_data(settings) and not set(stages).isdisjoint(TRANSFER_STAGES):
        labels = _labels(source, images, settings)
        if not {"finetune_1", "finetune_2"}.isdisjoint(stages):
            _check_batch("finetune", settings.finetune.batch_size, labels)
        if "finetune_all" in stages:
            _check_batch("finetune_all", settings.finetune_all.batch_size, labels)
        if "from_scratch" in stages:
            _check_batch("from_scratch", settings.from_scratch.batch_size, labels)


def _downloads(name: str, settings: Settings, outputs: Path) -> Path | None:
    """Return the directory of the finished download that a preparing stage reads."""
    for needed in STAGES[name].needs(settings).values():
        verdict = store.inspect(store.make_request(STAGES[needed], settings, outputs, {}))
        return verdict.result.directory if verdict.result else None
    return None


def _training_images(source: Outline, settings: Settings) -> int:
    """Return how many images are left for training once val and test are held out."""
    data = settings.data
    return train_size(
        source.counts, val_fraction=data.val_fraction, test_fraction=data.test_fraction
    )


def _labels(source: Outline, images: int, settings: Settings) -> int:
    """Return how many labelled images the transfer stages train on."""
    if source.num_classes is None:
        raise DatasetError(
            f"The transfer stages need labelled images, {source.spec} has no labels. Set "
            "transfer.source to a source with one folder per class, or run `rotvit pretrain`, "
            "which needs no labels."
        )
    labels = settings.transfer.labels
    if labels is None:
        return images
    if not source.num_classes <= labels <= images:
        raise DatasetError(
            f"transfer.labels must be from {source.num_classes} (one image of each class) to "
            f"{images} (all training images of {source.spec} once val and test are held out), got "
            f"{labels}."
        )
    return labels


def _check_batch(section: str, batch_size: int, images: int) -> None:
    if images < batch_size:
        raise DatasetError(
            f"{section}.batch_size must be at most the number of training images, it is "
            f"{batch_size}, and there are {images}. Set {section}.batch_size to "
            f"{max(1, images)} or less, or use more images."
        )
