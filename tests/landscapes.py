"""Pictures whose up is plain to see, and a network that has learned to see it in a second."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from data.decode import decode_square
from data.rotation import ROTATION_NAMES, make_rotation_batch
from data.transforms import normalise
from models.export import save_model
from models.vit import build_vit

SIDE, PREPARED = 16, 20


def landscape(seed: int, width: int = 48, height: int = 32) -> Image.Image:
    """A light sky over dark ground, with grain; the horizon is near the middle."""
    rng = np.random.default_rng(seed)
    pixels = np.empty((height, width, 3))
    horizon = round(height * rng.uniform(0.4, 0.6))
    pixels[:horizon] = rng.uniform(170, 230, 3)
    pixels[horizon:] = rng.uniform(20, 80, 3)
    grainy = pixels + rng.normal(0, 8, pixels.shape)
    return Image.fromarray(grainy.clip(0, 255).astype(np.uint8))


def train_on_landscapes(directory: Path) -> None:
    """Write a `model/` directory of a small network that tells how landscapes are turned."""
    squares = np.stack([decode_square(landscape(seed), SIDE) for seed in range(1000, 1032)])
    images, turns = make_rotation_batch(normalise(torch.from_numpy(squares).permute(0, 3, 1, 2)))
    model = build_vit(SIDE, 8, 24, 2, 3, 2.0, 0.0, num_labels=4, label_names=ROTATION_NAMES, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loss = torch.tensor(0.0)
    for _ in range(100):
        loss = functional.cross_entropy(model(images).logits, turns)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert loss < 0.02, f"landscapes were not learned, the loss is {loss:.2g}"
    save_model(model, directory, image_size=SIDE, prepared_size=PREPARED)
