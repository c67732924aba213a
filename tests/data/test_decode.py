import io
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw, _imaging

from data.decode import UndecodableError, decode_square
from data.decoding_pool import pillow_warnings_ignored

ORIENTATION = 0x0112
"""Number of the EXIF tag that says how the camera was held."""


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with pillow_warnings_ignored():
        yield


def encode(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def quarters() -> Image.Image:
    """16 x 16 px: red and green above, blue and white below."""
    picture = Image.new("RGB", (16, 16), "white")
    draw = ImageDraw.Draw(picture)
    for colour, left, top in (("red", 0, 0), ("lime", 8, 0), ("blue", 0, 8)):
        draw.rectangle((left, top, left + 7, top + 7), fill=colour)
    return picture


def corners(image: NDArray[np.uint8]) -> list[str]:
    """Names of the colours in reading order."""
    names = {(1, 0, 0): "r", (0, 1, 0): "g", (0, 0, 1): "b", (1, 1, 1): "w", (0, 0, 0): "k"}
    last = len(image) - 1
    picked = [image[row, column] > 127 for row in (0, last) for column in (0, last)]
    return [names[int(r), int(g), int(b)] for r, g, b in picked]


# The EXIF standard: which edge of the stored picture is the top, and which the left, of the scene.
UPRIGHT = {
    1: "rgbw",
    2: "grwb",
    3: "wbgr",
    4: "bwrg",
    5: "rbgw",
    6: "brwg",
    7: "wgbr",
    8: "gwrb",
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", list(UPRIGHT))
def test_the_orientation_of_the_camera_is_applied(
    quarters: Image.Image, orientation: int, kind: str
) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    image = decode_square(encode(quarters, kind, exif=exif), side=8)
    assert "".join(corners(image)) == UPRIGHT[orientation]


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_is_ignored(
    quarters: Image.Image, orientation: int
) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    assert corners(decode_square(encode(quarters, "JPEG", exif=exif), 8)) == list("rgbw")


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize(
    "exif",
    [b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0nonsense", b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01"],
    ids=["offset", "nonsense", "cut"],
)
def test_damaged_exif_does_not_cost_the_image(
    quarters: Image.Image, exif: bytes, kind: str
) -> None:
    assert corners(decode_square(encode(quarters, kind, exif=exif), 8)) == list("rgbw")


def test_an_orientation_beside_a_damaged_tag_is_applied(quarters: Image.Image) -> None:
    tags = [(ORIENTATION, 3, 1, b"\x06\0\0\0"), (0x011A, 2, 4, b"abc\0")]  # resolution as text
    entries = b"".join(struct.pack("<HHI4s", *tag) for tag in tags)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + entries + bytes(4)
    image = decode_square(encode(quarters, "JPEG", exif=exif), side=8)
    assert "".join(corners(image)) == UPRIGHT[6]


def test_a_turned_photo_is_cropped_after_it_was_set_upright() -> None:
    # The margins are odd: the middle of the lying photo would be another one.
    noise = np.random.default_rng(0).integers(0, 256, (12, 7, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[ORIENTATION] = 8  # to be shown turned counter-clockwise
    lying = Image.fromarray(np.rot90(noise, -1).copy())
    upright = decode_square(Image.fromarray(noise), 7)
    assert np.array_equal(upright, noise[2:9])
    assert np.array_equal(decode_square(encode(lying, "PNG", exif=exif), 7), upright)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "YCbCr", "1", "I;16"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    if mode == "I;16":
        picture = Image.fromarray(np.full((9, 7), 204 * 257, dtype=np.uint16))
    else:
        picture = Image.new("RGB", (7, 9), (204, 204, 204)).convert(mode)
    kind = "TIFF" if mode in {"CMYK", "YCbCr"} else "PNG"
    image = decode_square(encode(picture, kind), side=3)
    assert image.shape == (3, 3, 3)
    assert image.dtype == np.uint8
    expected = image if mode == "1" else np.full((3, 3, 3), 204)
    np.testing.assert_allclose(image, expected, atol=3)


def test_cmyk_photos_have_the_right_colours() -> None:
    picture = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # magenta and yellow make red
    red, green, blue = decode_square(encode(picture, "JPEG"), 2)[0, 0].tolist()
    assert red > 200
    assert max(green, blue) < 60


def test_a_palette_with_transparency_is_read_without_complaint() -> None:
    picture = Image.new("P", (6, 6), 1)
    picture.putpalette([0, 0, 0, 10, 200, 30] + [0] * 3 * 254)
    image = decode_square(encode(picture, "PNG", transparency=bytes([0, 128])), 2)
    assert image[0, 0].tolist() == [10, 200, 30]


def test_an_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "PNG", "WEBP"):
        content = encode(frames[0], kind, save_all=True, append_images=frames[1:])
        assert set(corners(decode_square(content, 4))) == {"r"}, kind


@pytest.mark.parametrize("size", [(1, 1), (1, 1000), (1000, 1), (3, 2)])
def test_tiny_and_extreme_shapes_become_squares(size: tuple[int, int]) -> None:
    image = decode_square(Image.new("RGB", size, (10, 20, 30)), side=5)
    assert image.reshape(-1, 3).tolist() == [[10, 20, 30]] * 25


def test_the_content_counts_and_not_the_name(tmp_path: Path, quarters: Image.Image) -> None:
    path = tmp_path / "n02105855_2933.JPEG"  # the one of this name in ImageNet is a PNG file
    path.write_bytes(encode(quarters, "PNG"))
    assert corners(decode_square(path, 8)) == list("rgbw")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><title>404</title>", "not an image of the kinds JPEG, PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image of the kinds"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "not an image of the kinds"),
    ],
    ids=["empty", "html", "postscript", "header only"],
)
def test_what_is_no_image_is_refused_with_a_reason(content: bytes, reason: str) -> None:
    with pytest.raises(UndecodableError, match=reason) as error:
        decode_square(content, 8)
    assert "\n" not in str(error.value)
    assert "0x" not in str(error.value), "an address would make two runs differ"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_file_cut_short_is_refused(quarters: Image.Image, kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    content = encode(Image.fromarray(noise), kind)
    with pytest.raises(UndecodableError):
        decode_square(content[: len(content) // 2], 8)


def test_a_decompression_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(UndecodableError, match="more than 120 million pixels"):
        decode_square(encode(Image.new("1", (11, 11))), 8)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UndecodableError, match="FileNotFoundError"):
        decode_square(tmp_path / "gone.jpg", 8)


def test_shrinking_rounds_once_and_treats_rows_and_columns_alike() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (37, 37, 3), dtype=np.uint8)
    upright = decode_square(Image.fromarray(noise), 16)
    for k in (1, 2, 3):
        turned = decode_square(Image.fromarray(np.rot90(noise, k).copy()), 16)
        np.testing.assert_array_equal(np.rot90(turned, -k), upright)


def test_a_picture_in_several_blocks_of_memory_is_read_as_in_one() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    expected = decode_square(Image.fromarray(noise), 16)
    before = _imaging.get_block_size()
    _imaging.set_block_size(4096)  # as the environment variable PILLOW_BLOCK_SIZE does
    try:
        picture = Image.fromarray(noise)
        with pytest.raises(ValueError, match="not contiguous"):
            pyarrow.array(picture)
        np.testing.assert_array_equal(decode_square(picture, 16), expected)
    finally:
        _imaging.set_block_size(before)
