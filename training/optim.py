"""How weights are updated: parameter groups, AdamW and the learning rate of every step."""

import math
import re
from typing import TypedDict

from torch import nn
from torch.optim import AdamW, Optimizer

BASE_SAMPLES_PER_STEP = 256
"""Samples per step at which `base_lr` is quoted (linear scaling rule of Goyal et al. 2017)."""

NO_DECAY_NAMES = ("cls_token", "position_embeddings")
"""Parameters of more than one dimension that are offsets rather than weights of a product."""

_BLOCK = re.compile(r"vit\.layers\.(\d+)\.")

FUSED_DEVICES = frozenset({"cpu", "cuda"})
"""Where AdamW updates all weights in one kernel: same arithmetic, one pass over memory."""


class ParameterGroup(TypedDict):
    """What PyTorch's optimisers take."""

    params: list[nn.Parameter]
    weight_decay: float
    rate_factor: float
    """Learning rate over that of the whole; see `set_learning_rate`."""


def parameter_groups(
    model: nn.Module, weight_decay: float, layer_decay: float | None = None
) -> list[ParameterGroup]:
    """Return the trainable parameters, divided into those that decay and those that do not.

    Biases, norms, position embeddings and the class token are exempt, as in MAE (He et al. 2022):
    decay would pull them to a value that means nothing in particular. Frozen parameters are left
    out. The order is that of the model, so that an optimiser's state can be loaded again.

    Args:
        model: Read only.
        weight_decay: Of the first group; the second one's is 0.
        layer_decay: Learning rate of each layer over that of the layer above; then there are two
            groups for each layer. The layers are, from above: the head; the last norm and the last
            block; each block below; the embeddings. None trains all at one rate.

    Raises:
        ValueError: If nothing in the model is trainable.

    References:
        Bao et al., "BEiT: BERT Pre-Training of Image Transformers", ICLR 2022,
        https://arxiv.org/abs/2106.08254, for the decay by layer.
    """
    decayed: dict[int, list[nn.Parameter]] = {}
    exempt: dict[int, list[nn.Parameter]] = {}
    depth = 0 if layer_decay is None else _depth(model)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        below = 0 if layer_decay is None else _layers_below_head(name, depth)
        is_offset = parameter.ndim < 2 or name.rpartition(".")[2] in NO_DECAY_NAMES
        (exempt if is_offset else decayed).setdefault(below, []).append(parameter)
    if not decayed and not exempt:
        raise ValueError(
            "An optimiser needs trainable parameters, but all parameters of the model are frozen. "
            "Call train_head_and_last_blocks first."
        )
    return [
        {"params": group, "weight_decay": decay, "rate_factor": (layer_decay or 1.0) ** below}
        for groups, decay in ((decayed, weight_decay), (exempt, 0.0))
        for below, group in groups.items()
    ]


def _depth(model: nn.Module) -> int:
    """Return the number of blocks, by the names of their weights."""
    found = (_BLOCK.match(name) for name, _ in model.named_parameters())
    return 1 + max((int(block[1]) for block in found if block), default=-1)


def _layers_below_head(name: str, depth: int) -> int:
    """Return how many layers a parameter lies below the head, the embeddings `depth + 1`."""
    if block := _BLOCK.match(name):
        return depth - int(block[1])
    if name.startswith("vit.embeddings."):
        return depth + 1
    return 1 if name.startswith("vit.layernorm.") else 0


def make_optimizer(
    model: nn.Module,
    *,
    weight_decay: float,
    layer_decay: float | None = None,
    betas: tuple[float, float] = (0.9, 0.95),
) -> AdamW:
    """Return AdamW over the trainable parameters, with a learning rate of 0 until it is set.

    Args:
        model: On its final device; what is frozen now stays out for good.
        weight_decay: Decoupled decay of weights; see `parameter_groups` for what is exempt.
        layer_decay: See `parameter_groups`.
        betas: Decay of the running mean and of the running square of the gradient. The default is
            that of MAE (He et al. 2022, table 8); 0.95 forgets large gradients sooner than 0.999.
    """
    groups = parameter_groups(model, weight_decay, layer_decay)
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    return AdamW(
        [dict(group) for group in groups], lr=0.0, betas=betas, fused=devices <= FUSED_DEVICES
    )


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of every group, `lr` times its factor; call it before every step."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["rate_factor"]


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
