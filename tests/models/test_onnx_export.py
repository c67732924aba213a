from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import ViTForImageClassification

from models import onnx_export
from models.errors import ModelError
from models.onnx_export import export_onnx
from models.vit import set_head

onnxruntime = pytest.importorskip("onnxruntime")

MakeVit = Callable[..., ViTForImageClassification]


@pytest.mark.slow
def test_onnx_runtime_says_what_torch_says_for_any_number_of_images(
    make_vit: MakeVit, rng: torch.Generator, tmp_path: Path
) -> None:
    model = make_vit(seed=1)
    model.train(False)
    set_head(model, torch.randn(5, 14, generator=rng), torch.randn(5, generator=rng))
    assert export_onnx(model, tmp_path / "model.onnx") <= 1e-5
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"], "weights are inside"
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for count in (1, 4):
        pixels = torch.randn(count, 3, 15, 15, generator=rng)
        (found,) = session.run(None, {"pixel_values": pixels.numpy()})
        with torch.no_grad():
            expected = model(pixels).logits.numpy()
        np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.slow
def test_a_file_that_says_something_else_is_an_error(
    make_vit: MakeVit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_export, "TOLERANCE", -1.0)
    model = make_vit()
    model.train(False)
    with pytest.raises(ModelError, match="must give the probabilities of torch to -1, they differ"):
        export_onnx(model, tmp_path / "model.onnx")


def test_without_the_extra_it_says_what_to_install(
    make_vit: MakeVit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_export, "PACKAGES", ("no_such_package",))
    with pytest.raises(ModelError, match=r"pip install 'rotation-vit\[onnx\]'"):
        export_onnx(make_vit(), tmp_path / "model.onnx")
