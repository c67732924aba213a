"""From an encoded image to a square of bytes, the same for every way in.

Any file that a camera or the web produces either becomes a picture or an `UndecodableError` with a
one-line reason; which of the two, and the reason, do not depend on the machine or the run.
"""

import io
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import interpolate

from data.jpeg_end import UndecodableError, check_jpeg_ends
from data.transforms import centre_crop_square, resize

__all__ = [
    "FORMATS",
    "MAX_FILE_BYTES",
    "MAX_PIXELS",
    "TURNS",
    "UndecodableError",
    "decode_square",
    "orientation_of",
    "read_file",
]

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""What is opened, judged by content and not by name. Rare decoders have the most holes."""

MAX_PIXELS = 120_000_000
"""Larger pictures are refused before they are decoded: half a gigabyte each, and more than the 102
million that the largest single photos of today's cameras have."""

MAX_FILE_BYTES = 2**30
"""Larger files are refused unread; `MAX_PIXELS` in 16-bit RGB without compression take less."""

_BAND_PIXELS = 2**21
"""Pixels that are turned to floats at once; most photos are smaller, and Pillow keeps twice as many
in one block of memory."""

_ORIENTATION = 0x0112
_PHOTOMETRIC, _BITS_PER_SAMPLE = 262, 258  # tags of TIFF

