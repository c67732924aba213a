"""Features: what every layer of the frozen backbone says about the labelled images, in one pass.

The probe, the feature analysis and the report read these features and run no backbone. They are
taken of all labelled images, so that another `transfer.labels` reads other rows of them, and of an
untrained backbone besides: a random ViT is already a fair descriptor, and so the control.

Dimension key: L = blocks, N = images, D = width of the tokens, R = 2 L + 3 rows.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor
from transformers import ViTForImageClassification

from data.loaders import eval_batches
from data.splits import Subset
from models.vit import layer_features, to_device
from training import runner
from training.data_parallel import ALONE, Team
from training.hardware import Hardware
from training.images import LabelledImages, open_splits
from training.network import build_model, load_start
from training.runner import StageContext, StageOutcome
from training.settings import Settings
from training.stopping import StopRequest

Backbone = Literal["pretrained", "random"]
"""Whose features: of the backbone to be measured, or of the one that it began as."""

FOLDER = "features"
"""Folder below the stage's directory: an array `<backbone>-<split>.npy` each."""

_BATCH_SIZE = 256


@dataclass(frozen=True)
class Features:
    """What a backbone says about some images; float32.

    Attributes:
        rows: `(R, N, D)`: the mean of the patch tokens after the embedding and each block, the
            class token at the same L+1 places, both before the last norm, and last the class token
            after it, which is what a head reads. On the CPU, or where it was moved to; it may be
            mapped from a file, of which only what is looked at is read.
        labels: `(N,)`, int64, on the same device.
    """

    rows: Tensor
    labels: Tensor

    @property
    def layers(self) -> int:
        """Layers, the embedding among them: L + 1."""
        return len(self.rows) // 2

    @property
    def mean(self) -> Tensor:
        """Mean of the patch tokens by layer, `(L+1, N, D)`."""
        return self.rows[: self.layers]

    @property
    def cls(self) -> Tensor:
        """Class token by layer, `(L+1, N, D)`; at the embedding it has seen no pixel."""
        return self.rows[self.layers : -1]

    @property
    def final_cls(self) -> Tensor:
        """Class token after the last norm, `(1, N, D)`."""
        return self.rows[-1:]

    def to(self, device: torch.device) -> "Features":
        """Return the same features on a device."""
        return Features(self.rows.to(device), self.labels.to(device))

    def headline(self) -> "Features":
        """Return what a head reads, and nothing else: `final_cls` as the only row."""
        return Features(self.final_cls, self.labels)

    def of(self, places: Tensor) -> "Features":
        """Return the features of some of the images, by their places, `(n,)`, int64."""
        return Features(self.rows[:, places], self.labels[places])


@dataclass(frozen=True)
class SplitFeatures:
    """Features of the images that the transfer stages train, choose and report on."""

    train: Features
    val: Features
    test: Features

    def where_heads_train(self, device: torch.device) -> "SplitFeatures":
        """Return the same features on a device, or where they are if they do not fit there."""
        parts = (self.train, self.val, self.test)
        if device.type == "cuda":
            needed = sum(part.rows.nbytes for part in parts)
            if needed > torch.cuda.mem_get_info(device)[0] // 2:
                return self
        return SplitFeatures(*(part.to(device) for part in parts))


