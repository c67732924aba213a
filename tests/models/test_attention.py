from collections.abc import Callable

import pytest
import torch
from torch.nn import functional
from transformers import ViTForImageClassification

from models.attention import class_attention, rollout

MakeVit = Callable[..., ViTForImageClassification]


@pytest.fixture
def model(make_vit: MakeVit, rng: torch.Generator) -> ViTForImageClassification:
    """A network that attends: with its first weights it looks everywhere alike."""
    made = make_vit(dropout=0.3)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.9, generator=rng)
    return made


def test_the_maps_are_those_of_the_fused_attention(
    model: ViTForImageClassification, rng: torch.Generator
) -> None:
    """The weights that training's own attention must have used, got out of it by a trick."""
    images = torch.rand(2, 3, 15, 15, generator=rng) * 2 - 1
    spoken: dict[str, list[torch.Tensor]] = {"q_proj": [], "k_proj": []}
    for layer in model.vit.layers:
        for name, heard in spoken.items():
            getattr(layer.attention, name).register_forward_hook(
                lambda module, given, out, heard=heard: heard.append(out)
            )
    model.train(False)
    with torch.no_grad():
        model(images)
    assert len(spoken["q_proj"]) == 3
    blocks = []
    for query, key in zip(*spoken.values(), strict=True):
        q, k = (part.unflatten(-1, (7, 2)).transpose(1, 2) for part in (query, key))
        # Values that are a unit matrix come out as the weights.
        values = torch.eye(10).expand(2, 7, 10, 10)
        blocks.append(functional.scaled_dot_product_attention(q, k, values).mean(dim=1))
    found = class_attention(model, images)
    torch.testing.assert_close(found.last, blocks[-1][:, 0, 1:].reshape(2, 3, 3))
    assert found.last.std() > 0.02, "nothing to tell apart"
    mixed = [0.5 * block + 0.5 * torch.eye(10) for block in blocks]
    expected = (mixed[2] @ mixed[1] @ mixed[0])[:, 0, 1:].reshape(2, 3, 3)
    torch.testing.assert_close(found.rollout, expected)


def test_shares_of_attention_add_up(rng: torch.Generator) -> None:
    attentions = [torch.rand(2, 5, 5, generator=rng).softmax(dim=-1) for _ in range(3)]
    flow = rollout(attentions)
    torch.testing.assert_close(flow.sum(dim=-1), torch.ones(2, 5))
    assert not torch.allclose(flow, rollout(attentions[::-1])), "the order of the blocks counts"


def test_rollout_of_a_block_that_looks_at_itself_is_the_token_itself() -> None:
    unit = torch.eye(4)[None]
    assert torch.equal(rollout([unit, unit]), unit)


def test_looking_changes_nothing(model: ViTForImageClassification, rng: torch.Generator) -> None:
    images = torch.rand(2, 3, 15, 15, generator=rng) * 2 - 1
    model.train()
    model.classifier.train(False)
    first = class_attention(model, images)
    assert (model.vit.training, model.classifier.training) == (True, False)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(first.rollout, class_attention(model, images).rollout), "dropout was active"
