"""Turned files show the turned picture, to every reader, and have lost nothing."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, PngImagePlugin

from data.decoding_pool import pillow_warnings_ignored
from data.upright_files import LossError, turn_by_encoding, turn_file, turned_orientation

ORIENTATION = ExifTags.Base.Orientation
XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/'
    b'22-rdf-syntax-ns#"><rdf:Description tiff:Orientation="6" note="kept"/></rdf:RDF></x:xmpmeta>'
)


def picture(mode: str = "RGB", width: int = 23, height: int = 11) -> Image.Image:
    pixels = np.random.default_rng(3).integers(0, 256, (height, width, 4), dtype=np.uint8)
    if mode == "I;16":
        return Image.fromarray(pixels[..., 0].astype(np.uint16) * 257 + pixels[..., 1])
    return Image.fromarray(pixels).convert(mode)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def exif(orientation: int | None) -> Image.Exif:
    found = Image.Exif()
    found[ExifTags.Base.Make] = "A camera"
    found[ExifTags.Base.DateTime] = "2026:03:14 15:09:26"
    found.get_ifd(ExifTags.IFD.GPSInfo)[1] = "N"
    if orientation is not None:
        found[ORIENTATION] = orientation
    return found


def shown(content: bytes) -> NDArray[Any]:
    """What a viewer shows: by Pillow's own reading of EXIF, not by ours."""
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(ImageOps.exif_transpose(image))


def tags_of(block: bytes) -> list[int]:
    """Tags of the first directory, in the order of the file."""
    tiff = block.removeprefix(b"Exif\0\0")
    order = "<" if tiff.startswith(b"II") else ">"
    (first,) = struct.unpack_from(order + "I", tiff, 4)
    (count,) = struct.unpack_from(order + "H", tiff, first)
    return [struct.unpack_from(order + "H", tiff, first + 2 + 12 * n)[0] for n in range(count)]


def data_of(jpeg: bytes) -> bytes:
    return jpeg[jpeg.index(b"\xff\xdb") :]  # from the quantisation tables on


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_jpeg_is_turned_by_its_orientation_and_nothing_else_changes(orientation: int) -> None:
    before = encoded(picture(), "JPEG", exif=exif(orientation), xmp=XMP)
    for quarter_turns in (1, 2, 3):
        after = turn_file(before, quarter_turns)
        np.testing.assert_array_equal(shown(after), np.rot90(shown(before), quarter_turns))
        assert len(after) == len(before)
        assert sum(a != b for a, b in zip(after, before, strict=True)) <= 2, "EXIF's, and XMP's"
        wanted = turned_orientation(orientation, quarter_turns)
        assert b'tiff:Orientation="%d" note="kept"' % wanted in after


@pytest.mark.parametrize("what", ["no EXIF", "no orientation", "little-endian", "only XMP"])
def test_a_jpeg_without_an_orientation_gets_one(what: str) -> None:
    options: dict[str, Any] = {}
    if what == "no orientation":
        options["exif"] = exif(None)
    if what == "little-endian":
        own = exif(None)
        own.endian = "<"
        options["exif"] = own.tobytes()
    if what == "only XMP":
        options["xmp"] = XMP
    before = encoded(picture(), "JPEG", **options)
    after = turn_file(before, 1)
    np.testing.assert_array_equal(shown(after), np.rot90(shown(before)))
    assert data_of(after) == data_of(before)
    with Image.open(io.BytesIO(before)) as old, Image.open(io.BytesIO(after)) as new:
        found, kept = new.getexif(), old.getexif()
        tags = tags_of(new.info["exif"])
        assert tags == sorted(tags), "EXIF wants them in order"
        assert found.get_ifd(ExifTags.IFD.GPSInfo) == kept.get_ifd(ExifTags.IFD.GPSInfo)
        pointers = (ORIENTATION, ExifTags.IFD.GPSInfo)
        assert {t: v for t, v in found.items() if t not in pointers} == {
            t: v for t, v in kept.items() if t not in pointers
        }


