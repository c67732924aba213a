"""The network: transformers' Vision Transformer, with weights that depend on a seed alone.

Its head (`model.classifier`) reads the class token after the last norm, for rotations and for
classes alike.

Dimension key: B = images in the batch, S = image side in pixels, L = blocks, D = width of the
tokens, C = classes.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from models.errors import ModelError

LAYER_NORM_EPS = 1e-6
"""As in the published ViT code (google-research/vision_transformer); transformers' own default
of 1e-12 is too small to matter in float32."""

INITIAL_STD = 0.02
"""Standard deviation of the initial weights, as in transformers and timm."""

Weights = Literal["normal", "xavier"]

WAVELENGTH = 10_000.0
"""Longest wave of the first position embeddings, over 2 pi, in patches (Vaswani et al. 2017)."""


def build_vit(
    image_size: int,
    patch_size: int,
    embed_dim: int,
    depth: int,
    num_heads: int,
    mlp_ratio: float,
    dropout: float,
    *,
    num_labels: int,
    label_names: Sequence[str],
    seed: int,
    weights: Weights = "normal",
) -> ViTForImageClassification:
    """Return a new Vision Transformer on the CPU, in train mode, with a head that guesses.

    The position embeddings begin as two-dimensional sines and cosines, as in MAE (He et al. 2022),
    and are then trained. A normal distribution of 0.02
    tells the places apart too faintly, and which way is up is about places: pretraining took twice
    the epochs (EXPERIMENTS.md). Weights come from a generator of their own in the order of the
    layers, so they depend on `seed` and the sizes alone: not on the global random state, which is
    left as it was, and, the backbone's, not on the number of classes. The head is small, so that
    the first loss is close to ln `num_labels`, but not zero: a backbone behind a zero head gets no
    gradient at first and was seen to lose two epochs on the plateau (EXPERIMENTS.md).

    Args:
        image_size: Side of the square input, in pixels; a multiple of `patch_size`.
        patch_size: Side of a patch, in pixels.
        embed_dim: Width D of the tokens; a multiple of `num_heads`.
        depth: Number L of blocks.
        num_heads: Attention heads per block.
        mlp_ratio: Hidden width of the MLP over `embed_dim`.
        dropout: Probability in [0, 1), after embeddings, attention weights, attention and MLP.
        num_labels: Classes C of the head, at least 2.
        label_names: Names of the classes, in the order of the labels.
        seed: Of the weights.
        weights: How those of patch embedding and blocks are drawn: from a normal distribution of
            `INITIAL_STD` as in transformers and timm, or Xavier uniform as in MAE and Big Vision.

    Raises:
        ModelError: If the sizes do not divide, or names and labels differ in number.

    References:
        Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021,
        https://arxiv.org/abs/2010.11929
        He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022,
        https://arxiv.org/abs/2111.06377
    """
    sizes = {
        "image_size": image_size,
        "patch_size": patch_size,
        "embed_dim": embed_dim,
        "depth": depth,
        "num_heads": num_heads,
    }
    for name, size in sizes.items():
        if size < 1:
            raise ModelError(f"model.{name} must be at least 1, got {size}.")
    if image_size % patch_size:
        raise ModelError(
            f"model.image_size must be a multiple of model.patch_size, got {image_size} and "
            f"{patch_size}. Try model.image_size={_nearest_multiple(image_size, patch_size)}."
        )
    if embed_dim % num_heads:
        raise ModelError(
            f"model.embed_dim must be a multiple of model.num_heads, got {embed_dim} and "
            f"{num_heads}. Try model.embed_dim={_nearest_multiple(embed_dim, num_heads)}."
        )
    if int(embed_dim * mlp_ratio) < 1:
        raise ModelError(
            f"model.mlp_ratio must give the MLP a hidden width of at least 1, got {mlp_ratio} with "
            f"model.embed_dim={embed_dim}."
        )
    if not 0 <= dropout < 1:
        raise ModelError(f"model.dropout must be at least 0 and below 1, got {dropout}.")
    if num_labels != len(label_names):
        raise ModelError(
            f"label_names must name every class: num_labels is {num_labels}, "
            f"got {len(label_names)} names."
        )
    config = ViTConfig(
        image_size=image_size,
        patch_size=patch_size,
        hidden_size=embed_dim,
        num_hidden_layers=depth,
        num_attention_heads=num_heads,
        intermediate_size=int(embed_dim * mlp_ratio),
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        layer_norm_eps=LAYER_NORM_EPS,
        initializer_range=INITIAL_STD,
        architectures=["ViTForImageClassification"],
        dtype="float32",
    )
    _name_labels(config, label_names)
    model = allocate(config)
    _initialise(model, seed, weights)
    return model


def allocate(config: ViTConfig) -> ViTForImageClassification:
    """Return a network of this configuration on the CPU whose weights have yet to be filled in."""
    config._attn_implementation = "sdpa"
    # Building on the meta device draws no random numbers that would be thrown away.
    with torch.device("meta"):
        model = ViTForImageClassification(config)
    return model.to_empty(device="cpu")


@dataclass(frozen=True, kw_only=True)
class LayerFeatures:
    """What every layer of the backbone says about a batch; float32, on the model's device.

    Attributes:
        cls: `(L+1, B, D)`, the class token after the embedding (0) or block l, before the last
            norm. At layer 0 it has seen no pixel: the same for every image.
        mean: `(L+1, B, D)`, the mean over the patch tokens (the class token left out) there.
        final_cls: `(B, D)`, the class token after the last norm: what the head reads.
    """

    cls: Tensor
    mean: Tensor
    final_cls: Tensor


@torch.no_grad()  # not inference_mode: a head will be trained on what this returns
def layer_features(model: ViTForImageClassification, pixels: Tensor) -> LayerFeatures:
    """Return the features of every layer from one forward pass, without changing the model.

    The pass is made in eval mode, or dropout would blur the features; the modes are put back.
    Token by token states are dropped as soon as they are pooled, so memory does not grow with the
    depth as `output_hidden_states=True` would.

    Args:
        model: Anything from `build_vit` or `load_model`.
        pixels: `(B, 3, S, S)`, normalised, on the model's device.
    """
    vit = model.vit
    with eval_mode(model):
        hidden: Tensor = vit.embeddings(pixels)
        pooled = [_pool(hidden)]
        for block in vit.layers:
            hidden = block(hidden, None)
            pooled.append(_pool(hidden))
        final_cls = vit.layernorm(hidden)[:, 0].float()
    cls, mean = zip(*pooled, strict=True)
    return LayerFeatures(cls=torch.stack(cls), mean=torch.stack(mean), final_cls=final_cls)


def layer_names(depth: int) -> list[str]:
    """Return the names of the `depth + 1` layers of `LayerFeatures`, for tables and figures."""
    return ["embedding", *(f"block {number}" for number in range(1, depth + 1))]


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Switch every module to eval mode, and each back to what it was."""
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in was_training.items():
            module.training = training


