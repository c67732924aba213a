"""Steps with non-finite numbers: skipped without a trace, counted, and not for ever."""

import math

import pytest
import torch
from torch import nn

from training.divergence import StepGuard
from training.errors import DivergedError

CPU = torch.device("cpu")


def judge(guard: StepGuard, *, loss: float = 1.0, norm: float = 1.0) -> float:
    return float(guard.found_inf(torch.tensor(loss), torch.tensor(norm)))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_loss_or_gradient_is_found(bad: float) -> None:
    guard = StepGuard(CPU, limit=10)
    assert judge(guard) == 0
    assert judge(guard, loss=bad) == 1
    assert judge(guard, norm=abs(bad)) == 1
    assert judge(guard) == 0
    assert guard.skipped() == 2


def test_the_optimizer_and_its_state_are_as_if_the_step_had_not_been(rng: torch.Generator) -> None:
    """Witness: an optimiser that was never shown the bad gradients."""

    def train(gradients: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        parameter = nn.Parameter(torch.arange(5.0))
        optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=True)
        guard = StepGuard(CPU, limit=10)
        for gradient in gradients:
            parameter.grad = gradient.clone()
            optimizer.found_inf = guard.found_inf(  # type: ignore[attr-defined]
                torch.tensor(0.0), gradient.norm()
            )
            optimizer.step()
        return parameter.detach(), optimizer.state[parameter]

    good = list(torch.randn(4, 5, generator=rng))
    bad = good[0].clone()
    bad[3] = math.inf
    weights, state = train([good[0], good[1], bad, bad, good[2], good[3]])
    expected, expected_state = train(good)
    assert torch.equal(weights, expected)
    assert state["step"] == expected_state["step"] == 4
    assert torch.equal(state["exp_avg"], expected_state["exp_avg"])
    assert torch.equal(state["exp_avg_sq"], expected_state["exp_avg_sq"])


def test_only_so_many_in_a_row_end_the_run_and_the_message_says_what_to_change() -> None:
    guard = StepGuard(CPU, limit=3)
    for _ in range(4):  # twice in a row, four times
        judge(guard, loss=math.nan)
        judge(guard, loss=math.nan)
        judge(guard)
    guard.check(12, stage="finetune_1", section="finetune")
    for _ in range(3):
        judge(guard, loss=math.nan)
    judge(guard)
    with pytest.raises(DivergedError, match="at step 16 of finetune_1") as error:
        guard.check(16, stage="finetune_1", section="finetune")
    for setting in ("finetune.base_lr", "finetune.warmup_epochs", "finetune.clip_norm"):
        assert setting in str(error.value)


def test_whether_the_newest_step_was_skipped_and_how_many_were_before() -> None:
    guard = StepGuard(CPU, limit=3, skipped=5)
    assert not guard.last_was_skipped()
    judge(guard, loss=math.nan)
    assert guard.last_was_skipped()
    judge(guard)
    assert not guard.last_was_skipped()
    assert guard.skipped() == 6
