"""Turning the files of pictures without loss: JPEG by its orientation, PNG by moving its pixels.

JPEG's compressed data stay as they are, byte for byte, and so does all else in the file: only the
EXIF orientation, which every viewer applies, gets another value. In PNG many viewers ignore it, so
the pixels are moved, which loses nothing there; everything around them is kept.
"""

import io
import re
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data.decode import FORMATS, TURNS, orientation_of

QUARTER_TURNS = {
    1: Image.Transpose.ROTATE_90,
    2: Image.Transpose.ROTATE_180,
    3: Image.Transpose.ROTATE_270,
}
"""What turns a picture by so many quarter turns, counter-clockwise."""

REENCODED_JPEG_QUALITY = 95

_ORIENTATION, _SHORT = 0x0112, 3  # tag and type of EXIF
_BITS_PER_SAMPLE = 0x0102  # tag of TIFF
_EXIF, _XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
_ORIENTATION_IN_XMP = re.compile(rb'(?<=tiff:Orientation)(="|>)\d')
_PNG = b"\x89PNG\r\n\x1a\n"
_LARGEST_SEGMENT = 65_535  # of JPEG, its two bytes of length included


class LossError(ValueError):
    """A file that cannot be turned without losing something, with the reason in one line."""


def turn_file(content: bytes, quarter_turns: int) -> bytes:
    """Return the file with its picture turned, nothing lost.

    Args:
        content: A file that `data.decode` accepts.
        quarter_turns: How far to turn what viewers show (the orientation in EXIF applied),
            counter-clockwise; 1 to 3.

    Raises:
        LossError: If it is neither JPEG nor PNG, or one of a kind that this cannot turn exactly.
    """
    if content.startswith(b"\xff\xd8"):
        return _turn_jpeg(content, quarter_turns)
    if content.startswith(_PNG):
        return _turn_png(content, quarter_turns)
    with _open(content) as picture:
        raise LossError(f"{picture.format} is not turned without loss")


def turn_by_encoding(content: bytes, quarter_turns: int) -> bytes:
    """Return the picture turned and encoded anew in its format, for what `turn_file` refuses.

    JPEG loses a little (quality 95), WebP and the others lose no pixel; of what is written beside
    the pixels only the colour profile is kept.

    Raises:
        LossError: If the file holds several pictures, of which only one would be left, or more
            than 8 bits per channel, of which only 8 would.
    """
    with _open(content) as picture:
        if _bits_per_channel(content, picture) > 8:
            raise LossError("it has more than 8 bits per channel")
        kind = "JPEG" if picture.format == "MPO" else str(picture.format)
        if getattr(picture, "n_frames", 1) > 1:
            raise LossError("it holds several pictures")
        turned = _shown(picture).transpose(QUARTER_TURNS[quarter_turns])
        options: dict[str, Any] = {}
        if kind == "JPEG":
            options["quality"] = REENCODED_JPEG_QUALITY
        if kind == "WEBP":
            options["lossless"] = True
        if profile := picture.info.get("icc_profile"):
            options["icc_profile"] = profile
        encoded = io.BytesIO()
        for beside in ("exif", "xmp"):  # Pillow would write the old orientation into some formats
            turned.info.pop(beside, None)
        try:
            turned.save(encoded, kind, **options)
        except (OSError, ValueError) as error:  # a mode that the format can be read in only
            raise LossError(f"it cannot be written: {error}") from error
    return encoded.getvalue()


def _bits_per_channel(content: bytes, picture: Image.Image) -> int:
    if content.startswith(_PNG):
        return content[24]  # of the header; Pillow's mode does not tell
    if picture.format == "TIFF":
        bits = picture.getexif().get(_BITS_PER_SAMPLE, 8)
        return max(bits) if isinstance(bits, tuple) else int(bits)
    return 16 if picture.mode[:1] in ("I", "F") else 8


def turned_orientation(orientation: int, quarter_turns: int) -> int:
    """Return the EXIF orientation that shows a picture further turned than another one does.

    Args:
        orientation: 1 to 8.
        quarter_turns: Counter-clockwise.
    """
    wanted = np.rot90(_corners(orientation), quarter_turns)
    return next(each for each in range(1, 9) if np.array_equal(_corners(each), wanted))


def _corners(orientation: int) -> NDArray[np.uint8]:
    """Return where the corners of a picture are shown."""
    picture = Image.fromarray(np.array([[0, 1], [2, 3]], dtype=np.uint8))
    turn = TURNS.get(orientation)
    return np.asarray(picture if turn is None else picture.transpose(turn))


def _open(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content), formats=FORMATS)


def _shown(picture: Image.Image) -> Image.Image:
    picture.load()  # of TIFF, Pillow applies the orientation when it loads the pixels
    turn = TURNS.get(orientation_of(picture))
    return picture.copy() if turn is None else picture.transpose(turn)


def _turn_jpeg(content: bytes, quarter_turns: int) -> bytes:
    with _open(content) as picture:
        wanted = turned_orientation(orientation_of(picture), quarter_turns)
    turned = _with_orientation(content, wanted)
    with _open(turned) as picture:
        if orientation_of(picture) != wanted:
            raise LossError("its EXIF data cannot be changed")
    return turned


