"""Heads that are left behind: what they read, and what learns from them."""

from collections.abc import Callable

import torch
from transformers import ViTForImageClassification

from models.pretraining_heads import MeanPooled, new_head
from models.vit import layer_features

MakeVit = Callable[..., ViTForImageClassification]


def test_a_head_depends_on_its_seed_alone(make_vit: MakeVit) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, again, other = (new_head(make_vit(), 4, seed=seed) for seed in (7, 7, 8))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.weight, again.weight)
    assert not torch.equal(first.weight, other.weight)
    assert first.weight.shape == (4, 14)


def test_the_heads_read_the_mean_of_the_patches_and_the_class_token(
    make_vit: MakeVit, rng: torch.Generator
) -> None:
    model = make_vit().eval()
    network = MeanPooled(model, seed=0)
    images = torch.randn(2, 3, 15, 15, generator=rng)
    answers = network(images)
    assert torch.equal(answers.logits, model(images).logits)
    last = layer_features(model, images)
    torch.testing.assert_close(answers.logits, model.classifier(last.final_cls))
    patches = model.vit(images).last_hidden_state[:, 1:]
    torch.testing.assert_close(answers.mean_logits, network.head(patches.mean(dim=1)))


def test_the_backbone_learns_from_the_mean_alone(make_vit: MakeVit, rng: torch.Generator) -> None:
    model = make_vit()
    network = MeanPooled(model, seed=0)
    answers = network(torch.randn(2, 3, 15, 15, generator=rng))
    answers.logits.square().sum().backward()
    moved = {name for name, p in network.named_parameters() if p.grad is not None}
    assert moved == {"model.classifier.weight", "model.classifier.bias"}
    network(torch.randn(2, 3, 15, 15, generator=rng)).mean_logits.square().sum().backward()
    moved = {name for name, p in network.named_parameters() if p.grad is not None}
    assert moved == {name for name, _ in network.named_parameters()}


def test_the_model_is_shared_not_copied(make_vit: MakeVit) -> None:
    model = make_vit()
    network = MeanPooled(model, seed=0)
    assert network.model is model
    assert set(model.state_dict()) == {
        name.removeprefix("model.") for name in network.state_dict() if name.startswith("model.")
    }
