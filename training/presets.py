"""Named runs: what differs from the defaults, the command, the time, the expected result."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A named set of settings.

    Attributes:
        summary: One line for `rotvit presets`.
        needs: Hardware and time, one line.
        values: Nested settings that differ from the defaults of `training/settings.py`.
    """

    summary: str
    needs: str
    values: Mapping[str, Any]


PRESETS: dict[str, Preset] = {
    # Command: rotvit run (or `make demo`). Expected scores: the first table of README.md.
    "drawn": Preset(
        summary="10 kinds of drawn things at 32 px, 500 labels; no download.",
        needs="a laptop; minutes on two cores",
        values={
            "data": {"source": "drawn10", "crop_margin": 0.125},
            "model": {
                "image_size": 32,
                "patch_size": 8,
                "embed_dim": 128,
                "depth": 4,
                "num_heads": 4,
            },
            "pretrain": {"epochs": 7, "batch_size": 32, "base_lr": 2e-3, "warmup_epochs": 1},
            "transfer": {"source": None, "labels": 500},
            "finetune": {"epochs": 20, "batch_size": 32, "base_lr": 1.6e-2, "warmup_epochs": 2},
            "finetune_all": {"epochs": 20, "batch_size": 32, "base_lr": 8e-3, "warmup_epochs": 2},
            "from_scratch": {"epochs": 20, "batch_size": 32, "base_lr": 1.6e-2, "warmup_epochs": 2},
        },
    ),
    # Command: rotvit run --preset imagenette.
    "imagenette": Preset(
        summary="Imagenette photos at 160 px for pretraining and transfer.",
        needs="one GPU; 1.2 GB of disk for the prepared images",
        values={
            "data": {"source": "imagenette", "crop_margin": 0.125},
            "pretrain": {
                "epochs": 100,
                "batch_size": 64,
                "base_lr": 5e-4,
                "warmup_epochs": 5,
            },
            "transfer": {"source": None},
        },
    ),
    # Command: rotvit run --preset photos. What pretraining is worth on photos, without a GPU; the
    # options are the best of EXPERIMENTS.md.
    "photos": Preset(
        summary="Imagenette photos at 64 px with a small network.",
        needs="two cores for an hour or two; 200 MB of disk for the prepared images",
        values={
            "data": {"source": "imagenette", "crop_margin": 0.125},
            "model": {
                "image_size": 64,
                "patch_size": 8,
                "embed_dim": 128,
                "depth": 4,
                "num_heads": 4,
            },
            "pretrain": {
                "epochs": 40,
                "batch_size": 64,
                "base_lr": 1e-3,
                "warmup_epochs": 2,
                "image_size": 48,
                "crop_scale": 0.35,
                "patch_rotation": 1.0,
            },
            "transfer": {"source": None, "finetune_all": True},
            "finetune": {
                "epochs": 15,
                "base_lr": 2e-3,
                "warmup_epochs": 2,
                "crop_scale": 0.35,
            },
            "finetune_all": {
                "epochs": 15,
                "base_lr": 2e-3,
                "warmup_epochs": 2,
                "crop_scale": 0.35,
            },
            "from_scratch": {
                "epochs": 15,
                "base_lr": 4e-3,
                "warmup_epochs": 2,
                "crop_scale": 0.35,
            },
        },
    ),
    # Command: rotvit run --preset imagenet. The mission; its optimiser settings are the defaults.
    "imagenet": Preset(
        summary="The mission: ImageNet-1k at 160 px for 5 epochs, transfer to Imagenette.",
        needs="one large GPU; 100 GB of disk (25 with data.format=jpeg); HF_TOKEN",
        values={},
    ),
    # Command: rotvit run --preset cifar10. Sizes of DeiT-Tiny with the patches of PatchRot
    # (arXiv 2210.15722).
    "cifar10": Preset(
        summary="CIFAR-10 at 32 px with a network of DeiT-Tiny's size.",
        needs="one GPU",
        values={
            "data": {"source": "cifar10", "crop_margin": 0.125},
            "model": {
                "image_size": 32,
                "patch_size": 4,
                "embed_dim": 192,
                "depth": 12,
                "num_heads": 3,
            },
            "pretrain": {"epochs": 300, "batch_size": 64, "base_lr": 5e-4, "warmup_epochs": 10},
            "transfer": {"source": None, "finetune_all": True},
            "finetune": {"epochs": 50, "batch_size": 128, "base_lr": 1e-3, "warmup_epochs": 5},
            "finetune_all": {"epochs": 50, "batch_size": 128, "base_lr": 5e-4, "warmup_epochs": 5},
            "from_scratch": {"epochs": 300, "batch_size": 128, "base_lr": 1e-3},
        },
    ),
}
