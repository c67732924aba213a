"""Heads that are left behind: what they read, and what learns from them."""

from collections.abc import Callable

import torch
from transformers import ViTForImageClassification

from models.pretraining_heads import PretrainingNetwork, new_head
from models.vit import layer_features

MakeVit = Callable[..., ViTForImageClassification]


def moved_in(network: PretrainingNetwork) -> set[str]:
    return {name for name, p in network.named_parameters() if p.grad is not None}


def test_a_head_depends_on_its_seed_alone(make_vit: MakeVit) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, again, other = (new_head(make_vit(), seed=seed) for seed in (7, 7, 8))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.weight, again.weight)
    assert not torch.equal(first.weight, other.weight)
    assert first.weight.shape == (5, 14)


def test_the_heads_read_the_mean_of_the_patches_and_the_class_token(
    make_vit: MakeVit, rng: torch.Generator
) -> None:
    model = make_vit()
    model.train(False)
    network = PretrainingNetwork(model, mean=True, patches=False, seed=0)
    images = torch.randn(2, 3, 15, 15, generator=rng)
    answers = network(images)
    assert torch.equal(answers.logits, model(images).logits)
    last = layer_features(model, images)
    torch.testing.assert_close(answers.logits, model.classifier(last.final_cls))
    patches = model.vit(images).last_hidden_state[:, 1:]
    assert network.mean_head is not None
    torch.testing.assert_close(answers.mean_logits, network.mean_head(patches.mean(dim=1)))


def test_the_backbone_learns_from_the_mean_alone(make_vit: MakeVit, rng: torch.Generator) -> None:
    model = make_vit()
    network = PretrainingNetwork(model, mean=True, patches=False, seed=0)
    answers = network(torch.randn(2, 3, 15, 15, generator=rng))
    answers.logits.square().sum().backward()
    moved = moved_in(network)
    assert moved == {"model.classifier.weight", "model.classifier.bias"}
    mean_logits = network(torch.randn(2, 3, 15, 15, generator=rng)).mean_logits
    assert mean_logits is not None
    mean_logits.square().sum().backward()
    assert moved_in(network) == {name for name, _ in network.named_parameters()}


def test_each_patch_is_read_by_itself(make_vit: MakeVit, rng: torch.Generator) -> None:
    model = make_vit()
    model.train(False)
    network = PretrainingNetwork(model, mean=False, patches=True, seed=0)
    images = torch.randn(2, 3, 15, 15, generator=rng)
    answers = network(images, patches=True)
    tokens = model.vit(images).last_hidden_state
    assert answers.logits.shape == (2, 9, 5)
    assert network.patch_head is not None
    torch.testing.assert_close(answers.logits[:, 3], network.patch_head(tokens[:, 4]))
    assert torch.equal(network(images).logits, model(images).logits)
    assert network(images).mean_logits is None


def test_without_a_head_on_the_mean_the_backbone_learns_from_the_class_token(
    make_vit: MakeVit, rng: torch.Generator
) -> None:
    network = PretrainingNetwork(make_vit(), mean=False, patches=True, seed=0)
    network(torch.randn(2, 3, 15, 15, generator=rng)).logits.square().sum().backward()
    everything = {name for name, _ in network.named_parameters()}
    assert moved_in(network) == {name for name in everything if not name.startswith("patch_head")}


def test_the_model_is_shared_not_copied(make_vit: MakeVit) -> None:
    model = make_vit()
    network = PretrainingNetwork(model, mean=True, patches=False, seed=0)
    assert network.model is model
    assert set(model.state_dict()) == {
        name.removeprefix("model.") for name in network.state_dict() if name.startswith("model.")
    }
