"""Stochastic depth: in training, a block's branches are left out at random, for each sample.

Dimension key: B = images in the batch, N = tokens per image, D = width of the tokens.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import ViTForImageClassification

from models.errors import ModelError


def drop_paths(model: ViTForImageClassification, rate: float) -> None:
    """Let a model leave out branches while it trains, in place; for good.

    The rate grows linearly with depth, from 0 in the first block to `rate` in the last. Attention
    and MLP of a block are left out independently, and what is kept is scaled up, so that its mean
    stays. A block in eval mode (or frozen: see `set_train_mode`) leaves nothing out. Names of
    weights, and what is exported, stay as they are.

    The numbers come from the default generator of the device, as those of dropout do, which the
    training loop seeds for every step.

    Args:
        model: Its blocks get hooks; call it once.
        rate: Probability in [0, 1) with which a branch of the last block is left out; 0 does
            nothing.

    Raises:
        ModelError: If the rate is out of range.

    References:
        Huang et al., "Deep Networks with Stochastic Depth", ECCV 2016,
        https://arxiv.org/abs/1603.09382; the linear rule, and per sample as in DeiT (Touvron et
        al. 2021), https://arxiv.org/abs/2012.12877
    """
    if not 0 <= rate < 1:
        raise ModelError(f"The rate of stochastic depth must be in [0, 1), got {rate}.")
    blocks: list[Any] = list(model.vit.layers)
    for number, block in enumerate(blocks):
        # A network of one block has no first and last one: it takes the whole rate.
        own = rate * number / (len(blocks) - 1) if len(blocks) > 1 else rate
        if own:
            for branch in (block.attention, block.mlp):
                branch.register_forward_hook(_Dropping(own))


class _Dropping:
    """A forward hook on a branch: some samples' output becomes zero, the others' larger."""

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def __call__(self, branch: nn.Module, inputs: Any, output: Any) -> Any:
        if not branch.training:
            return None  # which leaves the output as it is
        if isinstance(output, tuple):  # of attention: with its weights, where they are asked for
            return (self._drop(output[0]), *output[1:])
        return self._drop(output)

    def _drop(self, tokens: Tensor) -> Tensor:
        """Return `(B, N, D)`; in float32 the factor is drawn, or bfloat16 would round it."""
        kept = 1 - self.rate
        drawn = torch.rand(len(tokens), 1, 1, device=tokens.device)
        return tokens * ((drawn < kept) / kept).to(tokens.dtype)
