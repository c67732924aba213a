"""Noise in files like others: everything is copied but what they show."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image, JpegImagePlugin

from data.decode import decode_square, orientation_of
from data.lookalikes import FileKind, LookalikeSource, kind_of, kinds_in_words, kinds_of
from data.records import DatasetError, Record


def file_of(format: str, mode: str = "RGB", **options: Any) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = options.pop("orientation", 1)
    file = io.BytesIO()
    Image.new(mode, (30, 20), 80).save(file, format, exif=exif, **options)
    return file.getvalue()


def only(source: LookalikeSource) -> Image.Image:
    (record,) = source.records("train")
    assert isinstance(record.image, bytes)
    return Image.open(io.BytesIO(record.image))


@pytest.mark.parametrize(
    "original",
    [
        file_of("JPEG", quality=40, subsampling=2),
        file_of("JPEG", quality=97, subsampling=0, orientation=6),
        file_of("JPEG", "L", quality=70, orientation=3),
        file_of("PNG", orientation=8),
        file_of("PNG", "L"),
        file_of("WEBP", lossless=True),
        file_of("WEBP", quality=50),
        file_of("GIF"),
        file_of("BMP"),
        file_of("TIFF"),
        file_of("TIFF", orientation=6),
    ],
    ids=range(11),
)
def test_a_lookalike_is_made_as_the_original_was(original: bytes) -> None:
    kind = kind_of(original)
    assert kind is not None
    made, expected = (
        only(LookalikeSource([kind], train=1, test=0, seed=0)),
        Image.open(io.BytesIO(original)),
    )
    assert (made.size, made.format, made.mode) == (expected.size, expected.format, expected.mode)
    assert orientation_of(made) == orientation_of(expected)
    assert kind_of(original) == kind
    if isinstance(expected, JpegImagePlugin.JpegImageFile):
        assert isinstance(made, JpegImagePlugin.JpegImageFile)
        assert made.quantization == expected.quantization
        assert JpegImagePlugin.get_sampling(made) == JpegImagePlugin.get_sampling(expected)
    assert np.asarray(made.convert("L")).std() > 8, "but it shows noise"


def test_pictures_that_are_drawn_are_drawn() -> None:
    source = LookalikeSource([FileKind(9, 5, None)], train=1, test=0, seed=0)
    (record,) = source.records("train")
    assert isinstance(record.image, Image.Image)
    assert record.image.size == (9, 5)
    assert kind_of(record.image) == FileKind(9, 5, None)


def test_files_larger_than_the_noise_repeat_it_without_a_seam() -> None:
    source = LookalikeSource([FileKind(1500, 9, "PNG")], train=1, test=0, seed=0)
    pixels = np.asarray(only(source)).astype(int)
    assert (pixels[:, :476] == pixels[:, 1024:]).all()
    steps = np.abs(np.diff(pixels, axis=1)).mean(axis=(0, 2))
    assert steps.max() < 6 * steps.mean(), "a seam is a step larger than all others"


def test_each_noise_image_is_another_and_the_same_every_time() -> None:
    kinds = [FileKind(24, 24, "PNG"), FileKind(24, 24, None)]
    source, again = (LookalikeSource(kinds, train=4, test=4, seed=3) for _ in range(2))
    squares = [
        [decode_square(record.image, 24) for record in each.records(split)]
        for each in (source, again)
        for split in ("train", "test")
    ]
    assert np.array_equal(squares[:2], squares[2:])
    flat = np.concatenate(squares[:2]).reshape(8, -1)
    assert len(np.unique(flat, axis=0)) == 8
    last = next(iter(source.records("train", 3)))
    assert np.array_equal(decode_square(last.image, 24).ravel(), flat[3])


def test_broken_files_are_left_out_and_nothing_but_those_is_an_error() -> None:
    records = [Record("a", b"no picture", None), Record("b", file_of("PNG"), None)]
    assert [kind.format for kind in kinds_of(records)] == ["PNG"]
    with pytest.raises(DatasetError, match="prepare-data"):
        kinds_of(records[:1])


def test_files_are_described_in_words() -> None:
    kinds = [FileKind(30, 20, "PNG"), FileKind(10, 90, "JPEG"), FileKind(30, 20, "JPEG")]
    assert kinds_in_words(kinds) == "2 JPEG, 1 PNG; 30 to 90 px on the long side"
    assert kinds_in_words(kinds[:1]) == "1 PNG; 30 px on the long side"
