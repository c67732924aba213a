"""Networks for images of another size, against transformers, which interpolates in each call."""

from collections.abc import Callable

import pytest
import torch
from transformers import ViTForImageClassification

from models.errors import ModelError
from models.resolution import at_image_size

MakeVit = Callable[..., ViTForImageClassification]


@pytest.mark.parametrize("image_size", [5, 10, 20, 35])
def test_it_says_what_transformers_says(
    make_vit: MakeVit, rng: torch.Generator, image_size: int
) -> None:
    model = make_vit()
    model.train(False)
    with torch.no_grad():  # the first ones are smooth waves, which any interpolation would do
        model.vit.embeddings.position_embeddings.normal_(generator=rng)
    other = at_image_size(model, image_size)
    images = torch.randn(2, 3, image_size, image_size, generator=rng)
    expected = model(images, interpolate_pos_encoding=True).logits
    torch.testing.assert_close(other(images).logits, expected)
    assert other.config.image_size == image_size
    assert other.config.id2label == model.config.id2label


def test_the_original_stays_as_it_was(make_vit: MakeVit) -> None:
    model = make_vit()
    model.train(True)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    state = torch.get_rng_state()
    other = at_image_size(model, 30)
    assert torch.equal(torch.get_rng_state(), state)
    assert other.training
    assert model.config.image_size == 15
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]), name
    with torch.no_grad():
        for weight in other.parameters():
            weight.zero_()
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before), "weights are copied"


def test_a_network_of_the_right_size_is_returned_itself(make_vit: MakeVit) -> None:
    model = make_vit()
    assert at_image_size(model, 15) is model


@pytest.mark.parametrize("image_size", [0, 12])
def test_a_size_that_the_patches_do_not_fill_is_refused(make_vit: MakeVit, image_size: int) -> None:
    with pytest.raises(ModelError, match="multiple of the model's patch size, 5 px"):
        at_image_size(make_vit(), image_size)
