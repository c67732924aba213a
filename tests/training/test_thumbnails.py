import base64
import io

import numpy as np
from PIL import Image

from training.thumbnails import lit, picture_uri


def pixels_of(uri: str) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    head, _, body = uri.partition(",")
    assert head == "data:image/webp;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(body))).convert("RGB"))


def test_a_small_image_keeps_its_size_and_a_large_one_is_made_smaller() -> None:
    image = np.zeros((32, 32, 3), dtype=np.uint8)
    image[:16] = (250, 120, 10)
    found = pixels_of(picture_uri(image))
    assert found.shape == (32, 32, 3)
    assert np.abs(found.astype(int) - image).mean() < 6
    large = np.repeat(np.repeat(image, 7, axis=0), 7, axis=1)
    assert pixels_of(picture_uri(large)).shape == (96, 96, 3)


def test_what_is_looked_at_is_bright_and_the_rest_dark_and_grey() -> None:
    image = np.full((24, 24, 3), (200, 100, 50), dtype=np.uint8)
    attention = np.full((3, 3), 0.05, dtype=np.float32)
    attention[0, 2] = 0.5
    found = lit(image, attention, "in the last block")
    pixels = pixels_of(found.uri).astype(int)
    assert np.abs(pixels[5, -5] - (200, 100, 50)).max() < 15
    assert pixels[-10:, :10].max() < 70
    assert np.ptp(pixels[-10:, :10].mean(axis=(0, 1))) < 25
    assert (
        "in the last block: from 5.0% to 50.0% a patch, most in row 1, column 3 of 3" in found.alt
    )
