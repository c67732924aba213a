"""Pictures in every form that cameras and the web give them, each against colours that we drew.

What each file must show is known from how it was made, not from our decoder: four squares, red and
green above, blue and white below (or four greys). Files are made here, by Pillow where it can write
them and by hand where it cannot.
"""

import io
import struct
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms

from data.decode import decode_square
from data.decoding_pool import pillow_warnings_ignored
from data.folder_source import FolderSource
from data.prepare import prepare
from data.prepared import PreparedData

SIZE = 64
COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255))
GREYS = (204, 0, 51, 255)
BITS = (255, 0, 0, 255)

Pixels = NDArray[np.uint8]


def squares(values: Any, dtype: Any = np.uint8) -> NDArray[Any]:
    """Four values in reading order as a picture, `(SIZE, SIZE)` or `(SIZE, SIZE, channels)`."""
    four = np.asarray(values, dtype=dtype)
    grid = four.reshape(2, 2, *four.shape[1:])
    return grid.repeat(SIZE // 2, axis=0).repeat(SIZE // 2, axis=1)


RGB = Image.fromarray(squares(COLOURS))
GREY = Image.fromarray(squares(GREYS))
BLACK_AND_WHITE = Image.fromarray(squares(BITS)).convert("1")
OTHER = Image.new("RGB", (SIZE, SIZE), (90, 60, 30))
"""A second frame or page, which must not be seen."""


class Odd(NamedTuple):
    make: Callable[[], bytes]
    shows: tuple[Any, ...] = COLOURS
    tolerance: int = 0


def save(picture: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.copy().save(file, kind, **options)  # a copy, because some writers leave marks
    return file.getvalue()


def animated(kind: str, **options: Any) -> bytes:
    return save(RGB, kind, save_all=True, append_images=[OTHER.copy(), RGB.copy()], **options)


def with_alpha(picture: Image.Image) -> Image.Image:
    result = picture.copy()
    result.putalpha(Image.fromarray(squares((255, 0, 128, 1))))
    return result


def palette() -> Image.Image:
    picture = Image.fromarray(squares((7, 3, 200, 0)))
    table = np.full((256, 3), 99, dtype=np.uint8)
    table[[7, 3, 200, 0]] = COLOURS
    picture.putpalette(table.tobytes())
    return picture


def after_start(jpeg: bytes, marker: int, content: bytes) -> bytes:
    segment = struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content
    return jpeg[:2] + segment + jpeg[2:]


def without_segment(jpeg: bytes, marker: int) -> bytes:
    at = 2
    while jpeg[at + 1] != marker:
        at += 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
    return jpeg[:at] + jpeg[at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big") :]


def cmyk() -> Image.Image:
    ink = 255 - squares(COLOURS)
    return Image.fromarray(np.concatenate([ink, np.zeros_like(ink[..., :1])], axis=-1), "CMYK")


def ycck() -> bytes:
    """What Adobe writes with transform 2: the three inks as Y, Cb and Cr, and inverted black.

    libjpeg's jdcolor.c turns Y, Cb and Cr to three values and inverts them; so inks come out
    inverted, as in Adobe's plain CMYK.
    """
    inks = Image.fromarray(255 - squares(COLOURS))
    stored = Image.merge("CMYK", [*inks.convert("YCbCr").split(), Image.new("L", RGB.size, 255)])
    # Pillow inverts as it writes.
    jpeg = save(Image.fromarray(255 - np.asarray(stored), "CMYK"), "JPEG", quality=95)
    at = jpeg.index(b"Adobe")
    return jpeg[: at + 11] + b"\x02" + jpeg[at + 12 :]


def swapped_profile() -> bytes:
    """A colour profile whose application would change every colour: sRGB, its red named blue."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, blue = profile.index(b"rXYZ"), profile.index(b"bXYZ")
    profile[red : red + 4], profile[blue : blue + 4] = b"bXYZ", b"rXYZ"
    return bytes(profile)


def chunk(kind: bytes, content: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + check


def png(pixels: NDArray[Any], depth: int, colour_type: int, *, interlaced: bool = False) -> bytes:
    passes = [(0, 0, 1, 1)]
    if interlaced:  # Adam7
        passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2)]
        passes += [(0, 1, 2, 2), (1, 0, 2, 1)]
    parts = (pixels[top::down, left::right] for top, left, down, right in passes)
    data = b"".join(b"\0" + row.tobytes() for part in parts for row in part)
    header = struct.pack(">IIBBBBB", SIZE, SIZE, depth, colour_type, 0, 0, interlaced)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def png_with(kind: bytes, content: bytes, picture: Image.Image = RGB) -> bytes:
    plain = save(picture, "PNG")
    return plain[:33] + chunk(kind, content) + plain[33:]


def bmp(data: bytes, *, bits: int, compression: int, height: int = SIZE, table: Any = ()) -> bytes:
    colours = b"".join(bytes((*colour[::-1], 0)) for colour in table)
    start = 14 + 40 + len(colours)
    header = struct.pack("<2sIHHI", b"BM", start + len(data), 0, 0, start)
    counts = (len(data), 2835, 2835, len(table), 0)
    info = struct.pack("<IiiHHIIiiII", 40, SIZE, height, 1, bits, compression, *counts)
    return header + info + colours + data


def run_length_bmp() -> bytes:
    half = SIZE // 2
    lower = bytes((half, 2, half, 3, 0, 0)) * half
    upper = bytes((half, 0, half, 1, 0, 0)) * half
    return bmp(lower + upper + b"\0\1", bits=8, compression=1, table=COLOURS)


def tiff(data: bytes, tags: Mapping[int, tuple[int, ...]], order: str = "<") -> bytes:
    """A TIFF of one strip or tile, whose data come right after the header."""
    tags = {256: (SIZE,), 257: (SIZE,), 259: (1,), **tags}
    start, extra = 8 + len(data), b""
    entries = []
    for tag, values in sorted(tags.items()):
        packed = struct.pack(f"{order}{len(values)}I", *values)
        if len(values) > 1:
            where = start + 2 + 12 * len(tags) + 4 + len(extra)
            extra, packed = extra + packed, struct.pack(f"{order}I", where)
        entries.append(struct.pack(f"{order}HHI", tag, 4, len(values)) + packed)
    mark = b"II*\0" if order == "<" else b"MM\0*"
    directory = struct.pack(f"{order}H", len(tags)) + b"".join(entries) + bytes(4)
    return mark + struct.pack(f"{order}I", start) + data + directory + extra


def grey_tiff(bits: int, values: Any, *, photometric: int = 1, order: str = "<") -> bytes:
    pixels = squares(values, f"{order}u{bits // 8}").tobytes()
    tags = {258: (bits,), 262: (photometric,), 273: (8,), 277: (1,), 278: (SIZE,)}
    return tiff(pixels, {**tags, 279: (len(pixels),)}, order)


def tiled_tiff() -> bytes:
    tile = SIZE // 2
    tiles = b"".join(bytes(colour) * tile * tile for colour in COLOURS)
    size = tile * tile * 3
    tags = {258: (8, 8, 8), 262: (2,), 277: (3,), 322: (tile,), 323: (tile,)}
    return tiff(tiles, {**tags, 324: tuple(8 + size * k for k in range(4)), 325: (size,) * 4})


def twelve_bits() -> bytes:
    """Two values in three bytes: 0xfff and 0x000, row by row."""
    row = {v: struct.pack(">I", v << 12 | v)[1:] * (SIZE // 4) for v in (0xFFF, 0)}
    pixels = (row[0xFFF] + row[0]) * (SIZE // 2) + (row[0] + row[0xFFF]) * (SIZE // 2)
    tags = {258: (12,), 262: (1,), 273: (8,), 277: (1,), 278: (SIZE,), 279: (len(pixels),)}
    return tiff(pixels, tags)


def turned_by_xmp() -> bytes:
    """Lies on its side, and says so in XMP alone."""
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="r"><rdf:Description '
    xmp += b'xmlns:tiff="t" tiff:Orientation="8"/></rdf:RDF></x:xmpmeta>'
    text = b"XML:com.adobe.xmp\0\0\0\0\0" + xmp
    return png_with(b"iTXt", text, RGB.transpose(Image.Transpose.ROTATE_270))


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def lying(kind: str, **options: Any) -> bytes:
    """Stored turned clockwise, to be shown turned back."""
    return save(RGB.transpose(Image.Transpose.ROTATE_270), kind, exif=exif(8), **options)


def in_the_middle(width: int, height: int) -> Image.Image:
    """The middle square is ours, all around it is black."""
    picture = Image.new("RGB", (width, height))
    picture.paste(RGB, ((width - SIZE) // 2, (height - SIZE) // 2))
    return picture


WIDE16 = squares([[v * 257 for v in colour] for colour in COLOURS], ">u2")
GREY16 = [value * 257 for value in GREYS]
DAMAGED_EXIF = b"Exif\0\0II*\0\xff\xff\xff\x7f"

ODD = {
    "jpeg.jpg": Odd(lambda: save(RGB, "JPEG", quality=95), tolerance=6),
    "jpeg-progressive.jpg": Odd(lambda: save(RGB, "JPEG", progressive=True), tolerance=6),
    "jpeg-444.jpg": Odd(lambda: save(RGB, "JPEG", subsampling="4:4:4"), tolerance=6),
    "jpeg-422.jpg": Odd(lambda: save(RGB, "JPEG", subsampling="4:2:2"), tolerance=6),
    "jpeg-411.jpg": Odd(lambda: save(RGB, "JPEG", subsampling="4:1:1"), tolerance=6),
    "jpeg-restarts.jpg": Odd(lambda: save(RGB, "JPEG", restart_marker_rows=1), tolerance=6),
    "jpeg-not-ycbcr.jpg": Odd(lambda: save(RGB, "JPEG", keep_rgb=True), tolerance=6),
    "jpeg-grey.jpg": Odd(lambda: save(GREY, "JPEG"), GREYS, 3),
    "jpeg-cmyk.jpg": Odd(lambda: save(cmyk(), "JPEG"), tolerance=6),
    "jpeg-cmyk-no-adobe.jpg": Odd(
        lambda: without_segment(save(cmyk(), "JPEG"), 0xEE), tolerance=6
    ),
    "jpeg-ycck.jpg": Odd(ycck, tolerance=6),
    "jpeg-profile.jpg": Odd(lambda: save(RGB, "JPEG", icc_profile=swapped_profile()), tolerance=6),
    "jpeg-damaged-profile.jpg": Odd(lambda: save(RGB, "JPEG", icc_profile=b"no"), tolerance=6),
    "jpeg-garbage-after.jpg": Odd(lambda: save(RGB, "JPEG") + b"\xff\xd8 PK\3\4" * 99, tolerance=6),
    "jpeg-long-comment.jpg": Odd(
        lambda: after_start(save(RGB, "JPEG"), 0xFE, b"\xff\xd9\n" * 9999), tolerance=6
    ),
    "jpeg-mpo.jpg": Odd(lambda: animated("MPO"), tolerance=6),
    "jpeg-lying.jpg": Odd(lambda: lying("JPEG"), tolerance=6),
    "jpeg-orientation-0.jpg": Odd(lambda: save(RGB, "JPEG", exif=exif(0)), tolerance=6),
    "jpeg-orientation-9.jpg": Odd(lambda: save(RGB, "JPEG", exif=exif(9)), tolerance=6),
    "jpeg-damaged-exif.jpg": Odd(lambda: save(RGB, "JPEG", exif=DAMAGED_EXIF), tolerance=6),
    "jpeg-named.png": Odd(lambda: save(RGB, "JPEG"), tolerance=6),
    "n02105855_2933.JPEG": Odd(lambda: save(RGB, "PNG")),
    "png-interlaced.png": Odd(lambda: png(squares(COLOURS), 8, 2, interlaced=True)),
    "png-palette.png": Odd(lambda: save(palette(), "PNG")),
    "png-palette-alpha.png": Odd(lambda: save(palette(), "PNG", transparency=bytes([0, 9] * 99))),
    "png-rgba.png": Odd(lambda: save(with_alpha(RGB), "PNG")),
    "png-one-colour-transparent.png": Odd(lambda: save(RGB, "PNG", transparency=(255, 0, 0))),
    "png-grey.png": Odd(lambda: save(GREY, "PNG"), GREYS),
    "png-grey-alpha.png": Odd(lambda: save(with_alpha(GREY), "PNG"), GREYS),
    "png-1-bit.png": Odd(lambda: save(BLACK_AND_WHITE, "PNG"), BITS),
    "png-16-bit-grey.png": Odd(lambda: png(squares(GREY16, ">u2"), 16, 0), GREYS),
    "png-16-bit-rgb.png": Odd(lambda: png(WIDE16, 16, 2)),
    "png-profile.png": Odd(lambda: save(RGB, "PNG", icc_profile=swapped_profile())),
    "png-gamma.png": Odd(lambda: png_with(b"gAMA", struct.pack(">I", 200_000))),
    "png-lying.png": Odd(lambda: lying("PNG")),
    "png-lying-by-xmp.png": Odd(turned_by_xmp),
    "png-damaged-exif.png": Odd(lambda: png_with(b"eXIf", b"II*\0\xff\xff\xff\x7f")),
    "png-animated.png": Odd(lambda: animated("PNG")),
    "png-garbage-after.png": Odd(lambda: save(RGB, "PNG") + b"<html>" * 99),
    "gif.gif": Odd(lambda: save(palette(), "GIF")),
    "gif-transparent.gif": Odd(lambda: save(palette(), "GIF", transparency=7)),
    "gif-animated.gif": Odd(lambda: animated("GIF", disposal=2)),
    "webp.webp": Odd(lambda: save(RGB, "WEBP", quality=95), tolerance=6),
    "webp-lossless.webp": Odd(lambda: save(RGB, "WEBP", lossless=True)),
    "webp-alpha.webp": Odd(
        lambda: save(with_alpha(RGB), "WEBP", lossless=True, exact=True)
    ),
    "webp-animated.webp": Odd(lambda: animated("WEBP", lossless=True)),
    "webp-lying.webp": Odd(lambda: lying("WEBP", lossless=True)),
    "webp-damaged-exif.webp": Odd(
        lambda: save(RGB, "WEBP", lossless=True, exif=DAMAGED_EXIF)
    ),
    "bmp.bmp": Odd(lambda: save(RGB, "BMP")),
    "bmp-1-bit.bmp": Odd(lambda: save(BLACK_AND_WHITE, "BMP"), BITS),
    "bmp-palette.bmp": Odd(lambda: save(palette(), "BMP")),
    "bmp-alpha.bmp": Odd(lambda: save(with_alpha(RGB), "BMP")),
    "bmp-run-lengths.bmp": Odd(run_length_bmp),
    "bmp-top-down.bmp": Odd(
        lambda: bmp(squares(COLOURS)[..., ::-1].tobytes(), bits=24, compression=0, height=-SIZE)
    ),
    "bmp-15-bit.bmp": Odd(
        lambda: bmp(
            squares([31 << 10, 31 << 5, 31, 0x7FFF], "<u2")[::-1].tobytes(), bits=16, compression=0
        )
    ),
    "tiff.tif": Odd(lambda: save(RGB, "TIFF")),
    "tiff-lzw.tif": Odd(lambda: save(RGB, "TIFF", compression="tiff_lzw")),
    "tiff-deflate.tif": Odd(lambda: save(RGB, "TIFF", compression="tiff_adobe_deflate")),
    "tiff-packbits.tif": Odd(lambda: save(RGB, "TIFF", compression="packbits")),
    "tiff-jpeg.tif": Odd(lambda: save(RGB, "TIFF", compression="jpeg"), tolerance=6),
    "tiff-fax.tif": Odd(lambda: save(BLACK_AND_WHITE, "TIFF", compression="group4"), BITS),
    "tiff-cmyk.tif": Odd(lambda: save(cmyk(), "TIFF")),
    "tiff-pages.tif": Odd(lambda: animated("TIFF")),
    "tiff-tiles.tif": Odd(tiled_tiff),
    "tiff-lying.tif": Odd(lambda: lying("TIFF")),
    "tiff-lying-lzw.tif": Odd(lambda: lying("TIFF", compression="tiff_lzw")),
    "tiff-8-bit-white-is-0.tif": Odd(
        lambda: grey_tiff(8, [255 - value for value in GREYS], photometric=0), GREYS
    ),
    "tiff-12-bit.tif": Odd(twelve_bits, (255, 0, 0, 255)),
    "tiff-16-bit.tif": Odd(lambda: grey_tiff(16, GREY16), GREYS),
    "tiff-16-bit-big-endian.tif": Odd(lambda: grey_tiff(16, GREY16, order=">"), GREYS),
    "tiff-16-bit-white-is-0.tif": Odd(
        lambda: grey_tiff(16, [65535 - value for value in GREY16], photometric=0), GREYS
    ),
    "ppm.ppm": Odd(lambda: save(RGB, "PPM")),
    "ppm-16-bit.ppm": Odd(lambda: b"P6 64 64 65535\n" + WIDE16.tobytes()),
    "ppm-in-words.ppm": Odd(
        lambda: b"P3 # drawn\n64 64 255\n" + " ".join(map(str, squares(COLOURS).ravel())).encode()
    ),
    "pgm.pgm": Odd(lambda: save(GREY, "PPM"), GREYS),
    "pgm-16-bit.pgm": Odd(
        lambda: b"P5 64 64 65535\n" + squares(GREY16, ">u2").tobytes(), GREYS
    ),
    "pgm-10-bit.pgm": Odd(
        lambda: b"P5 64 64 1023\n" + squares([1023, 0, 0, 1023], ">u2").tobytes(), BITS
    ),
    "pbm.pbm": Odd(lambda: save(BLACK_AND_WHITE, "PPM"), BITS),
    "wide.png": Odd(lambda: save(in_the_middle(10_000, SIZE), "PNG")),
    "tall.jpg": Odd(lambda: save(in_the_middle(SIZE, 10_000), "JPEG"), tolerance=8),
    "one-pixel.png": Odd(lambda: save(Image.new("RGB", (1, 1), "red"), "PNG"), COLOURS[:1] * 4),
    "one-column.png": Odd(
        lambda: save(Image.new("RGB", (1, 10_000), "red"), "PNG"), COLOURS[:1] * 4
    ),
    "one-row.webp": Odd(
        lambda: save(Image.new("RGB", (10_000, 1), "red"), "WEBP", lossless=True), COLOURS[:1] * 4
    ),
}  # fmt: skip


def check(pixels: Pixels, odd: Odd) -> None:
    """Compare the corners, which lie well inside the four squares, with what was drawn."""
    expected = np.asarray(odd.shows, dtype=np.uint8).reshape(4, -1)
    corners = pixels[[0, 0, -1, -1], [0, -1, 0, -1]]
    np.testing.assert_allclose(
        corners.astype(int), np.broadcast_to(expected, (4, 3)).astype(int), atol=odd.tolerance
    )


@pytest.mark.parametrize("name", list(ODD))
def test_an_odd_picture_shows_what_was_drawn(name: str) -> None:
    with pillow_warnings_ignored():
        check(decode_square(ODD[name].make(), side=8), ODD[name])


def test_a_folder_of_odd_pictures_is_prepared_whole(tmp_path: Path) -> None:
    for name, odd in ODD.items():
        (tmp_path / name).write_bytes(odd.make())
    prepared = tmp_path / "prepared"
    source = FolderSource(str(tmp_path))
    manifest = prepare(source, prepared, side=8, report=lambda done, total: None, workers=2)
    assert manifest.skipped == []
    images = PreparedData.open(prepared).train.gather(np.arange(len(ODD)))
    for name, image in zip(sorted(ODD), images, strict=True):
        check(image, ODD[name])
