"""Heads that pretraining needs beside the one that is exported, and leaves behind.

Dimension key: B = images in the batch, S = image side in pixels, D = width of the tokens, C =
classes.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import ViTForImageClassification

from models.vit import INITIAL_STD


class Answers(NamedTuple):
    """What the heads say about the turns of images; `(B, C)` each."""

    logits: Tensor
    """Of the exported head, which reads the class token."""
    mean_logits: Tensor
    """Of the head that reads the mean of the patch tokens."""


class MeanPooled(nn.Module):
    """A network whose backbone learns from a head on the mean of its patch tokens alone.

    Transformers' ViT has one head, which reads the class token, and so has what is exported. That
    head learns beside the other one, from class tokens that pass no gradient on: the backbone is
    the other head's, and the exported model can tell turns all the same.
    """

    def __init__(self, model: ViTForImageClassification, *, seed: int) -> None:
        """Put a head beside that of a model.

        Args:
            model: The network; its weights are shared with it, and its device taken.
            seed: Of the head's weights.
        """
        super().__init__()
        self.model = model
        self.head = new_head(model, model.num_labels, seed=seed)

    def forward(self, pixels: Tensor) -> Answers:
        """Read images `(B, 3, S, S)`, normalised."""
        tokens = self.model.vit(pixels).last_hidden_state
        return Answers(
            logits=self.model.classifier(tokens[:, 0].detach()),
            mean_logits=self.head(tokens[:, 1:].mean(dim=1)),
        )


@torch.no_grad()
def new_head(model: ViTForImageClassification, num_labels: int, *, seed: int) -> nn.Linear:
    """Return a small head for the tokens of a model, on its device.

    Its weights depend on the seed and the sizes alone; the global random state is left as it was.
    """
    # On the meta device, because initialising it would draw from the global random state.
    head = nn.Linear(model.config.hidden_size, num_labels, device="meta").to_empty(device="cpu")
    head.weight.normal_(std=INITIAL_STD, generator=torch.Generator().manual_seed(seed))
    head.bias.zero_()
    return head.to(model.device)
