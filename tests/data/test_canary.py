"""Nothing on the way from the file to the network may tell which way up an image was."""

import io
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from torch.nn import functional

from data import jpeg, transforms
from data.canary import NoiseSource, marks, probe_rotation
from data.decode import decode_square
from data.drawn import draw
from data.loaders import Batch, Batches, eval_batches
from data.prepare import prepare
from data.prepared import PreparedData, PreparedSplit
from data.records import Split
from data.rotation import make_rotation_batch
from data.shards import PixelFormat
from data.splits import Subset

CHANCE = 0.25
TOLERANCE = 0.03
"""3.1 standard errors at 2,000 test images: sqrt(0.25 * 0.75 / 2000) = 0.0097. The four turns of an
image count as one, because a classifier that treats them alike is right or wrong on all of them."""

Rotated = tuple[NDArray[np.float64], NDArray[np.int64]]


def whole(split: PreparedSplit | None) -> Subset:
    assert split is not None
    return Subset(split, np.arange(len(split), dtype=np.int64))


def rotated(batches: list[Batch]) -> Rotated:
    pairs = [make_rotation_batch(batch.images) for batch in batches]
    images, labels = zip(*pairs, strict=True)
    return marks(torch.cat(images).numpy()), torch.cat(labels).numpy()


def accuracy_after_the_data_path(
    directory: Path,
    *,
    stored: int = 36,
    crop: int = 32,
    pixel_format: PixelFormat = "raw",
    crop_scale: float | None = None,
) -> float:
    """Noise files through preparation, training and test batches, and the rotation.

    Args:
        directory: For the prepared images.
        stored: Side of the prepared images, in pixels.
        crop: Side of what is cut out of them, in pixels.
        pixel_format: How they are stored.
        crop_scale: Smallest part of their area in a resized crop, of test images too; none for
            crops of that side.
    """
    source = NoiseSource(train=1000, test=2000, long_side_px=60, seed=0)
    prepare(
        source,
        directory,
        side=stored,
        report=lambda done, total: None,
        workers=2,
        pixel_format=pixel_format,
    )
    prepared = PreparedData.open(directory)
    cpu = torch.device("cpu")
    batches = [
        Batches(
            whole(split),
            batch_size=100,
            side=crop,
            flip=True,
            seed=0,
            device=cpu,
            crop_scale=crop_scale,
        )
        for split in (prepared.train, prepared.test)
    ]
    train = list(batches[0].epoch(0))
    if crop_scale is None:
        test = list(eval_batches(whole(prepared.test), batch_size=99, side=crop, device=cpu))
    else:  # a mark of the resizing would show in images that were resized so
        test = list(batches[1].epoch(0))
    return probe_rotation(rotated(train), rotated(test))


@pytest.mark.slow
def test_noise_comes_through_without_a_mark(tmp_path: Path) -> None:
    assert accuracy_after_the_data_path(tmp_path) == pytest.approx(CHANCE, abs=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize(("stored", "crop"), [(36, 32), (60, 24)])
def test_noise_comes_through_resized_crops_without_a_mark(
    tmp_path: Path, stored: int, crop: int
) -> None:
    """Mostly enlarged, and mostly shrunk."""
    accuracy = accuracy_after_the_data_path(tmp_path, stored=stored, crop=crop, crop_scale=0.2)
    assert accuracy == pytest.approx(CHANCE, abs=TOLERANCE)


@pytest.mark.slow
def test_a_crop_that_is_resized_along_one_axis_only_leaves_a_mark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = transforms._resize_weights
    calls = itertools.count()

    def nearest_for_rows(starts: Any, sides: Any, size: int, side: int) -> torch.Tensor:
        weights = original(starts, sides, size, side)
        if next(calls) % 2 == 0:  # columns
            return weights
        return functional.one_hot(weights.argmax(dim=2), size).float()

    monkeypatch.setattr(transforms, "_resize_weights", nearest_for_rows)
    accuracy = accuracy_after_the_data_path(tmp_path, crop_scale=0.2)
    assert accuracy > CHANCE + TOLERANCE


@pytest.mark.slow
def test_squashing_instead_of_cropping_leaves_a_mark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.decode.centre_crop_square", lambda image: image)
    assert accuracy_after_the_data_path(tmp_path) > CHANCE + TOLERANCE


@pytest.mark.slow
def test_jpeg_at_the_final_size_leaves_a_mark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode_through_jpeg(image: bytes, side: int) -> NDArray[np.uint8]:
        file = io.BytesIO()
        Image.fromarray(decode_square(image, side)).save(file, "JPEG", quality=85)
        return np.asarray(Image.open(file))

    monkeypatch.setattr("data.decoding_pool.decode_square", decode_through_jpeg)
    assert accuracy_after_the_data_path(tmp_path) > CHANCE + TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(("stored", "crop"), [(32, 32), (36, 32), (36, 36)])
def test_noise_comes_through_the_jpeg_format_without_a_mark(
    tmp_path: Path, stored: int, crop: int
) -> None:
    """With blocks that fit the image, that are cut by random crops, and that do not fit."""
    accuracy = accuracy_after_the_data_path(tmp_path, stored=stored, crop=crop, pixel_format="jpeg")
    assert accuracy == pytest.approx(CHANCE, abs=TOLERANCE)


@pytest.mark.slow
def test_the_standard_tables_leave_a_mark_at_the_same_quality(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG", quality=jpeg.QUALITY)
    file.seek(0)
    standard = list(JpegImageFile(file).quantization.values())
    monkeypatch.setattr(jpeg, "symmetric_tables", lambda: standard)
    accuracy = accuracy_after_the_data_path(tmp_path, stored=32, pixel_format="jpeg")
    assert accuracy > CHANCE + TOLERANCE


@pytest.mark.slow
def test_a_grid_of_blocks_that_begins_at_a_corner_leaves_a_mark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jpeg, "_reflected", np.arange)
    accuracy = accuracy_after_the_data_path(tmp_path, crop=36, pixel_format="jpeg")
    assert accuracy > CHANCE + TOLERANCE


@pytest.mark.slow
def test_drawings_without_their_objects_show_no_up() -> None:
    def images(split: Split, count: int) -> Rotated:
        drawn = np.stack([np.asarray(draw(i, split, 32, objects=False)) for i in range(count)])
        batch = torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 127.5 - 1
        turned, labels = make_rotation_batch(batch)
        return marks(turned.numpy()), labels.numpy()

    train, test = images("train", 1000), images("test", 2000)
    assert probe_rotation(train, test) == pytest.approx(CHANCE, abs=TOLERANCE)
