"""What the class token attends to: in the last block, and through all blocks together (rollout).

Dimension key: B = images in the batch, S = image side in pixels, H = heads, T = tokens (the class
token, then the patches row by row), P = patches per side.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import ViTForImageClassification

from models.vit import eval_mode


@dataclass(frozen=True, kw_only=True)
class ClassAttention:
    """How the class token's attention is spread over the patches; float32, on the model's device.

    Every map is a share of the whole: with what the class token keeps for itself it adds up to 1.

    Attributes:
        last: `(B, P, P)`, of the last block, the mean over its heads.
        rollout: `(B, P, P)`, of all blocks together, see `rollout`.
    """

    last: Tensor
    rollout: Tensor


@torch.no_grad()
def class_attention(model: ViTForImageClassification, pixels: Tensor) -> ClassAttention:
    """Return where the class token looks, without changing the model.

    The fused attention of training does not give its weights away, so this pass takes the slower
    form, which holds `(B, H, T, T)` for every block; it is meant for a few images.

    Args:
        model: Anything from `build_vit` or `load_model`.
        pixels: `(B, 3, S, S)`, normalised, on the model's device.
    """
    with eval_mode(model), _weights_given(model):
        attentions = model.vit(pixels, output_attentions=True).attentions
    blocks = [block.float().mean(dim=1) for block in attentions]
    side = math.isqrt(blocks[-1].shape[-1] - 1)

    def as_map(tokens: Tensor) -> Tensor:
        return tokens[:, 0, 1:].reshape(-1, side, side)

    return ClassAttention(last=as_map(blocks[-1]), rollout=as_map(rollout(blocks)))


def rollout(attentions: list[Tensor]) -> Tensor:
    """Return how much of each input token reaches each output token through all blocks.

    A block passes on half of what its residual connection carries and half of what its attention
    gathers, and blocks follow one another as matrices do.

    Args:
        attentions: One `(B, T, T)` per block, the first block first, the mean over its heads; every
            row adds up to 1.

    Returns:
        `(B, T, T)`; row i is the output token, and adds up to 1.

    References:
        Abnar and Zuidema, "Quantifying Attention Flow in Transformers", ACL 2020,
        https://arxiv.org/abs/2005.00928
    """
    identity = torch.eye(attentions[0].shape[-1], device=attentions[0].device)
    flow = identity.expand_as(attentions[0])
    for attention in attentions:
        flow = (attention + identity) / 2 @ flow
    return flow


@contextmanager
def _weights_given(model: ViTForImageClassification) -> Iterator[None]:
    before = model.config._attn_implementation
    model.config._attn_implementation = "eager"
    try:
        yield
    finally:
        model.config._attn_implementation = before
