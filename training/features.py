"""Features of a frozen backbone: every layer, from one pass over the images.

Dimension key: L = blocks, N = images, D = width of the tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import ViTForImageClassification

from data.loaders import eval_batches
from data.splits import Subset
from models.vit import layer_features
from training.hardware import Hardware

_BATCH_SIZE = 256


@dataclass(frozen=True)
class Features:
    """What a backbone says about a split; on the CPU, float32, in the order of the split.

    Attributes:
        cls: `(L+1, N, D)`, class token after the embedding or block l, before the last norm.
        mean: `(L+1, N, D)`, mean of the patch tokens there.
        final_cls: `(N, D)`, class token after the last norm: what a head reads.
        labels: `(N,)`, int64.
    """

    cls: Tensor
    mean: Tensor
    final_cls: Tensor
    labels: Tensor


def extract_features(
    model: ViTForImageClassification, subset: Subset, *, side: int, hardware: Hardware
) -> Features:
    """Run the backbone once over a labelled split, in eval mode, without changing it.

    Args:
        model: On the hardware's device.
        subset: Labelled images; centre crops are taken, nothing is augmented.
        side: Input size in pixels.
        hardware: Device and precision.
    """
    parts = []
    for batch in eval_batches(
        subset, batch_size=_BATCH_SIZE, side=side, device=hardware.torch_device
    ):
        with hardware.autocast():
            found = layer_features(model, batch.images)
        parts.append(
            (found.cls.float().cpu(), found.mean.float().cpu(), found.final_cls.float().cpu())
        )
    cls, mean, final_cls = zip(*parts, strict=True)
    return Features(
        cls=torch.cat(cls, dim=1),
        mean=torch.cat(mean, dim=1),
        final_cls=torch.cat(final_cls),
        labels=torch.from_numpy(subset.labels),
    )
