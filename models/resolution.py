"""A network for images of another size: its position embeddings, interpolated.

Dimension key: N = patches per side, D = width of the tokens.
"""

import copy

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import ViTForImageClassification

from models.errors import ModelError
from models.vit import allocate, to_device

_POSITIONS = "vit.embeddings.position_embeddings"


@torch.no_grad()
def at_image_size(model: ViTForImageClassification, image_size: int) -> ViTForImageClassification:
    """Return the network for images of this side, on the same device and in the same mode.

    The patches keep their size, so there are more of them, or fewer; the embeddings of their places
    are interpolated (bicubic), as transformers does for a single call with
    `interpolate_pos_encoding`. All other weights are those of `model`.

    Args:
        model: Not modified; returned itself where its size is right.
        image_size: In pixels; a multiple of the model's patch size.

    Raises:
        ModelError: If `image_size` is no multiple of it.
    """
    if model.config.image_size == image_size:
        return model
    patch_size = model.config.patch_size
    assert isinstance(patch_size, int)
    if image_size < patch_size or image_size % patch_size:
        raise ModelError(
            f"The side of images must be a multiple of the model's patch size, {patch_size} px, "
            f"got {image_size} px."
        )
    config = copy.deepcopy(model.config)
    config.image_size = image_size
    other = allocate(config)
    weights = dict(model.state_dict())
    weights[_POSITIONS] = _interpolated(weights[_POSITIONS], image_size // patch_size)
    other.load_state_dict(weights)
    other.train(model.training)
    return to_device(other, model.device)


def _interpolated(positions: Tensor, side: int) -> Tensor:
    """Return `(1, 1 + side * side, D)` from `(1, 1 + N * N, D)`; the class token's stays."""
    class_token, patches = positions[:, :1], positions[:, 1:]
    before = round(patches.shape[1] ** 0.5)
    grid = patches.view(1, before, before, -1).permute(0, 3, 1, 2)
    grid = interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([class_token, grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