def compute(context: StageContext) -> StageOutcome:
    """Run the pretrained backbone and the random one over all labelled images."""
    settings, hardware = context.settings, context.hardware()
    splits = open_splits(context.input("data"), settings, context.is_stopped)
    parts = {"train": splits.train, "val": splits.val, "test": splits.test}
    (context.directory / FOLDER).mkdir(exist_ok=True)  # by whoever comes first
    total, done = 2 * sum(map(len, parts.values())), 0
    backbones: dict[Backbone, ViTForImageClassification] = {
        "pretrained": load_start(context),
        "random": build_model(context),
    }
    for backbone, model in backbones.items():
        to_device(model, hardware.torch_device)
        for split, subset in parts.items():
            for seen in write_features(
                _path(context.directory, backbone, split),
                model,
                subset,
                settings=settings,
                hardware=hardware,
                stop=context.stop,
                team=context.team,
            ):
                context.progress(done + seen, total, "images", f"{backbone} backbone, {split}")
            done += len(subset)
    return StageOutcome(
        scores={"images": total // 2, "layers": settings.model.depth + 1}, made=[FOLDER]
    )


def write_features(
    path: Path,
    model: ViTForImageClassification,
    subset: Subset,
    *,
    settings: Settings,
    hardware: Hardware,
    stop: StopRequest,
    team: Team = ALONE,
) -> Iterator[int]:
    """Write the features of a split into a `.npy` file, in the order of the split.

    One forward pass in eval mode, which leaves the model as it is. Centre crops are taken, nothing
    is augmented. Memory does not grow with the number of images.

    Args:
        path: Where to; float32 `(R, N, D)`, see `Features`.
        model: On the hardware's device.
        subset: The images; labels are not looked at.
        settings: Of the run: the model's sizes.
        hardware: Device and precision.
        stop: Asked after each batch.
        team: The processes that divide the images, each of which has the model.

    Yields:
        How many images are done, about, after each batch.

    Raises:
        InterruptedError: If a stop was requested; what is there is of no use then.
        OSError: If the disk is too small, before any pass.
        PeerError: If another process raised.
    """
    sizes, device = settings.model, hardware.torch_device
    count = len(subset)
    shape = (2 * sizes.depth + 3, count, sizes.embed_dim)
    begin = team.from_first(lambda: _make_file(path, shape))
    own = team.share.of_all(np.arange(count, dtype=np.int64))
    batches = eval_batches(
        subset,
        batch_size=_BATCH_SIZE * team.count,
        side=sizes.image_size,
        device=device,
        share=team.share,
    )
    done = 0
    # Not through a map of the file: of a page that two machines write parts of, one part is lost.
    with path.open("r+b") as file:
        for batch in team.until_stopped(batches, stop):
            with hardware.autocast():
                found = layer_features(model, batch.images)
            together = torch.cat([found.mean, found.cls, found.final_cls[None]]).float().cpu()
            for row, values in enumerate(together.numpy()):
                file.seek(begin + (row * count + int(own[done])) * values[0].nbytes)
                file.write(values.tobytes())
            done += len(batch.ids)
            yield min(count, done * team.count)
    team.any_of(False)  # so that all of the file is there for the first one, which reads it


def _make_file(path: Path, shape: tuple[int, ...]) -> int:
    """Make an array's file, with its space on the disk; return where in it the numbers begin."""
    begin: int = open_memmap(path, mode="w+", dtype=np.float32, shape=shape).offset
    if hasattr(os, "posix_fallocate"):  # on a full disk an error now, and not later
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return begin


def open_features(directory: Path, backbone: Backbone, images: LabelledImages) -> SplitFeatures:
    """Open the features of the images that the transfer stages use.

    Args:
        directory: Of the finished stage.
        backbone: Whose features.
        images: The labelled images; of the training images only these are returned.
    """
    parts = {"train": images.train, "val": images.val, "test": images.test}
    opened = {}
    for split, subset in parts.items():
        # Copy on write: torch wants memory that it may write to, the file stays as it is.
        rows = torch.from_numpy(np.load(_path(directory, backbone, split), mmap_mode="c"))
        if split == "train" and len(images.train) < rows.shape[1]:
            rows = rows[:, torch.from_numpy(images.places)]
        assert subset.labels is not None  # open_labelled sees to it
        opened[split] = Features(rows, torch.from_numpy(subset.labels))
    return SplitFeatures(**opened)


def _path(directory: Path, backbone: Backbone, split: str) -> Path:
    return directory / FOLDER / f"{backbone}-{split}.npy"


if __name__ == "__main__":
    raise SystemExit(runner.main(compute))