def _with_orientation(content: bytes, orientation: int) -> bytes:
    """Return a JPEG file with this orientation in EXIF, and in XMP where that has one."""
    segments = list(_segments(content))
    exif = [(start, end) for name, start, end in segments if name == _EXIF]
    if len(exif) > 1:
        raise LossError("its EXIF data fill several segments")
    out = bytearray(content)
    for name, start, end in segments:
        if name == _XMP:  # the same length, so that nothing moves
            out[start:end] = _ORIENTATION_IN_XMP.sub(rb"\g<1>%d" % orientation, out[start:end])
    if exif:
        start, end = exif[0]
        block = _exif_with_orientation(bytes(out[start + 4 + len(_EXIF) : end]), orientation)
    else:
        # Where cameras put it: first, or after the header of JFIF.
        start = segments[0][2] if segments and content[3] == 0xE0 else 2
        end = start
        block = _exif_with_orientation(b"MM\0*\0\0\0\x08\0\0\0\0\0\0", orientation)
    length = 2 + len(_EXIF) + len(block)
    if length > _LARGEST_SEGMENT:
        raise LossError("its EXIF data leave no room for an orientation")
    if (
        any(name == b"MPF\0" and at < start for name, at, _ in segments)
        and length + 2 > end - start
    ):
        raise LossError("it holds several pictures whose places would move")
    out[start:end] = b"\xff\xe1" + length.to_bytes(2, "big") + _EXIF + block
    return bytes(out)


def _segments(content: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield the segments before a JPEG's first scan: kind where we know it, start and end."""
    at = 2
    while at + 4 <= len(content) and content[at] == 0xFF and content[at + 1] != 0xDA:
        if content[at + 1] == 0xFF:  # markers may be preceded by any number of these
            at += 1
            continue
        end = at + 2 + int.from_bytes(content[at + 2 : at + 4], "big")
        known = {0xE1: (_EXIF, _XMP), 0xE2: (b"MPF\0",)}.get(content[at + 1], ())
        yield next((name for name in known if content.startswith(name, at + 4)), b""), at, end
        at = end


def _exif_with_orientation(exif: bytes, orientation: int) -> bytes:
    """Return EXIF data with this orientation; everything else stays where it was.

    Where there is no such entry, the first directory is written once more at the end, with it:
    nothing that offsets point to has moved then.
    """
    try:
        order = {b"II": "<", b"MM": ">"}[exif[:2]]
        (first,) = struct.unpack_from(order + "I", exif, 4)
        (count,) = struct.unpack_from(order + "H", exif, first)
        entries = [exif[first + 2 + 12 * n : first + 14 + 12 * n] for n in range(count)]
        following = exif[first + 2 + 12 * count : first + 6 + 12 * count]
        if len(following) != 4:
            raise LossError("its EXIF data are damaged")
        tags = [struct.unpack_from(order + "H", entry)[0] for entry in entries]
    except (KeyError, struct.error) as error:
        raise LossError("its EXIF data are damaged") from error
    entry = struct.pack(order + "HHIHH", _ORIENTATION, _SHORT, 1, orientation, 0)
    if _ORIENTATION in tags:
        at = first + 2 + 12 * tags.index(_ORIENTATION)
        return exif[:at] + entry + exif[at + 12 :]
    place = sum(tag < _ORIENTATION for tag in tags)  # sorted by tag
    entries.insert(place, entry)
    padded = exif + b"\0" * (len(exif) % 2)
    directory = struct.pack(order + "H", len(entries)) + b"".join(entries) + following
    return padded[:4] + struct.pack(order + "I", len(padded)) + padded[8:] + directory


def _turn_png(content: bytes, quarter_turns: int) -> bytes:
    with _open(content) as picture:
        if getattr(picture, "n_frames", 1) > 1:
            raise LossError("it holds several pictures")
        turned = _shown(picture).transpose(QUARTER_TURNS[quarter_turns])
    encoded = io.BytesIO()
    turned.save(encoded, "PNG")
    new = list(_chunks(encoded.getvalue()))
    old = list(_chunks(content))
    # Pillow reads 16-bit colours and small greys as 8 bits: other depth or kind, other pixels.
    if old[0][1][8:10] != new[0][1][8:10]:
        raise LossError("its kind of PNG cannot be written as it is")
    pixels = [chunk for chunk in new if chunk[0] == b"IDAT"]
    chunks = [new[0]]
    for kind, data in old[1:]:
        if kind == b"IDAT":
            chunks += pixels
            pixels = []
        elif kind == b"eXIf":
            chunks.append((kind, _exif_with_orientation(data, 1)))
        elif kind == b"pHYs" and quarter_turns % 2 and len(data) == 9:
            chunks.append((kind, data[4:8] + data[:4] + data[8:]))
        else:
            chunks.append((kind, data))
    result = _PNG + b"".join(_chunk(kind, data) for kind, data in chunks)
    with _open(result) as again:
        again.load()
        if orientation_of(again) != 1 or _content(again) != _content(turned):
            raise LossError("its kind of PNG cannot be written as it is")
    return result


def _content(picture: Image.Image) -> tuple[object, ...]:
    palette = picture.getpalette() if picture.mode == "P" else None
    return picture.mode, picture.size, picture.tobytes(), palette, picture.info.get("transparency")


def _chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = len(_PNG)
    while at + 12 <= len(content):
        (length,) = struct.unpack_from(">I", content, at)
        yield content[at + 4 : at + 8], content[at + 8 : at + 8 + length]
        at += 12 + length


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
