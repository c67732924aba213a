from io import BytesIO

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL.JpegImagePlugin import JpegImageFile

from data import jpeg
from data.canary import NoiseSource
from data.decode import decode_square
from data.records import DatasetError


def photo_like(side: int) -> NDArray[np.uint8]:
    """Noise with the spectrum of a photo, and grey: noise in colours is what JPEG is worst at."""
    (record,) = NoiseSource(train=1, test=0, long_side_px=2 * side, seed=0).records("train")
    return decode_square(record.image, side)[..., [0, 0, 0]]


def psnr(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio, in decibels."""
    return float(10 * np.log10(255**2 / ((one.astype(float) - other) ** 2).mean()))


@pytest.mark.parametrize("side", [2, 4, 8, 10, 36, 160, 180])
def test_an_image_comes_back_nearly_as_it_was(side: int) -> None:
    image = photo_like(side)
    back = jpeg.decode(jpeg.encode(image), side)
    assert back.shape == image.shape
    assert back.dtype == np.uint8
    assert psnr(image, back) > 35


def test_places_and_colours_are_not_moved() -> None:
    image = np.zeros((36, 36, 3), dtype=np.uint8)
    image[:18, :, 0], image[:, 18:, 2] = 255, 255
    back = jpeg.decode(jpeg.encode(image), 36)
    assert np.abs(back.astype(int) - image).max() < 40
    assert np.abs(back.astype(int) - image).mean() < 3


def test_tables_in_the_file_have_no_direction() -> None:
    with JpegImageFile(BytesIO(jpeg.encode(photo_like(16)))) as picture:
        tables = [np.reshape(table, (8, 8)) for table in picture.quantization.values()]
        assert {factors[1:3] for factors in picture.layer} == {(1, 1)}, "colours lose resolution"
    assert len(tables) == 2
    for table in tables:
        assert np.array_equal(table, table.T)
    assert tables[0].tolist() != tables[1].tolist()
    # The standard luminance table at quality 95 (annex K.1, scaled) starts 2 1 1 2 2 4 5 6 and
    # its first column 2 1 1 1 2 2 5 7.
    assert tables[0][0].tolist() == [2, 1, 1, 2, 2, 3, 5, 7]


@pytest.mark.parametrize("side", [8, 36, 178])
def test_the_grid_of_blocks_lies_around_the_centre(side: int) -> None:
    rows = jpeg._reflected(side)
    assert len(rows) % jpeg.BLOCK_PX == 0
    assert np.array_equal(rows, side - 1 - rows[::-1])


@pytest.mark.parametrize("side", [1, 37, 181])
def test_an_odd_side_is_refused(side: int) -> None:
    with pytest.raises(DatasetError, match=rf"even side, got {side} px.*data\.format=raw"):
        jpeg.check_side(side)


def test_a_damaged_file_or_another_size_is_an_error() -> None:
    content = jpeg.encode(photo_like(16))
    with pytest.raises(OSError, match="truncated"):
        jpeg.decode(content[:-40], 16)
    with pytest.raises(OSError, match="cannot identify"):
        jpeg.decode(b"", 16)
    with pytest.raises(ValueError, match="another size"):
        jpeg.decode(content, 32)