def test_a_jpeg_with_damaged_exif_is_refused() -> None:
    before = encoded(picture(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\xff\0")
    with pillow_warnings_ignored(), pytest.raises(LossError, match="its EXIF data are damaged"):
        turn_file(before, 1)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_a_png_is_turned_to_the_same_pixels_and_keeps_what_is_beside_them(mode: str) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "kept")
    text.add(b"gAMA", struct.pack(">I", 45455))
    options = {"transparency": 7} if mode == "P" else {}
    before = encoded(
        picture(mode),
        "PNG",
        exif=exif(6),
        pnginfo=text,
        dpi=(300, 150),
        icc_profile=b"p",
        **options,
    )
    for quarter_turns in (1, 2, 3):
        after = turn_file(before, quarter_turns)
        with Image.open(io.BytesIO(before)) as old, Image.open(io.BytesIO(after)) as new:
            stored = np.asarray(old)
            np.testing.assert_array_equal(np.asarray(new), np.rot90(stored, 3 + quarter_turns))
            assert new.getexif()[ORIENTATION] == 1
            assert new.getexif()[ExifTags.Base.Make] == "A camera"
            assert new.info["Comment"] == "kept"
            for name in ("icc_profile", "gamma", "transparency"):
                assert new.info.get(name) == old.info.get(name)
            dpi = tuple(round(each) for each in new.info["dpi"])
            assert dpi == ((300, 150) if quarter_turns == 2 else (150, 300))
            assert new.mode == old.mode
            assert new.getpalette() == old.getpalette()


def deep_png() -> bytes:
    """16 bits per channel, which Pillow reads as 8."""
    rows = b"".join(b"\0" + bytes(range(18)) for _ in range(2))
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", 3, 2, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    chunks = [
        struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_what_would_lose_something_is_refused_with_the_reason() -> None:
    frames = {"save_all": True, "append_images": [picture(width=23).rotate(180)]}
    cases = {
        "its kind of PNG": deep_png(),
        "holds several pictures": encoded(picture(), "PNG", **frames),
        "WEBP is not turned without loss": encoded(picture(), "WEBP"),
        "GIF is not turned without loss": encoded(picture("P"), "GIF"),
    }
    for reason, content in cases.items():
        with pytest.raises(LossError, match=reason):
            turn_file(content, 1)
    with pytest.raises(LossError, match="several pictures"):
        turn_by_encoding(cases["holds several pictures"], 1)


def deep_tiff() -> bytes:
    return encoded(Image.fromarray(np.arange(6, dtype=np.uint16).reshape(2, 3) * 9000), "TIFF")


@pytest.mark.parametrize("content", [deep_png(), deep_tiff()], ids=["png", "tiff"])
def test_more_than_8_bits_are_not_encoded_anew_as_8(content: bytes) -> None:
    with pytest.raises(LossError, match="more than 8 bits"):
        turn_by_encoding(content, 1)


@pytest.mark.parametrize("kind", ["WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_other_formats_are_encoded_anew_without_another_pixel(kind: str) -> None:
    options: dict[str, dict[str, Any]] = {
        "WEBP": {"lossless": True, "exif": exif(6)},
        "TIFF": {"exif": exif(6)},
    }
    before = encoded(picture("P" if kind == "GIF" else "RGB"), kind, **options.get(kind, {}))
    after = turn_by_encoding(before, 3)
    with Image.open(io.BytesIO(after)) as new:
        assert new.format == kind
        found = np.asarray(ImageOps.exif_transpose(new).convert("RGB"))
    with Image.open(io.BytesIO(before)) as old:
        wanted = np.asarray(ImageOps.exif_transpose(old).convert("RGB"))
    np.testing.assert_array_equal(found, np.rot90(wanted, 3))