def to_device(model: ViTForImageClassification, device: torch.device) -> ViTForImageClassification:
    """Move the model's weights, in place, and return it."""
    nn.Module.to(model, device)  # transformers wraps its own `to` in a way that loses the types
    return model


def choose_attention(model: ViTForImageClassification, *, written_out: bool) -> None:
    """Let a model compute its attention by products and softmax, or by torch's fused function.

    Both compute the same but for rounding; in place, and no part of what is exported.
    """
    model.config._attn_implementation = "eager" if written_out else "sdpa"


def replace_head(model: ViTForImageClassification, label_names: Sequence[str]) -> None:
    """Give the model a new head for these classes, in place; the backbone is left alone.

    The head is zero: it needs no seed, and the first loss is ln C. It is meant to be set by
    `set_head`; for training from there the backbone waits for the head (see `build_vit`).

    Raises:
        ModelError: If there are fewer than two classes.
    """
    _name_labels(model.config, label_names)
    model.num_labels = len(label_names)
    old = _head(model).weight
    # On the meta device, because initialising it would draw from the global random state.
    new = nn.Linear(old.shape[1], len(label_names), device="meta", dtype=old.dtype)
    model.classifier = new.to_empty(device=old.device)
    _zero_head(model)


@torch.no_grad()
def set_head(model: ViTForImageClassification, weight: Tensor, bias: Tensor) -> None:
    """Copy a head that was trained elsewhere into the model, in place.

    Args:
        model: Has a head of the same shape; see `replace_head`.
        weight: `(C, D)`; logits are `features @ weight.T + bias`.
        bias: `(C,)`.

    Raises:
        ModelError: If the shapes are not those of the model's head.
    """
    head = _head(model)
    if weight.shape != head.weight.shape or bias.shape != head.bias.shape:
        raise ModelError(
            f"The head's weight and bias must be {tuple(head.weight.shape)} and "
            f"{tuple(head.bias.shape)}, got {tuple(weight.shape)} and {tuple(bias.shape)}. "
            "For other classes call replace_head first."
        )
    head.weight.copy_(weight)
    head.bias.copy_(bias)


