"""A model as one ONNX file, held against the original before it counts as written."""

import warnings
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import ViTForImageClassification

from models.errors import ModelError
from models.export import input_side

PACKAGES = ("onnx", "onnxruntime", "onnxscript")
"""What the extra `onnx` installs; nothing else needs them."""

TOLERANCE = 1e-4
"""Largest difference of a probability between ONNX Runtime and torch."""

CHECKED_BATCHES = (1, 3)
"""Batch sizes that are compared: the one that was traced, and another."""


class _Logits(nn.Module):
    """The model without the object around its output, which ONNX does not know."""

    def __init__(self, model: ViTForImageClassification) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        logits: Tensor = self.model(pixel_values).logits
        return logits


def check_installed() -> None:
    """Make sure that the packages of the extra are there.

    Raises:
        ModelError: If one is not.
    """
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ModelError(
            f"ONNX needs {', '.join(missing)}, which is not installed. "
            "Run: pip install 'rotation-vit[onnx]'"
        )


def export_onnx(model: ViTForImageClassification, path: Path) -> float:
    """Write the model as ONNX and compare what ONNX Runtime makes of it.

    Input `pixel_values`, `(B, 3, S, S)`, float32, normalised as `preprocessor_config.json` says;
    output `logits`, `(B, C)`. The size B of the batch is free.

    Args:
        model: On the CPU, in eval mode.
        path: File to write, weights included.

    Returns:
        The largest difference of a probability that was found.

    Raises:
        ModelError: If the extra is not installed, or the two differ by more than `TOLERANCE`.
    """
    check_installed()
    side = input_side(model.config)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(max(CHECKED_BATCHES), 3, side, side, generator=generator) * 2 - 1
    wrapped = _Logits(model).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about operators and versions, none of a user's making
        torch.onnx.export(
            wrapped,
            (pixels[:2],),  # a batch of one would be taken for a constant
            path,
            input_names=["pixel_values"],
            output_names=["logits"],
            dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}},
            external_data=False,
            verbose=False,
        )
    difference = max(_difference(wrapped, path, pixels[:count]) for count in CHECKED_BATCHES)
    if not difference <= TOLERANCE:
        raise ModelError(
            f"ONNX Runtime must give the probabilities of torch to {TOLERANCE:g}, they differ by "
            f"{difference:.2g}. Try other versions of {', '.join(PACKAGES)}."
        )
    return difference


@torch.no_grad()
def _difference(model: nn.Module, path: Path, pixels: Tensor) -> float:
    import onnxruntime  # an extra

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"pixel_values": pixels.numpy()})
    found = torch.from_numpy(logits).softmax(dim=1)
    return float((found - model(pixels).softmax(dim=1)).abs().max())
