"""From an encoded image to a square of bytes, the same for every way in.

Any file that a camera or the web produces either becomes a picture or an `UndecodableError` with a
one-line reason; which of the two does not depend on the machine.
"""

import io
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from data.transforms import centre_crop_square, resize

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""What is opened, judged by content and not by name. Rare decoders have the most holes."""


_ORIENTATION = 0x0112

_TURNS: dict[object, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What sets a picture upright, by the value of its EXIF orientation; 1 is upright."""


class UndecodableError(ValueError):
    """An image that cannot be used, with the reason in one line."""


def decode_square(image: bytes | Path | Image.Image, side: int) -> NDArray[np.uint8]:
    """Decode an image, set it upright, crop its centre and shrink it.

    The orientation in EXIF is applied once, here, so that "up" is where the photographer saw it;
    an invalid one is ignored. Animations give their first frame. Transparency is dropped, as by
    the image processors of `transformers`, which read what the exported model will be shown.
    Pillow may warn about oddities on the way; `data.decoding_pool` keeps that quiet.

    Args:
        image: The encoded file, its path, or a picture.
        side: Height and width of the result, in pixels.

    Returns:
        `(side, side, 3)`, RGB.

    Raises:
        UndecodableError: If the file is empty, damaged, of a kind not in `FORMATS`, or has more
            than twice Pillow's limit of 89 million pixels.
    """
    try:
        picture = image if isinstance(image, Image.Image) else _open(image)
        square = centre_crop_square(_to_rgb(_upright(picture)))
        pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1)[None].float()
    except UndecodableError:
        raise
    except Exception as error:
        # Damaged files make decoders raise almost anything: OSError, SyntaxError, struct.error...
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UndecodableError(reason[:200]) from error
    small = resize(pixels, side)[0].permute(1, 2, 0)
    return np.asarray(small.round().clamp(0, 255).to(torch.uint8).numpy())


def _open(image: bytes | Path) -> Image.Image:
    content = image.read_bytes() if isinstance(image, Path) else image
    if not content:
        raise UndecodableError("the file is empty")
    try:
        picture = Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError as error:
        # Pillow's message holds a memory address, which would differ from run to run.
        raise UndecodableError(f"not an image of the kinds {', '.join(FORMATS)}") from error
    picture.load()
    return picture


def _upright(picture: Image.Image) -> Image.Image:
    # Not ImageOps.exif_transpose: it also writes the other tags anew, and where one of them is
    # damaged it raises although the orientation was read well.
    try:
        turn = _TURNS.get(picture.getexif().get(_ORIENTATION))
    except Exception:
        # The pixels are sound; only what was written beside them is not.
        turn = None
    return picture if turn is None else picture.transpose(turn)


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):
        # 16 bits per pixel: Pillow would clip at 255 and give a white picture.
        scaled = np.asarray(picture, dtype=np.int64) // 257
        picture = Image.fromarray(scaled.clip(0, 255).astype(np.uint8))
    return picture.convert("RGB")