def _name_labels(config: ViTConfig, label_names: Sequence[str]) -> None:
    if len(label_names) < 2:
        raise ModelError(
            f"A head needs at least two classes to tell apart, got {list(label_names)}. "
            "Use a source with more classes."
        )
    config.id2label = dict(enumerate(label_names))
    # Two classes may share a name (ImageNet-1k has such a pair); the first one keeps it here.
    config.label2id = {name: label for label, name in reversed(config.id2label.items())}
    config.problem_type = "single_label_classification"


@torch.no_grad()
def _initialise(model: ViTForImageClassification, seed: int, weights: Weights) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif "layernorm" in name:
            parameter.fill_(1.0)
        elif name.endswith("position_embeddings"):
            parameter.copy_(_waves(tokens=parameter.shape[1], width=parameter.shape[2]))
        elif weights == "xavier" and not name.endswith("cls_token") and "classifier" not in name:
            # A patch embedding is a product with the flattened patch.
            fan_out, fan_in = parameter.flatten(1).shape
            limit = math.sqrt(6 / (fan_in + fan_out))
            parameter.uniform_(-limit, limit, generator=generator)
        else:
            # The head comes last, so the backbone does not depend on its size.
            parameter.normal_(std=INITIAL_STD, generator=generator)


def _waves(tokens: int, width: int) -> Tensor:
    """Return sines and cosines of the patches' columns and rows, `(1, tokens, width)`.

    A quarter of the width each, at wavelengths in geometric progression; where 4 does not divide
    the width the rest is zero, and so is the class token's place, the first.
    """
    side = math.isqrt(tokens - 1)
    quarter = width // 4
    frequencies = WAVELENGTH ** (-torch.arange(quarter, dtype=torch.float64) / max(1, quarter))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    by_place = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns, rows = by_place.repeat(side, 1), by_place.repeat_interleave(side, dim=0)
    waves = torch.zeros(1, tokens, width, dtype=torch.float64)
    waves[0, 1:, : 4 * quarter] = torch.cat([columns, rows], dim=1)
    return waves.float()


@torch.no_grad()
def _zero_head(model: ViTForImageClassification) -> None:
    head = _head(model)
    head.weight.zero_()
    head.bias.zero_()


def _head(model: ViTForImageClassification) -> nn.Linear:
    head = model.classifier
    assert isinstance(head, nn.Linear)
    return head


def _pool(hidden: Tensor) -> tuple[Tensor, Tensor]:
    return hidden[:, 0].float(), hidden[:, 1:].float().mean(dim=1)


def _nearest_multiple(size: int, factor: int) -> int:
    return max(1, round(size / factor)) * factor
