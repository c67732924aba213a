"""A network in two parts: the blocks that fine-tuning leaves alone, and those above them.

What the lower part makes of an image is the same in every epoch, so it can be computed once.

Dimension key: B = images in the batch, S = image side in pixels, T = tokens of an image, the class
token first, D = their width, C = classes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import ViTForImageClassification
from transformers.modeling_outputs import ImageClassifierOutput

from models.vit import eval_mode


@torch.no_grad()  # not inference_mode: blocks will be trained on what this returns
def tokens_below(
    model: ViTForImageClassification, pixels: Tensor, last_blocks: Sequence[int]
) -> list[Tensor]:
    """Return the tokens that the last blocks read, from one pass through those below them.

    The pass is made in eval mode, as frozen parts are in training too; the modes are put back.

    Args:
        model: Anything from `build_vit` or `load_model`; it is not changed.
        pixels: `(B, 3, S, S)`, normalised, on the model's device.
        last_blocks: How many blocks there are above each boundary, from 1 to the depth.

    Returns:
        `(B, T, D)` for each boundary, in that order.
    """
    depth = len(model.vit.layers)
    found = {}
    with eval_mode(model):
        hidden: Tensor = model.vit.embeddings(pixels)
        found[depth] = hidden
        for number, block in enumerate(model.vit.layers[: depth - min(last_blocks)], start=1):
            hidden = block(hidden, None)
            if depth - number in last_blocks:
                found[depth - number] = hidden
    return [found[blocks] for blocks in last_blocks]


class LastBlocks(nn.Module):
    """The last blocks of a network, its last norm and its head. The weights are the network's."""

    def __init__(self, model: ViTForImageClassification, blocks: int) -> None:
        """Take the upper part of a network.

        Args:
            model: Goes on holding all of its parts; training this trains it.
            blocks: How many blocks, counted from the head, from 1 to the depth.
        """
        super().__init__()
        self.layers = model.vit.layers[len(model.vit.layers) - blocks :]
        self.layernorm = model.vit.layernorm
        self.classifier = model.classifier

    def forward(self, tokens: Tensor) -> ImageClassifierOutput:
        """Return what the network says of images whose tokens `tokens_below` gave.

        Args:
            tokens: `(B, T, D)`, on the model's device.

        Returns:
            An output with `logits`, `(B, C)`.
        """
        for block in self.layers:
            tokens = block(tokens, None)
        # The head reads the class token; the norm is taken token by token.
        return ImageClassifierOutput(logits=self.classifier(self.layernorm(tokens)[:, 0]))
