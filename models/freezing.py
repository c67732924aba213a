"""Which parts of the network are trained; the others keep their weights and stay in eval mode."""

from collections.abc import Iterator

from torch import nn
from transformers import ViTForImageClassification

from models.errors import ModelError


def train_head_and_last_blocks(model: ViTForImageClassification, blocks: int | None) -> None:
    """Let only the head, the last norm and the last blocks be trained, in place.

    Call `set_train_mode` before training: freezing alone leaves dropout active in frozen parts.

    Args:
        model: Its `requires_grad` flags are set; gradients of frozen weights are dropped.
        blocks: How many blocks, counted from the head; 0 trains the head alone (the norm before
            it stays frozen too: a linear probe), none trains everything.

    Raises:
        ModelError: If the model has fewer blocks.
    """
    depth = len(model.vit.layers)
    if blocks is not None and not 0 <= blocks <= depth:
        raise ModelError(
            f"The number of last blocks to train must be between 0 and {depth}, the depth of this "
            f"model, got {blocks}. Use none to train everything."
        )
    model.requires_grad_(blocks is None)
    if blocks is not None:
        model.classifier.requires_grad_(True)
        if blocks:
            model.vit.layernorm.requires_grad_(True)
            model.vit.layers[depth - blocks :].requires_grad_(True)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            # Left over, it would count in the norm of the gradient.
            parameter.grad = None


def set_train_mode(model: ViTForImageClassification) -> None:
    """Put what is trained into train mode and what is frozen into eval mode, in place."""
    model.train()
    for part in _parts(model):
        if not any(parameter.requires_grad for parameter in part.parameters()):
            part.eval()


def _parts(model: ViTForImageClassification) -> Iterator[nn.Module]:
    yield model.vit.embeddings
    yield from model.vit.layers
    yield model.vit.layernorm
    yield model.classifier
