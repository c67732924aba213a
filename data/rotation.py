"""The rotation pretext task: turn each image four ways and ask which way it was turned.

Dimension key: B = images in the batch, C = channels, S = image side in pixels.
"""

import torch
from torch import Tensor

from data.transforms import resize

NUM_ROTATIONS = 4
"""Label k stands for k x 90 degrees, counter-clockwise: 0, 90, 180, 270."""

ROTATION_NAMES = ("0", "90", "180", "270")
"""Names of the labels, in degrees counter-clockwise. A model with these tells which way up."""


def make_rotation_batch(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return every image in all four orientations, with the labels to predict.

    All four copies of an image share one batch, so every update sees the labels in equal
    numbers (as in Gidaris et al. 2018). Quarter turns only move pixels; none is interpolated,
    so resampling cannot give the answer away. The resize before this must treat rows and
    columns alike, or its artefacts turn with the image and do give it away.

    Args:
        images: Batch of square images, `(B, C, S, S)`, any dtype. Not modified.

    Returns:
        rotated: `(4*B, C, S, S)`, dtype and device of `images`. Grouped by rotation: rows
            `k*B` to `(k+1)*B` hold the whole batch turned by k x 90 degrees.
        rotation_labels: `(4*B,)`, int64 in `[0, 4)`, on the device of `images`.

    Raises:
        ValueError: If `images` is not 4-D or not square.

    References:
        Gidaris et al., "Unsupervised Representation Learning by Predicting Image Rotations",
        ICLR 2018, https://arxiv.org/abs/1803.07728
    """
    _check_square(images, "make_rotation_batch")
    rotated = torch.cat([torch.rot90(images, k, dims=(-2, -1)) for k in range(NUM_ROTATIONS)])
    rotation_labels = torch.arange(NUM_ROTATIONS, device=images.device)
    return rotated, rotation_labels.repeat_interleave(len(images))


def rotate_each(images: Tensor, quarter_turns: Tensor) -> Tensor:
    """Return each image turned by its own number of quarter turns, counter-clockwise.

    Args:
        images: Batch of square images, `(B, C, S, S)`, any dtype. Not modified.
        quarter_turns: `(B,)`, integers in `[0, 4)`, on the device of `images`.

    Returns:
        `(B, C, S, S)`, dtype and device of `images`.

    Raises:
        ValueError: If `images` is not 4-D or not square, or `quarter_turns` has another length.
    """
    _check_square(images, "rotate_each")
    if quarter_turns.shape != images.shape[:1]:
        raise ValueError(
            f"rotate_each needs one number of quarter turns per image, ({len(images)},), "
            f"got {tuple(quarter_turns.shape)}."
        )
    chosen = quarter_turns.view(-1, 1, 1, 1)
    turned = images
    # Computes all turns and selects, so that the shapes do not depend on the values and an
    # accelerator need not wait for the host.
    for k in range(1, NUM_ROTATIONS):
        turned = torch.where(chosen == k, torch.rot90(images, k, dims=(-2, -1)), turned)
    return turned


def turn_patches(images: Tensor, quarter_turns: Tensor, *, patch_size: int, gap: int) -> Tensor:
    """Return images whose patches are turned, each by its own number of quarter turns.

    Around every patch a border is dropped, half a gap wide, so that nothing goes on from a patch to
    the next: edges that no longer meet would tell the turn of a patch without a look at what is in
    it (the buffer of PatchRot). The images are resized for it where need be; patches lie in
    the middle of their cells, so that resizing has marked all turns alike.

    Args:
        images: Batch of square images, `(B, C, F, F)`, floating point, of any side F.
        quarter_turns: `(B, n, n)`, integers in `[0, 4)`, on the device of `images`: of the patches
            in n rows and columns.
        patch_size: Side of a patch in the result, in pixels.
        gap: What is dropped between two patches, in pixels; even.

    Returns:
        `(B, C, n * patch_size, n * patch_size)`.

    Raises:
        ValueError: If `images` is not 4-D or not square, or `gap` is odd or negative.

    References:
        Chhabra et al., "PatchRot", 2022, https://arxiv.org/abs/2210.15722
    """
    _check_square(images, "turn_patches")
    if gap < 0 or gap % 2:
        raise ValueError(f"gap must be even and not negative, got {gap}.")
    count, cell = quarter_turns.shape[-1], patch_size + gap
    if images.shape[-1] != count * cell:
        images = resize(images, count * cell)
    inside = slice(gap // 2, gap // 2 + patch_size)
    batch, channels = images.shape[:2]
    cells = images.reshape(batch, channels, count, cell, count, cell)
    patches = cells[:, :, :, inside, :, inside].permute(0, 2, 4, 1, 3, 5)
    turned = rotate_each(patches.flatten(0, 2), quarter_turns.flatten())
    in_places = turned.view(batch, count, count, channels, patch_size, patch_size)
    side = count * patch_size
    return in_places.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, side, side)


def _check_square(images: Tensor, function: str) -> None:
    if images.ndim != 4 or images.shape[-2] != images.shape[-1]:
        raise ValueError(
            f"{function} needs square images (B, C, S, S), got {tuple(images.shape)}. "
            "Crop to a square in data/transforms.py first."
        )
