"""How weights are updated: parameter groups, AdamW and the learning rate of every step."""

import math
from typing import TypedDict

from torch import nn
from torch.optim import AdamW, Optimizer

BASE_SAMPLES_PER_STEP = 256
"""Samples per step at which `base_lr` is quoted (linear scaling rule of Goyal et al. 2017)."""

NO_DECAY_NAMES = ("cls_token", "position_embeddings")
"""Parameters of more than one dimension that are offsets rather than weights of a product."""

FUSED_DEVICES = frozenset({"cpu", "cuda"})
"""Where AdamW updates all weights in one kernel: same arithmetic, one pass over memory."""


class ParameterGroup(TypedDict):
    """What PyTorch's optimisers take."""

    params: list[nn.Parameter]
    weight_decay: float


def parameter_groups(model: nn.Module, weight_decay: float) -> list[ParameterGroup]:
    """Return the trainable parameters, divided into those that decay and those that do not.

    Biases, norms, position embeddings and the class token are exempt, as in MAE (He et al. 2022):
    decay would pull them to a value that means nothing in particular. Frozen parameters are left
    out. The order is that of the model, so that an optimiser's state can be loaded again.

    Args:
        model: Read only.
        weight_decay: Of the first group; the second one's is 0.

    Raises:
        ValueError: If nothing in the model is trainable.
    """
    decayed: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_offset = parameter.ndim < 2 or name.rpartition(".")[2] in NO_DECAY_NAMES
        (exempt if is_offset else decayed).append(parameter)
    if not decayed and not exempt:
        raise ValueError(
            "An optimiser needs trainable parameters, but all parameters of the model are frozen. "
            "Call train_head_and_last_blocks first."
        )
    groups: list[ParameterGroup] = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": exempt, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(
    model: nn.Module, *, weight_decay: float, betas: tuple[float, float] = (0.9, 0.95)
) -> AdamW:
    """Return AdamW over the trainable parameters, with a learning rate of 0 until it is set.

    Args:
        model: On its final device; what is frozen now stays out for good.
        weight_decay: Decoupled decay of weights; see `parameter_groups` for what is exempt.
        betas: Decay of the running mean and of the running square of the gradient. The default is
            that of MAE (He et al. 2022, table 8); 0.95 forgets large gradients sooner than 0.999.
    """
    groups = parameter_groups(model, weight_decay)
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    return AdamW(
        [dict(group) for group in groups], lr=0.0, betas=betas, fused=devices <= FUSED_DEVICES
    )


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of every group; call it before every step."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def learning_rate(
    step: int, *, total_steps: int, warmup_steps: int, peak_lr: float, final_lr: float = 0.0
) -> float:
    """Return the learning rate of one step: linear warm-up, then half a cosine.

    A function of the step alone, so that a resumed run needs no schedule state. Steps count
    from 0; the rate climbs to `peak_lr` at step `warmup_steps` in equal parts, the first of which
    is step 0's (a rate of 0 would waste it), and falls to `final_lr` at `total_steps`, one past
    the last step.

    Args:
        step: In [0, total_steps].
        total_steps: Steps of the whole run.
        warmup_steps: Steps below `peak_lr`, in [0, total_steps).
        peak_lr: Highest rate; see `scaled_lr`.
        final_lr: Rate that the cosine falls to.

    Raises:
        ValueError: If `step` or `warmup_steps` is out of range.
    """
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"warmup_steps must be at least 0 and below total_steps, or the learning rate never "
            f"reaches its peak; got {warmup_steps} and {total_steps}. Lower warmup_epochs."
        )
    if not 0 <= step <= total_steps:
        raise ValueError(f"step must be between 0 and total_steps={total_steps}, got {step}.")
    if step < warmup_steps:
        return peak_lr * (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return final_lr + (peak_lr - final_lr) * (1 + math.cos(math.pi * progress)) / 2


def scaled_lr(base_lr: float, samples_per_step: int) -> float:
    """Return the peak learning rate for a step of `samples_per_step` samples.

    Args:
        base_lr: Rate for 256 samples per step.
        samples_per_step: Images that one update sees; four times the source images where each is
            shown in four rotations.

    References:
        Goyal et al., "Accurate, Large Minibatch SGD", 2017, https://arxiv.org/abs/1706.02677
    """
    return base_lr * samples_per_step / BASE_SAMPLES_PER_STEP