TURNS: dict[int, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What sets a picture upright, by the value of its EXIF orientation; 1 is upright."""


@dataclass(frozen=True, slots=True)
class _Depth:
    """How grey values of more than 8 bits are to be read."""

    largest: int
    inverted: bool


def decode_square(image: bytes | Path | Image.Image, side: int) -> NDArray[np.uint8]:
    """Decode an image, set it upright, crop its centre and shrink it.

    What is done where files differ:

    - The orientation in EXIF is applied once, here, so that "up" is where the photographer saw it;
      an invalid one is ignored.
    - Animations and files of several pages give their first picture.
    - Transparency is dropped and colour profiles (ICC) are not applied: the image processors of
      `transformers`, which read what the exported model will be shown, do neither, and nor do the
      loaders that published figures come from. Training on other colours than are served would be
      a difference without a use.
    - CMYK in JPEG is read as inverted, as Adobe writes it and every browser reads it.
    - 16 bits per channel are scaled to 8. Floats and 32-bit integers are refused, because nothing
      says which of their values is white.

    Pillow may warn about oddities on the way; `data.decoding_pool` keeps that quiet. Memory beyond
    the decoded picture (at most 4 bytes for each of `MAX_PIXELS`, twice that where it is turned) is
    bounded by a band of it.

    Args:
        image: The encoded file, its path, or a picture.
        side: Height and width of the result, in pixels.

    Returns:
        `(side, side, 3)`, RGB.

    Raises:
        UndecodableError: If the file is empty, not a plain file, damaged, of a kind not in
            `FORMATS`, or larger than `MAX_PIXELS` or `MAX_FILE_BYTES`.
    """
    try:
        picture = image if isinstance(image, Image.Image) else _open(image)
        depth = _depth(picture)
        small = _shrink(centre_crop_square(_upright(picture)), depth, side)
    except UndecodableError:
        raise
    except Image.DecompressionBombError as error:
        raise _too_large() from error
    except Exception as error:  # damaged files raise OSError, SyntaxError, struct.error, ...
        raise UndecodableError(_reason(error)) from error
    pixels = small.contiguous().numpy()
    np.rint(pixels, out=pixels)
    return np.clip(pixels, 0, 255, out=pixels).astype(np.uint8)


def _open(image: bytes | Path) -> Image.Image:
    content = read_file(image) if isinstance(image, Path) else image
    if not content:
        raise UndecodableError("the file is empty")
    try:
        picture = Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError as error:
        # Pillow's message holds a memory address, which would differ from run to run.
        raise UndecodableError(f"not an image of the kinds {', '.join(FORMATS)}") from error
    if picture.width * picture.height > MAX_PIXELS:
        raise _too_large()
    picture.load()
    if content.startswith(b"\xff\xd8"):
        check_jpeg_ends(content, picture)
    return picture


def read_file(path: Path) -> bytes:
    """Return the content of a plain file.

    Raises:
        UndecodableError: If it is no plain file, or larger than `MAX_FILE_BYTES`.
        OSError: If it cannot be read.
    """
    # What was opened is asked what it is, and not the path beforehand: nothing can change between.
    with open(path, "rb", opener=_without_waiting) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise UndecodableError("not a file but a pipe or a device")
        if status.st_size > MAX_FILE_BYTES:
            raise UndecodableError(f"the file has more than {MAX_FILE_BYTES / 2**30:g} GiB")
        return file.read()


def _without_waiting(path: str, flags: int) -> int:
    """Open for reading; a pipe would otherwise wait for someone to write to it."""
    return os.open(path, flags | os.O_NONBLOCK)


def _too_large() -> UndecodableError:
    return UndecodableError(f"the picture has more than {MAX_PIXELS / 1e6:g} million pixels")


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        # Not the whole message: it has the path in it, which another machine would not have.
        return f"{type(error).__name__}: {error.strerror}"
    text = re.sub(r"<?[\w.]+ object at 0x[0-9a-f]+>?", "file", str(error))
    return " ".join(f"{type(error).__name__}: {text}".split())[:200]


def orientation_of(picture: Image.Image) -> int:
    """Return the EXIF orientation by which a picture is shown, 1 to 8; 1 if none is valid."""
    try:
        found = picture.getexif().get(_ORIENTATION)
        return int(found) if found in TURNS else 1
    except Exception:  # the pixels are sound; only what was written beside them is not
        return 1


def _upright(picture: Image.Image) -> Image.Image:
    # Not ImageOps.exif_transpose: it also writes the other tags anew, and where one of them is
    # damaged it raises although the orientation was read well.
    turn = TURNS.get(orientation_of(picture))
    return picture if turn is None else picture.transpose(turn)


def _depth(picture: Image.Image) -> _Depth | None:
    """Tell how to read the values of a picture of more than 8 bits, None for all others."""
    if picture.mode == "F" or (picture.mode == "I" and picture.format == "TIFF"):
        raise UndecodableError(
            "its pixels are floats, signed or of 32 bits, and nothing says which value is white"
        )
    if not picture.mode.startswith("I"):
        return None
    tags = getattr(picture, "tag_v2", {})
    # Pillow reads 12 bits as they are, and minds in 8 bits only whether zero is black or white.
    return _Depth(
        largest=4095 if tags.get(_BITS_PER_SAMPLE) == (12,) else 65535,
        inverted=tags.get(_PHOTOMETRIC) == 0,
    )


def _shrink(square: Image.Image, depth: _Depth | None, side: int) -> Tensor:
    """Resize a square picture to `(side, side, 3)`, floats from 0 to 255."""
    size = square.width
    if size * size <= _BAND_PIXELS:
        return resize(_floats(square, depth), side)[0].permute(1, 2, 0)
    # First all rows to their width, a band at a time, then all columns to their height. It is what
    # torch does inside, to the last bit, with a hundredth of the memory.
    rows = max(1, _BAND_PIXELS // size)
    bands = []
    for top in range(0, size, rows):
        band = _floats(square.crop((0, top, size, min(top + rows, size))), depth)
        bands.append(interpolate(band, size=(band.shape[2], side), mode="bilinear", antialias=True))
    return resize(torch.cat(bands, dim=2), side)[0].permute(1, 2, 0)


def _floats(picture: Image.Image, depth: _Depth | None) -> Tensor:
    """Return a picture as `(1, 3, H, W)`, from 0 to 255."""
    if depth is not None:
        # Pillow would clip at 255 and give a white picture.
        values = np.asarray(picture, dtype=np.int64).clip(0, depth.largest) * 255 // depth.largest
        picture = Image.fromarray((255 - values if depth.inverted else values).astype(np.uint8))
    if picture.mode != "RGB":
        picture = picture.convert("RGB")
    floats = torch.from_numpy(_pixels(picture).astype(np.float32))
    return floats[..., :3].permute(2, 0, 1)[None]


def _pixels(picture: Image.Image) -> NDArray[np.uint8]:
    """Return the bytes of an RGB picture, `(H, W, 4)` with one that means nothing, or `(H, W, 3)`.

    Pillow keeps four bytes per pixel. To turn them to floats where they lie takes half the time of
    packing three of each, copying them and turning those.
    """
    try:
        shared = pyarrow.array(picture).flatten().to_numpy()
    except ValueError:  # in several blocks: somebody made Pillow's blocks smaller
        return np.asarray(picture)
    return np.asarray(shared.reshape(picture.height, picture.width, 4))
