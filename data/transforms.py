"""Crops, resize, flip, colours and normalisation that leave no mark of orientation.

Dimension key: B = images in the batch, C = channels, H, W = height and width, S = square side,
P = square side before a crop, all in pixels.
"""

from functools import cache
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

MEAN = (0.5, 0.5, 0.5)
"""Subtracted per channel, on a scale of [0, 1] (Dosovitskiy et al. 2021 and the ViT processors)."""

STD = (0.5, 0.5, 0.5)
"""Divided by per channel, on a scale of [0, 1]."""

LUMA = (0.299, 0.587, 0.114)
"""Share of red, green and blue in what is seen as brightness (ITU-R BT.601)."""

ImageOrArray = TypeVar("ImageOrArray", Image.Image, NDArray[np.uint8])


def centre_crop_square(image: ImageOrArray) -> ImageOrArray:
    """Return the largest square in the middle of an image.

    Cropped, never squashed: squashing a 4:3 photo to a square blurs one axis more than the
    other, and a rotation classifier reads that off pure noise.

    Args:
        image: A picture, or an array `(H, W, ...)`.

    Returns:
        The same kind of thing, `min(H, W)` on each side.
    """
    if isinstance(image, Image.Image):
        width, height = image.size
        left, top, side = _centre(width, height)
        return image.crop((left, top, left + side, top + side))
    height, width = image.shape[:2]
    left, top, side = _centre(width, height)
    return image[top : top + side, left : left + side]


def _centre(width: int, height: int) -> tuple[int, int, int]:
    side = min(width, height)
    return (width - side) // 2, (height - side) // 2, side


def resize(images: Tensor, side: int) -> Tensor:
    """Resize images to `side` x `side` pixels (bilinear, antialiased).

    Floating point on purpose. An 8-bit resize rounds between its horizontal and its vertical
    pass, so its output depends on which way up the image was: a faint mark that a rotation
    classifier can learn to read.

    Args:
        images: `(B, C, H, W)`, floating point.
        side: Output height and width, in pixels.

    Returns:
        `(B, C, side, side)`, dtype and range of `images`.

    Raises:
        TypeError: If `images` is not floating point.
    """
    if not images.is_floating_point():
        raise TypeError(
            f"resize needs floating-point images, got {images.dtype}. Convert to float32 before "
            "resizing, not after."
        )
    return torch.nn.functional.interpolate(
        images, size=(side, side), mode="bilinear", antialias=True
    )


def crop(images: Tensor, tops: Tensor, lefts: Tensor, side: int) -> Tensor:
    """Cut a square out of each image, at its own place.

    Args:
        images: `(B, C, H, W)`, any dtype.
        tops: `(B,)`, int64, first row of each square, in `[0, H - side]`.
        lefts: `(B,)`, int64, first column of each square, in `[0, W - side]`.
        side: Height and width of the squares, in pixels.

    Returns:
        `(B, C, side, side)`, dtype and device of `images`.

    Raises:
        ValueError: If the images are smaller than `side`.
    """
    if min(images.shape[-2:]) < side:
        raise ValueError(
            f"crop needs images of at least {side} x {side} px, got {tuple(images.shape[-2:])}. "
            "Prepare the images at least as large as model.image_size."
        )
    # A view of all squares that there are, of which one of each image is copied, row by row.
    squares = images.unfold(2, side, 1).unfold(3, side, 1).permute(0, 2, 3, 1, 4, 5)
    return squares[torch.arange(len(images), device=images.device), tops, lefts]


def resized_crop(images: Tensor, tops: Tensor, lefts: Tensor, sides: Tensor, side: int) -> Tensor:
    """Cut a square of its own place and size out of each image; resize all of them to one size.

    The same as `crop` and `resize` image by image, in two products of matrices for the whole
    batch: bilinear, antialiased, and nothing beyond the edge of a crop shows. Squares only: a crop
    of another shape would have to be squashed, which blurs one axis more than the other. Rows and
    columns have the same weights, and the weights of a mirrored crop are the mirrored weights, bit
    by bit, so that a quarter turn before or after makes no difference but of rounding in float32.

    Args:
        images: `(B, C, P, P)`, float32.
        tops: `(B,)`, int64, first row of each crop, in `[0, P - sides]`.
        lefts: `(B,)`, int64, first column of each crop, in `[0, P - sides]`.
        sides: `(B,)`, int64, height and width of each crop, in `[1, P]`.
        side: Height and width S of the result, in pixels.

    Returns:
        `(B, C, side, side)`, float32, in the range of `images`, contiguous, on their device.

    Raises:
        TypeError: If `images` is not float32.
    """
    if images.dtype != torch.float32:
        raise TypeError(
            f"resized_crop needs float32 images, got {images.dtype}. Call normalise before it: 8 "
            "bits between its two passes would mark which way up the image was."
        )
    batch, channels, size, _ = images.shape
    columns = _resize_weights(lefts, sides, size, side)
    rows = _resize_weights(tops, sides, size, side)
    narrow = images.reshape(batch, channels * size, size) @ columns.transpose(1, 2)
    return rows[:, None] @ narrow.view(batch, channels, size, side)


