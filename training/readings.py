"""Ways to read a frozen backbone with a linear probe: the exported one, and others beside it.

The others are those of DINOv2's linear evaluation: class tokens of the last block or of the last
four, with and without the mean of the patch tokens. A head that reads them is no model of
transformers' format, so they are numbers to compare with and nothing that is exported.

Dimension key: L = blocks, N = images, D = width of the tokens.

References:
    Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision", 2023, appendix B,
    https://arxiv.org/abs/2304.07193
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from models.vit import LAYER_NORM_EPS
from training.features import Features

LAST_BLOCKS = 4
"""Blocks whose class tokens are read together; a backbone with fewer gives those that it has."""


@dataclass(frozen=True)
class Reading:
    """One way to read a backbone.

    Attributes:
        name: In words, for tables.
        read: From features to what a head sees, `(1, N, width)`, float32, on the same device.
            Where tokens are put side by side it is a copy.
    """

    name: str
    read: Callable[[Features], Tensor]


def readings(depth: int) -> list[Reading]:
    """Return the ways to read a backbone of `depth` blocks; the first one is exported."""
    found = [
        Reading("class token", class_token),
        Reading("mean of patch tokens", _mean),
        Reading("class token, mean of patch tokens", lambda f: _beside(class_token(f), _mean(f))),
    ]
    blocks = min(LAST_BLOCKS, depth)
    if blocks > 1:  # of one block they are the same again
        name = f"class tokens of the last {blocks} blocks"
        found += [
            Reading(name, _last_class_tokens),
            Reading(
                f"{name}, mean of patch tokens",
                lambda f: _beside(_last_class_tokens(f), _mean(f)),
            ),
        ]
    return found


def class_token(features: Features) -> Tensor:
    """Return the class token after the last norm, `(1, N, D)`: what an exported head reads."""
    return features.final_cls


def _mean(features: Features) -> Tensor:
    """Return the mean of the last block's patch tokens, before the last norm, `(1, N, D)`."""
    return features.mean[-1:]


def _last_class_tokens(features: Features) -> Tensor:
    """Return the class tokens of the last blocks, each after a norm, side by side.

    DINOv2 sends all of them through the backbone's last norm. Its scale and shift are left out
    here: heads standardise what they read, which undoes them.
    """
    blocks = features.cls[1:][-LAST_BLOCKS:]  # the first layer is the embedding
    return _beside(*functional.layer_norm(blocks, blocks.shape[-1:], eps=LAYER_NORM_EPS)[:, None])


def _beside(*parts: Tensor) -> Tensor:
    return torch.cat(parts, dim=-1)
