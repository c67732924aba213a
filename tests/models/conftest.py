"""A seeded generator, and a network of odd sizes, so that swapped axes cannot hide."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import ViTForImageClassification

from models.vit import build_vit

SIZES: dict[str, Any] = {
    "image_size": 15,
    "patch_size": 5,
    "embed_dim": 14,
    "depth": 3,
    "num_heads": 7,
    "mlp_ratio": 1.5,
    "dropout": 0.0,
}
NAMES = ["ant", "bee", "cat", "dog", "elk"]

MakeVit = Callable[..., ViTForImageClassification]


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def make_vit() -> MakeVit:
    """Build a tiny network; keywords replace sizes, names or seed."""

    def make(**changes: Any) -> ViTForImageClassification:
        names = changes.pop("label_names", NAMES)
        seed = changes.pop("seed", 0)
        return build_vit(
            **{**SIZES, **changes}, num_labels=len(names), label_names=names, seed=seed
        )

    return make
