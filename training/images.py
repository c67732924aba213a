"""The images of a stage: the splits of prepared data that the settings ask for."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from data.duplicates import has_copy
from data.patience import Stop, never
from data.prepared import PreparedData
from data.records import DatasetError
from data.splits import Splits, Subset, split, take_labelled
from data.transforms import resize
from training.settings import Settings


@dataclass(frozen=True)
class LabelledImages:
    """What the transfer stages train, choose and report on.

    Attributes:
        train: The `transfer.labels` labelled images, the same for every stage.
        val: All validation images, with labels.
        test: All test images, read once per reported number.
        places: `(len(train),)`, int64: where these stand among all training images.
        class_names: In the order of the labels.
    """

    train: Subset
    val: Subset
    test: Subset
    places: NDArray[np.int64]
    class_names: tuple[str, ...]


def as_pretrained_on(images: Tensor, settings: Settings) -> Tensor:
    """Return images `(B, 3, S, S)`, floating point, at the size at which pretraining shows them."""
    size = settings.pretrain_size
    return images if images.shape[-1] == size else resize(images, size)


def open_splits(prepared: Path, settings: Settings, stop: Stop = never) -> Splits:
    """Open prepared images as train, val and test; for `stop` see `PreparedData.open`."""
    return split(
        PreparedData.open(prepared, stop),
        val_fraction=settings.data.val_fraction,
        test_fraction=settings.data.test_fraction,
        seed=settings.data.split_seed,
    )


def open_pretraining(
    prepared: Path, settings: Settings, transfer: Path | None = None, stop: Stop = never
) -> tuple[Splits, int]:
    """Open prepared images to pretrain on, without copies of test images if so set.

    Args:
        prepared: The images to pretrain on.
        settings: Of the run; `data.leave_out_test_copies` asks for it.
        transfer: The labelled images, where they are others.
        stop: See `PreparedData.open`.

    Returns:
        The splits, and how many images were left out of train.

    Raises:
        DatasetError: If nothing is left.
    """
    splits = open_splits(prepared, settings, stop)
    if not settings.data.leave_out_test_copies:
        return splits, 0
    tests = [splits.test] + ([open_splits(transfer, settings).test] if transfer else [])
    known = np.concatenate([test.split.hashes()[test.indices] for test in tests])
    train = splits.train
    copied = has_copy(train.split.hashes()[train.indices], known)
    if copied.all():
        raise DatasetError(
            f"Some training images must be no copies of test images, all {len(train)} are. Train "
            "and test seem to be the same source: change one, or set "
            "data.leave_out_test_copies=false."
        )
    kept = Subset(train.split, train.indices[~copied])
    return replace(splits, train=kept), int(copied.sum())


def copies_in_pretraining(prepared: Path, transfer: Path, settings: Settings) -> int:
    """Count the labelled test images that are (nearly) among the images to pretrain on.

    Args:
        prepared: The images to pretrain on.
        transfer: The labelled images, which may be the same.
        settings: Of the run: where a source brings no test images, they divide it.

    Raises:
        DatasetError: If one of the two is not there.
    """
    seen, tests = open_splits(prepared, settings).train, open_splits(transfer, settings).test
    test_hashes, train_hashes = (part.split.hashes()[part.indices] for part in (tests, seen))
    return int(has_copy(test_hashes, train_hashes).sum())


def open_labelled(prepared: Path, settings: Settings, stop: Stop = never) -> LabelledImages:
    """Open prepared images as the transfer stages use them; for `stop` see `PreparedData.open`.

    Raises:
        DatasetError: If there are no labels, or not as many as `transfer.labels`.
    """
    names = PreparedData.open(prepared).class_names
    if names is None:
        source = settings.transfer_source[0]
        raise DatasetError(
            f"The transfer stages need labelled images, {source} has no labels. Set "
            "transfer.source to a source with one folder per class, or run `rotvit pretrain`, "
            "which needs no labels."
        )
    splits = open_splits(prepared, settings, stop)
    train = take_labelled(splits.train, settings.transfer.labels, seed=settings.data.split_seed)
    return LabelledImages(
        train=train,
        val=splits.val,
        test=splits.test,
        places=splits.train.places_of(train),
        class_names=tuple(names),
    )
