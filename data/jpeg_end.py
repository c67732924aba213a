"""JPEG files whose data end before the picture does, which decoders fill up with grey.

libjpeg only warns about it, and Pillow does not pass warnings on: half a photo and half a grey
square would be trained on. A download that was cut off and padded makes such files.
"""

import io

from PIL import Image

_START_OF_SCAN, _END = 0xDA, b"\xff\xd9"

_GREY = {127, 128}
"""What blocks without data come out as."""

_FILLING = 0x55
"""Bits 01010101: in any Huffman table other values than the zeros that libjpeg fills up with."""


class UndecodableError(ValueError):
    """An image that cannot be used, with the reason in one line."""


def check_jpeg_ends(content: bytes, picture: Image.Image) -> None:
    """Make sure that a JPEG file has data for all of the picture.

    Blocks without data come out as exact mid-grey, and the last to come is the lower right one.
    Where it is grey, the picture is decoded once more with other data after the end: they make no
    difference to a whole picture. Photos are rarely grey there, so it costs next to nothing.

    Not found: progressive files that lack whole scans and end properly (they are blurred), and
    data that are damaged in the middle.

    Args:
        content: The file.
        picture: What was decoded from it.

    Raises:
        UndecodableError: If the data end early, or have no end.
    """
    first_scan = _first_scan(content)
    # From behind, where it is: looking for the first one reads all of the file.
    if content.rfind(_END, first_scan) < 0:
        raise UndecodableError("the JPEG data have no end, the file was cut off")
    width, height = picture.size
    corner = picture.crop((max(0, width - 8), height - 1, width, height))
    if not _GREY.issuperset(corner.tobytes()):
        return
    end = content.find(_END, first_scan)
    longer = content[:end] + bytes([_FILLING]) * 256 + _END
    with Image.open(io.BytesIO(longer), formats=("JPEG",)) as other:
        if not _equal(picture, other):
            raise UndecodableError("the JPEG data end before the picture does")


def _equal(one: Image.Image, other: Image.Image) -> bool:
    """Compare pictures of one size a few rows at a time: whole ones are large."""
    boxes = ((0, top, one.width, min(top + 64, one.height)) for top in range(0, one.height, 64))
    return all(one.crop(box).tobytes() == other.crop(box).tobytes() for box in boxes)


def _first_scan(content: bytes) -> int:
    """Return where the first scan begins; an end before it is that of a thumbnail."""
    at = 2
    while at + 4 <= len(content) and content[at + 1] != _START_OF_SCAN:
        fill = content[at + 1] == 0xFF  # markers may be preceded by any number of these
        at += 1 if fill else 2 + int.from_bytes(content[at + 2 : at + 4], "big")
    return at
