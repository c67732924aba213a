from collections.abc import Callable

import pytest
import torch
from transformers import ViTForImageClassification

from models.boundary import LastBlocks, tokens_below
from models.vit import eval_mode

MakeVit = Callable[..., ViTForImageClassification]


@pytest.fixture
def images(rng: torch.Generator) -> torch.Tensor:
    return torch.rand(2, 3, 15, 15, generator=rng)


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_the_two_parts_together_are_the_network(
    make_vit: MakeVit, images: torch.Tensor, blocks: int
) -> None:
    model = make_vit(dropout=0.5)
    with eval_mode(model):
        (tokens,) = tokens_below(model, images, [blocks])
        assert tokens.shape == (2, 10, 14)
        assert torch.equal(LastBlocks(model, blocks)(tokens).logits, model(images).logits)


def test_one_pass_gives_the_tokens_below_each_boundary(
    make_vit: MakeVit, images: torch.Tensor
) -> None:
    model = make_vit()
    found = tokens_below(model, images, [1, 3, 2])
    alone = [tokens_below(model, images, [blocks])[0] for blocks in (1, 3, 2)]
    assert len(found) == 3
    assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))
    assert not torch.equal(found[0], found[2])


def test_the_pass_is_in_eval_mode_and_leaves_the_modes_and_no_graph(
    make_vit: MakeVit, images: torch.Tensor
) -> None:
    model = make_vit(dropout=0.5).train()
    model.vit.layers[0].eval()
    modes = [module.training for module in model.modules()]
    first, second = (tokens_below(model, images, [1])[0] for _ in range(2))
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert [module.training for module in model.modules()] == modes


def test_training_the_last_blocks_trains_the_network(
    make_vit: MakeVit, images: torch.Tensor
) -> None:
    model = make_vit()
    (tokens,) = tokens_below(model, images, [1])
    LastBlocks(model, 1)(tokens).logits.sum().backward()
    moved = {name for name, value in model.named_parameters() if value.grad is not None}
    assert {name.split(".")[2] for name in moved if "layers" in name} == {"2"}
    assert {"vit.layernorm.weight", "classifier.weight"} <= moved
