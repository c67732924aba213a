import math

import pytest
import torch
from torch import nn
from transformers import ViTForImageClassification, get_cosine_schedule_with_warmup

from models.freezing import train_head_and_last_blocks
from models.vit import build_vit
from training.optim import (
    learning_rate,
    make_optimizer,
    parameter_groups,
    scaled_lr,
    set_learning_rate,
)


def make_vit() -> ViTForImageClassification:
    names = ["a", "b", "c"]
    return build_vit(15, 5, 14, 2, 7, 1.5, 0.0, num_labels=3, label_names=names, seed=0)


def names_of(model: nn.Module, parameters: list[nn.Parameter]) -> set[str]:
    return {name for name, own in model.named_parameters() if any(own is p for p in parameters)}


def test_only_the_weights_of_products_decay() -> None:
    model = make_vit()
    decayed, exempt = parameter_groups(model, 0.05)
    block = ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")
    expected = {
        f"vit.layers.{layer}.{'mlp' if part[0] == 'f' else 'attention'}.{part}.weight"
        for layer in range(2)
        for part in block
    } | {"vit.embeddings.patch_embeddings.projection.weight", "classifier.weight"}

    assert names_of(model, decayed["params"]) == expected
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.05, 0.0)
    everything = {name for name, _ in model.named_parameters()}
    assert names_of(model, exempt["params"]) == everything - expected
    assert {"vit.embeddings.cls_token", "vit.embeddings.position_embeddings"} < (
        everything - expected
    )


def test_frozen_parameters_are_left_out() -> None:
    model = make_vit()
    train_head_and_last_blocks(model, 0)
    decayed, exempt = parameter_groups(model, 0.05)
    assert names_of(model, decayed["params"]) == {"classifier.weight"}
    assert names_of(model, exempt["params"]) == {"classifier.bias"}


def test_a_model_without_biases_has_one_group() -> None:
    assert len(parameter_groups(nn.Linear(2, 3, bias=False), 0.1)) == 1


def test_a_frozen_model_is_refused() -> None:
    with pytest.raises(ValueError, match="all parameters of the model are frozen"):
        parameter_groups(make_vit().requires_grad_(False), 0.05)


def test_a_decay_by_layer_lowers_the_rate_from_block_to_block() -> None:
    """By hand, for two blocks: head 1, last norm and block 1/2, first block 1/4, embeddings 1/8."""
    model = make_vit()
    optimizer = make_optimizer(model, weight_decay=0.05, layer_decay=0.5)
    set_learning_rate(optimizer, 0.8)
    factors = {"classifier": 0.8, "layernorm": 0.4, "layers.1": 0.4, "layers.0": 0.2}
    rates = {
        name: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for name in names_of(model, group["params"])
    }
    assert set(rates) == {name for name, _ in model.named_parameters()}
    plain = {
        name: group["weight_decay"]
        for group in parameter_groups(model, 0.05)
        for name in names_of(model, group["params"])
    }
    for name, (rate, decay) in rates.items():
        path = name.removeprefix("vit.").split(".")
        part = ".".join(path[:2]) if path[0] == "layers" else path[0]
        assert rate == pytest.approx(factors.get(part, 0.1)), name
        assert decay == plain[name], name


def test_a_decay_by_layer_counts_the_frozen_layers() -> None:
    model = make_vit()
    train_head_and_last_blocks(model, 1)
    groups = parameter_groups(model, 0.05, 0.5)
    assert {group["rate_factor"] for group in groups} == {1.0, 0.5}


def test_the_first_step_of_adamw_is_the_closed_form() -> None:
    # The first step of Adam moves each weight by lr * sign(gradient), decay by lr * decay * weight.
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -2.0, 3.0], [0.5, 0.25, -4.0]]))
        model.bias.copy_(torch.tensor([5.0, 7.0]))
    before = model.weight.detach().clone()
    gradient = torch.tensor([[2.0, -1.0, 0.5], [-3.0, 1.0, 4.0]])
    optimizer = make_optimizer(model, weight_decay=0.1)
    model.weight.grad, model.bias.grad = gradient.clone(), torch.tensor([1.0, -1.0])

    optimizer.step()
    assert torch.equal(model.weight, before), "the learning rate is 0 until it is set"

    optimizer = make_optimizer(model, weight_decay=0.1)
    set_learning_rate(optimizer, 0.01)
    optimizer.step()
    torch.testing.assert_close(
        model.weight.detach(), before - 0.01 * gradient.sign() - 0.01 * 0.1 * before
    )
    torch.testing.assert_close(model.bias.detach(), torch.tensor([4.99, 7.01]))


def test_the_optimiser_is_fused_on_the_cpu_with_the_betas_of_mae() -> None:
    optimizer = make_optimizer(make_vit(), weight_decay=0.05)
    assert optimizer.defaults["fused"] is True
    assert optimizer.defaults["betas"] == (0.9, 0.95)
    assert len(optimizer.param_groups) == 2


def test_the_learning_rate_reaches_every_group() -> None:
    optimizer = make_optimizer(make_vit(), weight_decay=0.05)
    set_learning_rate(optimizer, 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]


def test_the_schedule_by_hand() -> None:
    rates = [
        learning_rate(step, total_steps=7, warmup_steps=3, peak_lr=0.8, final_lr=0.2)
        for step in range(8)
    ]
    # Quarters of the peak, then 0.5 + 0.3 cos of 0, 45, 90, 135 and 180 degrees.
    root = math.sqrt(0.5)
    assert rates == pytest.approx(
        [0.2, 0.4, 0.6, 0.8, 0.5 + 0.3 * root, 0.5, 0.5 - 0.3 * root, 0.2]
    )


def test_the_schedule_is_that_of_transformers_one_warm_up_step_ahead() -> None:
    # Theirs starts at 0, which wastes the first step; ours is theirs without that step.
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    theirs = get_cosine_schedule_with_warmup(optimizer, 5, 18)
    for step in range(17):
        optimizer.step()
        theirs.step()
        ours = learning_rate(step, total_steps=17, warmup_steps=4, peak_lr=0.3)
        assert ours == pytest.approx(theirs.get_last_lr()[0]), step


@pytest.mark.parametrize("warmup_steps", [0, 1, 12])
def test_no_step_is_wasted_and_none_exceeds_the_peak(warmup_steps: int) -> None:
    rates = [
        learning_rate(step, total_steps=13, warmup_steps=warmup_steps, peak_lr=0.5)
        for step in range(13)
    ]
    assert min(rates) > 0
    assert max(rates) == rates[warmup_steps] == 0.5
    assert rates[:warmup_steps] == sorted(rates[:warmup_steps])
    assert rates[warmup_steps:] == sorted(rates[warmup_steps:], reverse=True)


@pytest.mark.parametrize(
    ("step", "warmup_steps", "message"),
    [
        (0, 10, "got 10 and 10. Lower warmup_epochs"),
        (0, -1, "got -1 and 10"),
        (11, 0, "between 0 and total_steps=10, got 11"),
        (-1, 0, "got -1"),
    ],
)
def test_steps_outside_the_run_are_refused(step: int, warmup_steps: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        learning_rate(step, total_steps=10, warmup_steps=warmup_steps, peak_lr=1.0)


def test_the_rate_grows_with_the_samples_per_step() -> None:
    # MAE's pretraining: 1.5e-4 at 256, hence 2.4e-3 at 4096 (He et al. 2022, table 8).
    assert scaled_lr(1.5e-4, 4096) == pytest.approx(2.4e-3)
    assert scaled_lr(1.5e-4, 256) == 1.5e-4
