from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from data import loaders
from data.loaders import ALL, Batches, Share, epoch_order, eval_batches
from data.prepared import PreparedData
from data.records import DatasetError
from data.splits import Subset

MakePrepared = Callable[..., PreparedData]
CPU = torch.device("cpu")


@pytest.fixture
def subset(make_prepared: MakePrepared) -> Subset:
    """17 of 23 images, 7 px, three classes."""
    return Subset(make_prepared(23, side=7).train, np.arange(2, 19))


def make_batches(
    subset: Subset,
    *,
    batch_size: int = 5,
    side: int = 7,
    flip: bool = False,
    seed: int = 0,
    crop_scale: float | None = None,
    keep_on_device: bool = False,
    colour_jitter: float = 0.0,
    greyscale: float = 0.0,
    share: Share = ALL,
) -> Batches:
    return Batches(
        subset,
        batch_size=batch_size,
        side=side,
        flip=flip,
        seed=seed,
        device=CPU,
        crop_scale=crop_scale,
        keep_on_device=keep_on_device,
        colour_jitter=colour_jitter,
        greyscale=greyscale,
        share=share,
    )


def as_bytes(images: torch.Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def test_an_epochs_order_is_a_permutation_that_changes_with_seed_and_epoch() -> None:
    orders = [epoch_order(101, seed, epoch).tolist() for seed in range(3) for epoch in range(3)]
    assert all(sorted(order) == list(range(101)) for order in orders)
    assert len({tuple(order) for order in orders}) == 9


def test_an_epochs_order_is_the_same_on_every_machine() -> None:
    assert epoch_order(11, seed=0, epoch=0).tolist() == [3, 5, 1, 2, 9, 10, 0, 7, 8, 4, 6]


def test_every_image_takes_every_place() -> None:
    places = np.array([epoch_order(5, 0, epoch) for epoch in range(2000)])
    for place in range(5):
        counts = np.bincount(places[:, place], minlength=5)
        assert ((counts - 400) ** 2 / 400).sum() < 23.5  # chi-square, 4 degrees, p = 0.0001


def test_an_epoch_shows_each_image_at_most_once_and_drops_the_rest(subset: Subset) -> None:
    batches = make_batches(subset)
    assert batches.steps_per_epoch == 3
    seen = [batch.ids.tolist() for batch in batches.epoch(0)]
    assert [len(ids) for ids in seen] == [5, 5, 5]
    flat = [number for ids in seen for number in ids]
    assert len(set(flat)) == 15
    assert set(flat) <= set(range(2, 19))
    dropped = {tuple(set(range(2, 19)) - set(_ids(batches, epoch))) for epoch in range(10)}
    assert len(dropped) > 5, "the same images are left out every time"


def _ids(batches: Batches, epoch: int) -> list[int]:
    return [int(number) for batch in batches.epoch(epoch) for number in batch.ids]


def test_images_labels_and_ids_belong_together(subset: Subset) -> None:
    for batch in make_batches(subset).epoch(3):
        assert batch.epoch == 3
        assert batch.images.dtype == torch.float32
        assert batch.images.shape == (5, 3, 7, 7)
        assert np.array_equal(as_bytes(batch.images), subset.split.gather(batch.ids))
        assert batch.labels is not None
        assert batch.labels.tolist() == [int(number) % 3 for number in batch.ids]


@pytest.mark.parametrize("crop_scale", [None, 0.3])
@pytest.mark.parametrize("keep_on_device", [False, True])
def test_an_epoch_entered_in_the_middle_goes_on_the_same(
    subset: Subset, crop_scale: float | None, keep_on_device: bool
) -> None:
    batches = make_batches(
        subset, side=5, flip=True, seed=9, crop_scale=crop_scale, keep_on_device=keep_on_device
    )
    whole = list(batches.epoch(2))
    for start_step in range(4):
        rest = list(batches.epoch(2, start_step))
        assert len(rest) == 3 - start_step
        for expected, batch in zip(whole[start_step:], rest, strict=True):
            assert batch.ids.tolist() == expected.ids.tolist()
            assert torch.equal(batch.images, expected.images)


def test_augmentation_does_not_depend_on_the_batch(subset: Subset) -> None:
    def by_id(batch_size: int) -> dict[int, torch.Tensor]:
        batches = make_batches(
            subset, batch_size=batch_size, side=4, flip=True, colour_jitter=0.5, greyscale=0.5
        )
        return {
            int(number): image
            for batch in batches.epoch(1)
            for number, image in zip(batch.ids, batch.images, strict=True)
        }

    alone, together = by_id(1), by_id(17)
    assert alone.keys() == together.keys() == set(range(2, 19))
    for number, image in alone.items():
        assert torch.equal(image, together[number])


@pytest.mark.parametrize("crop_scale", [None, 0.3])
def test_the_parts_of_a_batch_are_the_batch(subset: Subset, crop_scale: float | None) -> None:
    changes: dict[str, Any] = {"flip": True, "colour_jitter": 0.4, "greyscale": 0.3}
    changes |= {"batch_size": 6, "side": 5, "crop_scale": crop_scale}
    whole = list(make_batches(subset, **changes).epoch(3, start_step=1))
    parts = [make_batches(subset, **changes, share=Share(n, 3)).epoch(3, 1) for n in range(3)]
    for batch, *shares in zip(whole, *parts, strict=True):
        assert batch.ids.tolist() == np.concatenate([each.ids for each in shares]).tolist()
        images = torch.cat([each.images for each in shares])
        # Resizing rounds by how many images there are, on some processors.
        torch.testing.assert_close(images, batch.images, rtol=0, atol=1e-6)


def test_crops_come_from_everywhere_and_half_of_them_are_mirrored(subset: Subset) -> None:
    batches = make_batches(subset, batch_size=17, side=5, flip=True)
    found = np.zeros((3, 3, 2), dtype=int)
    for epoch in range(40):
        (batch,) = batches.epoch(epoch)
        for image, crop in zip(subset.split.gather(batch.ids), as_bytes(batch.images), strict=True):
            places = [
                (top, left, mirrored)
                for top in range(3)
                for left in range(3)
                for mirrored, candidate in enumerate((crop, crop[:, ::-1]))
                if np.array_equal(image[top : top + 5, left : left + 5], candidate)
            ]
            assert len(places) == 1
            found[places[0]] += 1
    expected = found.sum() / 18
    assert ((found - expected) ** 2 / expected).sum() < 44  # chi-square, 17 degrees, p = 0.0003


def test_colours_change_as_often_and_as_far_as_asked_for(subset: Subset) -> None:
    """The mean of an image follows its brightness, as contrast and saturation leave it alone."""
    grey = jittered = 0
    for seed in range(40):
        (batch,) = make_batches(subset, batch_size=17, greyscale=0.5, seed=seed).epoch(0)
        grey += int((batch.images == batch.images[:, :1]).flatten(1).all(dim=1).sum())
    assert grey / (40 * 17) == pytest.approx(0.5, abs=0.06), "three standard errors"
    for seed in range(4):
        (batch,) = make_batches(subset, batch_size=17, colour_jitter=0.5, seed=seed).epoch(0)
        original = subset.split.gather(batch.ids).astype(float)
        factors = as_bytes(batch.images).mean(axis=(1, 2, 3)) / original.mean(axis=(1, 2, 3))
        assert 0.45 <= factors.min() < 0.8
        assert factors.max() <= 1.55
        jittered += len(set(factors.round(3)))
    assert jittered > 60, "each image by factors of its own"


def test_resized_crops_show_squares_of_every_area_from_everywhere(
    make_prepared: MakePrepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    subset = Subset(make_prepared(2000, side=64).train, np.arange(2000))
    boxes: list[np.ndarray[tuple[int, ...], np.dtype[np.int64]]] = []

    def note(
        images: torch.Tensor,
        tops: torch.Tensor,
        lefts: torch.Tensor,
        sides: torch.Tensor,
        side: int,
    ) -> torch.Tensor:
        boxes.append(torch.stack([tops, lefts, sides]).numpy())
        return images[:, :, :side, :side]

    monkeypatch.setattr(loaders, "resized_crop", note)
    list(make_batches(subset, batch_size=500, side=8, crop_scale=0.2).epoch(0))
    tops, lefts, sides = np.concatenate(boxes, axis=1)
    assert min(tops.min(), lefts.min()) >= 0
    assert max((tops + sides).max(), (lefts + sides).max()) == 64
    area = (sides / 64) ** 2
    assert area.min() == pytest.approx(0.2, abs=0.02)
    for values in (
        (area - 0.2) / 0.8,
        (tops + 0.5) / (65 - sides),
        (lefts + 0.5) / (65 - sides),
    ):
        # A mean and a spread of uniform numbers from 0 to 1, within 4 standard errors and rounding.
        assert values.mean() == pytest.approx(0.5, abs=0.03)
        assert values.std() == pytest.approx(12**-0.5, abs=0.02)
    assert abs(np.corrcoef(tops / (65 - sides), lefts / (65 - sides))[0, 1]) < 0.1


def test_a_resized_crop_of_an_image_does_not_depend_on_the_batch(subset: Subset) -> None:
    alone, together = (
        {
            int(number): image
            for batch in make_batches(subset, batch_size=size, side=4, crop_scale=0.3).epoch(1)
            for number, image in zip(batch.ids, batch.images, strict=True)
        }
        for size in (1, 17)
    )
    assert alone.keys() == together.keys()
    for number, image in alone.items():
        torch.testing.assert_close(image, together[number])


def test_images_kept_on_the_device_make_the_same_batches_and_are_read_once(
    subset: Subset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Entered in the middle of an epoch, as a resume does, and with images left out each time."""
    read: list[int] = []
    original = Subset.gather

    def counted(self: Subset, positions: Any) -> Any:
        read.extend(positions.tolist())
        return original(self, positions)

    plain = make_batches(subset, batch_size=3, side=5, flip=True)
    expected = [list(plain.epoch(epoch, 2 * (epoch == 0))) for epoch in range(4)]
    monkeypatch.setattr(Subset, "gather", counted)
    kept = make_batches(subset, batch_size=3, side=5, flip=True, keep_on_device=True)
    reads = []
    for epoch, batches in enumerate(expected):
        for batch, other in zip(kept.epoch(epoch, 2 * (epoch == 0)), batches, strict=True):
            assert torch.equal(batch.images, other.images)
            assert batch.ids.tolist() == other.ids.tolist()
        reads.append(len(read))
        read.clear()
    assert reads[0] == 9, "three of five batches, each image once"
    assert sum(reads[1:]) < 45, "batches of images that are there are not read"
    assert reads[-1] <= 6, "at most a batch for each of the two images left out each time"


def test_evaluation_shows_every_image_once_in_order_and_its_middle(subset: Subset) -> None:
    batches = list(eval_batches(subset, batch_size=4, side=5, device=CPU))
    assert [len(batch.ids) for batch in batches] == [4, 4, 4, 4, 1]
    ids = np.concatenate([batch.ids for batch in batches])
    assert ids.tolist() == list(range(2, 19))
    images = np.concatenate([as_bytes(batch.images) for batch in batches])
    assert np.array_equal(images, subset.split.gather(ids)[:, 1:6, 1:6])


def test_images_without_labels_make_batches_without_labels(make_prepared: MakePrepared) -> None:
    split = make_prepared(7, classes=None).train
    subset = Subset(split, np.arange(7))
    assert next(make_batches(subset, side=5).epoch(0)).labels is None
    assert next(eval_batches(subset, 5, 5, CPU)).labels is None


def test_too_few_images_for_one_batch_are_refused(subset: Subset) -> None:
    with pytest.raises(DatasetError, match=r"batch_size is 18, and there are 17\."):
        make_batches(subset, batch_size=18)


def test_images_smaller_than_the_crop_are_refused(subset: Subset) -> None:
    with pytest.raises(DatasetError, match=r"model\.image_size \(8 px\), these are 7 px"):
        make_batches(subset, side=8)
    with pytest.raises(DatasetError, match=r"model\.image_size \(8 px\)"):
        next(eval_batches(subset, 4, 8, CPU))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_on_a_gpu_hold_the_same_as_on_the_cpu(subset: Subset) -> None:
    device = torch.device("cuda")
    there = Batches(subset, batch_size=5, side=5, flip=True, seed=0, device=device)
    for batch, expected in zip(
        there.epoch(0), make_batches(subset, side=5, flip=True).epoch(0), strict=True
    ):
        assert batch.images.is_cuda
        assert torch.equal(batch.images.cpu(), expected.images)
