"""Stochastic depth: what is left out, when, how often, and that nothing else changes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import ViTForImageClassification

from models.drop_path import drop_paths
from models.errors import ModelError
from models.export import load_model, save_model
from models.freezing import set_train_mode, train_head_and_last_blocks

MakeVit = Callable[..., ViTForImageClassification]


def blocks_of(model: ViTForImageClassification) -> list[Any]:
    return list(model.vit.layers)


def branch_outputs(model: ViTForImageClassification, images: Tensor) -> list[Tensor]:
    """What the MLP of each block adds, `(B, N, D)`, as the block sees it."""
    found: list[Tensor] = []
    hooks = [
        block.mlp.register_forward_hook(lambda _, __, output: found.append(output))
        for block in blocks_of(model)
    ]
    model(images)
    for hook in hooks:
        hook.remove()
    return found


def test_each_sample_loses_branches_by_itself_more_often_with_depth(
    make_vit: MakeVit, rng: torch.Generator
) -> None:
    model = make_vit()
    drop_paths(model.train(), 0.5)
    torch.manual_seed(0)
    outputs = branch_outputs(model, torch.randn(400, 3, 15, 15, generator=rng))
    lost = [(output == 0).flatten(1) for output in outputs]
    for each in lost:
        assert torch.equal(each.all(dim=1), each.any(dim=1)), "a whole sample, or nothing of it"
    shares = [float(each.all(dim=1).float().mean()) for each in lost]
    # Three standard errors of a share of 400.
    assert shares == pytest.approx([0.0, 0.25, 0.5], abs=3 * (0.25 / 400) ** 0.5)


def test_what_is_kept_is_scaled_so_that_the_mean_stays(
    make_vit: MakeVit, rng: torch.Generator
) -> None:
    images = torch.randn(50, 3, 15, 15, generator=rng)
    plain, dropping = make_vit(depth=1), make_vit(depth=1)
    drop_paths(dropping.train(), 0.2)
    block = blocks_of(dropping)[0]
    block.attention.train(False)  # so that the MLP sees the same
    expected, found = branch_outputs(plain, images)[0], branch_outputs(dropping, images)[0]
    kept = (found != 0).flatten(1).all(dim=1)
    assert 0 < kept.sum() < 50
    torch.testing.assert_close(found[kept], expected[kept] / 0.8)


def test_attention_and_mlp_are_left_out_independently(
    make_vit: MakeVit, rng: torch.Generator
) -> None:
    model = make_vit(depth=1)
    drop_paths(model.train(), 0.5)
    seen: dict[str, Tensor] = {}
    block = blocks_of(model)[0]
    block.attention.register_forward_hook(lambda _, __, out: seen.update(attention=out[0]))
    block.mlp.register_forward_hook(lambda _, __, out: seen.update(mlp=out))
    model(torch.randn(200, 3, 15, 15, generator=rng))
    lost = {name: (out == 0).flatten(1).all(dim=1) for name, out in seen.items()}
    both = float((lost["attention"] & lost["mlp"]).float().mean())
    assert both == pytest.approx(0.25, abs=0.1)


def test_evaluation_and_frozen_blocks_lose_nothing(make_vit: MakeVit, rng: torch.Generator) -> None:
    images = torch.randn(20, 3, 15, 15, generator=rng)
    model = make_vit()
    model.train(False)
    expected = model(images).logits
    drop_paths(model, 0.5)
    assert torch.equal(model(images).logits, expected)
    train_head_and_last_blocks(model, 1)
    set_train_mode(model)
    lost = [
        bool((output == 0).flatten(1).all(dim=1).any()) for output in branch_outputs(model, images)
    ]
    assert lost == [False, False, True]


def test_names_of_weights_and_the_exported_model_stay(
    make_vit: MakeVit, rng: torch.Generator, tmp_path: Path
) -> None:
    plain, dropping = make_vit(), make_vit()
    drop_paths(dropping, 0.5)
    assert list(dropping.state_dict()) == list(plain.state_dict())
    save_model(dropping, tmp_path, image_size=15, prepared_size=15)
    loaded = load_model(tmp_path).train()
    images = torch.randn(4, 3, 15, 15, generator=rng)
    torch.testing.assert_close(loaded(images).logits, plain.train()(images).logits)


def test_gradients_reach_the_blocks_that_were_kept_only(
    make_vit: MakeVit, rng: torch.Generator
) -> None:
    model = make_vit(depth=1)
    drop_paths(model.train(), 0.5)
    images = torch.randn(1, 3, 15, 15, generator=rng)
    weight = blocks_of(model)[0].mlp.fc1.weight
    seen = set()
    for seed in range(12):
        torch.manual_seed(seed)
        model.zero_grad()
        model(images).logits.sum().backward()
        seen.add(bool(weight.grad is not None and weight.grad.abs().sum() > 0))
    assert seen == {True, False}


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_a_rate_that_is_no_probability_is_refused(make_vit: MakeVit, rate: float) -> None:
    with pytest.raises(ModelError, match="stochastic depth"):
        drop_paths(make_vit(), rate)
