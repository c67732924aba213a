"""Heads that pretraining needs beside the one that is exported, and leaves behind.

Dimension key: B = images in the batch, S = image side in pixels, P = patches per image, C =
classes.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import ViTForImageClassification

from models.vit import INITIAL_STD


class Answers(NamedTuple):
    """What the heads say."""

    logits: Tensor
    """`(B, C)` of the exported head, which reads the class token; of patches `(B, P, C)`."""
    mean_logits: Tensor | None = None
    """`(B, C)` of the head that reads the mean of the patch tokens, where there is one."""


class PretrainingNetwork(nn.Module):
    """A network with heads beside the one that it has as a transformers' ViT and is exported with.

    With a head on the mean of the patch tokens, the backbone learns from that one: the exported
    head learns beside it, from class tokens that pass no gradient on, so that the exported model
    can tell turns all the same. A head on patches reads each patch token by itself.
    """

    def __init__(
        self, model: ViTForImageClassification, *, mean: bool, patches: bool, seed: int
    ) -> None:
        """Put heads beside that of a model.

        Args:
            model: The network; its weights are shared with it, and its device taken.
            mean: Whether the backbone is to learn from the mean of the patch tokens.
            patches: Whether patches are to be read one by one.
            seed: Of the heads' weights.
        """
        super().__init__()
        self.model = model
        self.mean_head = new_head(model, seed=seed) if mean else None
        self.patch_head = new_head(model, seed=seed + 1) if patches else None

    def forward(self, pixels: Tensor, *, patches: bool = False) -> Answers:
        """Read images `(B, 3, S, S)`, normalised: which turn each has, or each of its patches."""
        tokens = self.model.vit(pixels).last_hidden_state
        if patches:
            assert self.patch_head is not None
            return Answers(self.patch_head(tokens[:, 1:]))
        if self.mean_head is None:
            return Answers(self.model.classifier(tokens[:, 0]))
        return Answers(
            logits=self.model.classifier(tokens[:, 0].detach()),
            mean_logits=self.mean_head(tokens[:, 1:].mean(dim=1)),
        )


@torch.no_grad()
def new_head(model: ViTForImageClassification, *, seed: int) -> nn.Linear:
    """Return a small head for the tokens of a model, on its device, as wide as the model's own.

    Its weights depend on the seed and the sizes alone; the global random state is left as it was.
    """
    # On the meta device, because initialising it would draw from the global random state.
    old = model.classifier
    assert isinstance(old, nn.Linear)
    head = nn.Linear(old.in_features, old.out_features, device="meta")
    head = head.to_empty(device="cpu")
    head.weight.normal_(std=INITIAL_STD, generator=torch.Generator().manual_seed(seed))
    head.bias.zero_()
    return head.to(model.device)
