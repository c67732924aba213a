from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import ViTForImageClassification

from models.errors import ModelError
from models.freezing import set_train_mode, train_head_and_last_blocks
from models.vit import set_head

MakeVit = Callable[..., ViTForImageClassification]


def part_of(name: str) -> str:
    """Name of the part that a parameter belongs to: embeddings, layers.0, ..., classifier."""
    path = name.removeprefix("vit.").split(".")
    return ".".join(path[:2]) if path[0] == "layers" else path[0]


TRAINED = {
    0: {"classifier"},
    1: {"classifier", "layernorm", "layers.2"},
    2: {"classifier", "layernorm", "layers.1", "layers.2"},
    3: {"classifier", "layernorm", "layers.0", "layers.1", "layers.2"},
    None: {"classifier", "layernorm", "layers.0", "layers.1", "layers.2", "embeddings"},
}


@pytest.mark.parametrize("blocks", TRAINED)
def test_an_optimiser_step_changes_what_is_trained_and_nothing_else(
    make_vit: MakeVit, rng: torch.Generator, blocks: int | None
) -> None:
    model = make_vit()
    # Not zero, or no gradient would reach the blocks in the first step.
    set_head(model, torch.randn(5, 14, generator=rng), torch.zeros(5))
    train_head_and_last_blocks(model, blocks)
    set_train_mode(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    # All parameters, so that only the flags keep the frozen ones from moving.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    images = torch.rand(3, 3, 15, 15, generator=rng)
    nn.functional.cross_entropy(model(images).logits, torch.arange(3)).backward()  # type: ignore[no-untyped-call]
    optimizer.step()

    changed = {
        part_of(name)
        for name, value in model.state_dict().items()
        if not torch.equal(value, before[name])
    }
    assert changed == TRAINED[blocks]


@pytest.mark.parametrize("blocks", TRAINED)
def test_frozen_parts_are_in_eval_mode_and_trained_parts_in_train_mode(
    make_vit: MakeVit, blocks: int | None
) -> None:
    model = make_vit(dropout=0.5)
    train_head_and_last_blocks(model, blocks)
    set_train_mode(model)
    training = {
        part_of(name) for name, module in model.named_modules() if module.training and name
    } - {"vit", "layers"}
    assert training == TRAINED[blocks]


def test_dropout_is_off_in_front_of_what_is_trained(
    make_vit: MakeVit, rng: torch.Generator
) -> None:
    model = make_vit(dropout=0.5)
    train_head_and_last_blocks(model, 0)
    set_train_mode(model)
    set_head(model, torch.randn(5, 14, generator=rng), torch.zeros(5))
    images = torch.rand(2, 3, 15, 15, generator=rng)
    assert torch.equal(model(images).logits, model(images).logits)


def test_freezing_less_after_freezing_more_thaws(make_vit: MakeVit) -> None:
    model = make_vit()
    train_head_and_last_blocks(model, 0)
    train_head_and_last_blocks(model, None)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_gradients_of_frozen_parts_are_dropped(make_vit: MakeVit, rng: torch.Generator) -> None:
    model = make_vit()
    model(torch.rand(2, 3, 15, 15, generator=rng)).logits.sum().backward()
    train_head_and_last_blocks(model, 1)
    with_gradient = {part_of(n) for n, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == TRAINED[1]


@pytest.mark.parametrize("blocks", [-1, 4])
def test_a_number_of_blocks_that_the_model_lacks_is_refused(make_vit: MakeVit, blocks: int) -> None:
    with pytest.raises(ModelError, match=f"between 0 and 3, .* got {blocks}"):
        train_head_and_last_blocks(make_vit(), blocks)
