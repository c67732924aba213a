"""Small pictures for the inside of an HTML page, as they are or lit by attention.

Dimension key: S = side in pixels, P = patches per side.
"""

import base64
import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SHOWN_SIDE = 96
"""Side of a picture in the page, in pixels, at most."""

_DIM = 0.22
"""Brightness of what the class token does not look at."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image in the page.

    Attributes:
        uri: Its bytes, as a `data:` address.
        alt: What a reader who does not see it should know.
        title: What stands below it.
        note: More of that, in small print.
    """

    uri: str
    alt: str
    title: str = ""
    note: str = ""


def lit(image: NDArray[np.uint8], attention: NDArray[np.float32], where: str) -> Picture:
    """Light an image by attention: bright is what is looked at most, dark and grey what is not.

    Args:
        image: `(S, S, 3)`.
        attention: `(P, P)`, shares.
        where: Completes "attention ...".
    """
    picture = Image.fromarray(image).resize((SHOWN_SIDE, SHOWN_SIDE), Image.Resampling.BICUBIC)
    light = Image.fromarray((attention / attention.max()).astype(np.float32))
    weight = np.asarray(light.resize(picture.size, Image.Resampling.BILINEAR))[..., None]
    colours = np.asarray(picture, dtype=np.float32)
    grey = np.asarray(picture.convert("L"), dtype=np.float32)[..., None]
    mixed = weight * colours + (1 - weight) * grey * _DIM
    row, column = np.unravel_index(int(attention.argmax()), attention.shape)
    side = len(attention)
    return Picture(
        uri=picture_uri(np.clip(mixed, 0, 255).astype(np.uint8)),
        alt=f"Attention {where}: from {attention.min():.1%} to {attention.max():.1%} a patch, "
        f"most in row {row + 1}, column {column + 1} of {side}.",
    )


def picture_uri(pixels: NDArray[np.uint8]) -> str:
    """Return an image as a `data:` address, made smaller where it is large.

    Args:
        pixels: `(S, S, 3)`.
    """
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    picture.thumbnail((SHOWN_SIDE, SHOWN_SIDE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    picture.save(stream, "WEBP", quality=90, method=6)
    return f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}"