def _resize_weights(starts: Tensor, sides: Tensor, size: int, side: int) -> Tensor:
    """Return what each pixel of a crop of one axis adds to each of the result.

    Returns:
        `(B, side, size)`, float32: triangles as wide as a pixel of the crop or of the result,
        whichever is larger, zero outside the crop; every row adds up to 1.
    """
    device = starts.device
    scale = (sides.float() / side)[:, None]
    # Counted from the middle of the crop, where halves are exact: mirrored places are negatives.
    wanted = (torch.arange(side, device=device) + (0.5 - side / 2)) * scale
    pixels = torch.arange(size, device=device) + 0.5 - (starts + sides / 2)[:, None]
    distances = (wanted[:, :, None] - pixels[:, None, :]).abs()
    weights = (1 - distances / scale.clamp(min=1)[:, :, None]).clamp(min=0)
    weights = weights * (pixels.abs() < sides[:, None] / 2)[:, None, :]
    return weights / weights.sum(dim=2, keepdim=True)


def flip(images: Tensor, mirrored: Tensor) -> Tensor:
    """Mirror some of the images, left to right.

    Args:
        images: `(B, C, H, W)`, any dtype.
        mirrored: `(B,)`, bool, which ones.

    Returns:
        `(B, C, H, W)`, dtype and device of `images`.
    """
    return torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)


def jitter_colours(
    images: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor
) -> Tensor:
    """Change brightness, contrast and saturation of each image, in this order, by its own factors.

    Every pixel is changed by itself (contrast by the image's mean grey besides), so nothing marks
    which way up the image is.

    Args:
        images: `(B, 3, H, W)`, uint8.
        brightness: `(B,)`, float, not negative: what all values are multiplied by.
        contrast: The same for distances from the mean grey of the image.
        saturation: The same for distances from the pixel's own grey; 0 takes all colour.

    Returns:
        `(B, 3, H, W)`, uint8, on the device of `images`.

    References:
        Howard, "Some Improvements on Deep Convolutional Neural Network Based Image
        Classification", 2013, https://arxiv.org/abs/1312.5402
    """
    # Whole numbers are added up: the same sum in whatever order, on any device.
    sums = images.sum(dim=(2, 3), dtype=torch.int64)
    mean = _each(grey(sums[:, :, None, None]).flatten() / images[0, 0].numel() * brightness)
    colours = images.float() * _each(brightness)
    colours = mean + (colours - mean) * _each(contrast)
    own = grey(colours)
    colours = own + (colours - own) * _each(saturation)
    return colours.round().clamp(0, 255).to(torch.uint8)


def grey(images: Tensor) -> Tensor:
    """Return the luma of images (ITU-R BT.601, as Pillow's mode L), `(B, 1, H, W)`, float."""
    return (images.float() * _luma(images.device)).sum(dim=1, keepdim=True)


def make_grey(images: Tensor, chosen: Tensor) -> Tensor:
    """Take the colour from some of the images.

    Args:
        images: `(B, 3, H, W)`, uint8.
        chosen: `(B,)`, bool, which ones.

    Returns:
        `(B, 3, H, W)`, uint8, on the device of `images`.
    """
    without = grey(images).round().to(torch.uint8).expand_as(images)
    return torch.where(chosen.view(-1, 1, 1, 1), without, images)


def _each(factors: Tensor) -> Tensor:
    return factors.float().view(-1, 1, 1, 1)


def normalise(images: Tensor) -> Tensor:
    """Turn bytes into the numbers that the network reads.

    Args:
        images: `(B, 3, S, S)`, uint8.

    Returns:
        `(B, 3, S, S)`, float32 in `[-1, 1]`, contiguous, on the same device.

    Raises:
        TypeError: If `images` is not uint8; dividing twice by 255 would go unnoticed.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"normalise needs uint8 images in [0, 255], got {images.dtype}.")
    mean, std = _mean_and_std(images.device)
    return ((images.float() / 255 - mean) / std).contiguous()


@cache
def _luma(device: torch.device) -> Tensor:
    """Return the shares as `(3, 1, 1)`, float32; kept as `_mean_and_std` are."""
    return torch.tensor(LUMA, device=device, dtype=torch.float32).view(3, 1, 1)


@cache
def _mean_and_std(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return both as `(3, 1, 1)`; kept, because sending them with every batch makes a GPU wait."""
    return (
        torch.tensor(MEAN, device=device).view(3, 1, 1),
        torch.tensor(STD, device=device).view(3, 1, 1),
    )
