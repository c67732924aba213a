"""JPEG for prepared images: lossy, a fifth of the size, and without a mark of orientation.

Ordinary JPEG tells a network which way up an image was when it was stored. Its noise has a
direction, because the standard luminance table treats rows and columns differently, and so has its
grid of 8 x 8 blocks, which begins at the top left. Here the tables equal their transposes and the
grid lies around the centre of the image, so that both look the same after a quarter turn.

Dimension key: S = side of the image, P = S rounded up to whole blocks, in pixels.
"""

import io
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data.records import DatasetError

QUALITY = 95
"""On the scale of libjpeg, 1 to 100; not a setting, so that prepared images stay comparable."""

BLOCK_PX = 8
"""Side of the blocks that JPEG codes on their own."""

_LUMA = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMA = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8 for _ in range(4)),
)
"""ITU-T T.81, annex K.1: step of each frequency at quality 50; rows are vertical frequencies."""


def check_side(side: int) -> None:
    """Check that images of this side can be stored so that the block grid has no direction.

    Raises:
        DatasetError: If `side`, in pixels, is odd.
    """
    if side % 2:
        raise DatasetError(
            f"Images stored as JPEG must have an even side, got {side} px: the grid of blocks "
            "would lie differently after a turn, and give the answer away. Change data.crop_margin "
            "or model.image_size by a little, or set data.format=raw."
        )


def encode(pixels: NDArray[np.uint8]) -> bytes:
    """Return an image as a JPEG file, at quality 95 and with colours in full resolution.

    Args:
        pixels: `(S, S, 3)`, RGB, S even (see `check_side`).

    Returns:
        A file of P x P pixels: the borders are reflected outwards, equally on all sides.
    """
    place = _reflected(len(pixels))
    file = io.BytesIO()
    Image.fromarray(pixels[place][:, place]).save(
        file, "JPEG", qtables=symmetric_tables(), subsampling=0
    )
    return file.getvalue()


def decode(content: bytes, side: int) -> NDArray[np.uint8]:
    """Return the image that `encode` stored, apart from what quantisation took.

    Args:
        content: What `encode` returned.
        side: S, in pixels.

    Returns:
        `(S, S, 3)`, RGB.

    Raises:
        OSError: If it is no JPEG file, or is cut short.
        ValueError: If its size is not that of an image of this side.
    """
    with Image.open(io.BytesIO(content), formats=("JPEG",)) as picture:
        padded = np.asarray(picture)
    first = len(_reflected(side)) - side >> 1
    if padded.shape != (side + 2 * first, side + 2 * first, 3):
        raise ValueError(f"an image of {side} px is stored in another size, not {padded.shape}")
    return padded[first : first + side, first : first + side]


@lru_cache
def symmetric_tables() -> list[list[int]]:
    """Return the quantisation tables of luminance and chrominance, 64 numbers each, row by row.

    They are the mean of the standard table at `QUALITY` and its transpose.
    """
    tables = []
    for base in (_LUMA, _CHROMA):
        # As libjpeg scales them for qualities above 50 (jcparam.c).
        table = np.maximum((np.array(base) * (200 - 2 * QUALITY) + 50) // 100, 1)
        tables.append([int(step) for step in ((table + table.T + 1) // 2).ravel()])
    return tables


@lru_cache
def _reflected(side: int) -> NDArray[np.int64]:
    """Return for each of P rows (and columns) which of S it shows."""
    pad = -side % BLOCK_PX // 2
    return np.pad(np.arange(side), pad, mode="reflect")
