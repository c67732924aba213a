"""Batches in an order that is a function of (seed, epoch), and so can be resumed anywhere.

Dimension key: B = images in the batch, S = side of the crop, P = side of the prepared images, in
pixels.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.randomness import order_by, uniform
from data.records import DatasetError
from data.splits import Subset
from data.transforms import crop, flip, normalise, resized_crop


@dataclass(frozen=True, slots=True)
class Batch:
    """Images ready for the network."""

    images: Tensor
    """`(B, 3, S, S)`, float32 in [-1, 1], on the device."""
    labels: Tensor | None
    """`(B,)`, int64, on the device; None if the images have no labels."""
    ids: NDArray[np.int64]
    """`(B,)`, numbers within the prepared split, on the host: what randomness is keyed by."""
    epoch: int
    """The epoch that the batch belongs to, from 0."""

    def parts(self, count: int) -> Iterator["Batch"]:
        """Yield the batch in `count` equal parts, in order.

        Raises:
            ValueError: If its images cannot be divided so.
        """
        size, rest = divmod(len(self.ids), count)
        if rest:
            raise ValueError(f"A batch of {len(self.ids)} images has no {count} equal parts.")
        for first in range(0, size * count, size):
            rows = slice(first, first + size)
            labels = None if self.labels is None else self.labels[rows]
            yield Batch(self.images[rows], labels, self.ids[rows], self.epoch)


def epoch_order(num_samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the order of one epoch, a permutation of `0` to `num_samples - 1`."""
    numbers = np.arange(num_samples, dtype=np.int64)
    return order_by(uniform(seed, epoch, numbers, "order"))


class Batches:
    """Training batches of a subset, each image at most once an epoch."""

    def __init__(
        self,
        subset: Subset,
        *,
        batch_size: int,
        side: int,
        flip: bool,
        seed: int,
        device: torch.device,
        crop_scale: float | None = None,
        keep_on_device: bool = False,
    ) -> None:
        """Check that batches can be made.

        Args:
            subset: The images.
            batch_size: Images per batch; the last images of an epoch that fill no batch are left
                out, others each time.
            side: Side of the crop, in pixels: at a random place if the prepared images are
                larger.
            flip: Mirror each image with probability one half.
            seed: Base seed of order, crops and mirroring.
            device: Where the batches go; bytes are sent there and expanded there.
            crop_scale: Smallest part of the prepared image's area, in (0, 1], that a crop of random
                place and size takes, which is then resized to `side`; none for crops of `side`.
            keep_on_device: Whether images stay on the device once they were there, so that they
                are read from the host in the first epoch only. The batches are the same.

        Raises:
            DatasetError: If the images fill no batch or are smaller than the crop.
        """
        if len(subset) < batch_size:
            raise DatasetError(
                f"There must be at least one batch of training images: batch_size is {batch_size}, "
                f"and there are {len(subset)}. Lower batch_size or use more images."
            )
        _check_side(subset, side)
        self.steps_per_epoch = len(subset) // batch_size
        self._subset, self._batch_size, self._side = subset, batch_size, side
        self._flip, self._seed, self._device = flip, seed, device
        self._crop_scale = crop_scale
        self._resident = _Resident(subset, device) if keep_on_device else None

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Yield the batches of one epoch, from step `start_step`.

        What a batch holds depends on its epoch and step alone, not on where iteration began.

        Args:
            epoch: From 0.
            start_step: Number of batches left out at the beginning.

        Yields:
            `steps_per_epoch - start_step` batches.
        """
        order = epoch_order(len(self._subset), self._seed, epoch)
        steps = range(start_step, self.steps_per_epoch)
        groups = [order[s * self._batch_size : (s + 1) * self._batch_size] for s in steps]
        for positions, pixels in _read_ahead(self._subset, groups, self._device, self._resident):
            ids = self._subset.indices[positions]
            images = self._augment(pixels, ids, epoch)
            yield Batch(images, _labels(self._subset, positions, self._device), ids, epoch)

    def _augment(self, pixels: Tensor, ids: NDArray[np.int64], epoch: int) -> Tensor:
        """Return `(B, 3, S, S)`, float32 in [-1, 1], from `(B, 3, P, P)`, uint8."""
        size = pixels.shape[-1]
        if self._crop_scale is None and size > self._side:
            tops, lefts = self._places(size - self._side, ids, epoch)
            pixels = crop(pixels, tops, lefts, self._side)
        if self._flip:
            mirrored = uniform(self._seed, epoch, ids, "flip") < 0.5
            pixels = flip(pixels, send(mirrored, self._device))
        images = normalise(pixels)
        if self._crop_scale is not None:
            area = 1 - (1 - self._crop_scale) * uniform(self._seed, epoch, ids, "crop scale")
            sides = (size * np.sqrt(area)).round().clip(1).astype(np.int64)
            tops, lefts = self._places(size - sides, ids, epoch)
            images = resized_crop(images, tops, lefts, send(sides, self._device), self._side)
        return images

    def _places(
        self, spare: int | NDArray[np.int64], ids: NDArray[np.int64], epoch: int
    ) -> list[Tensor]:
        """Return first rows and first columns of crops, from 0 to `spare`."""
        chance = (uniform(self._seed, epoch, ids, stream) for stream in ("crop top", "crop left"))
        return [send((part * (spare + 1)).astype(np.int64), self._device) for part in chance]


def eval_batches(
    subset: Subset, batch_size: int, side: int, device: torch.device
) -> Iterator[Batch]:
    """Yield every image exactly once, in order, cropped in the middle.

    Args:
        subset: The images.
        batch_size: Images per batch; the last one may be smaller.
        side: Side of the crop, in pixels.
        device: Where the batches go.

    Yields:
        Batches of epoch 0.

    Raises:
        DatasetError: If the images are smaller than the crop.
    """
    _check_side(subset, side)
    first = (subset.split.side - side) // 2
    order = np.arange(len(subset), dtype=np.int64)
    groups = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    for positions, pixels in _read_ahead(subset, groups, device):
        images = pixels[:, :, first : first + side, first : first + side]
        labels = _labels(subset, positions, device)
        yield Batch(normalise(images), labels, subset.indices[positions], epoch=0)


def send(values: NDArray[Any], device: torch.device) -> Tensor:
    """Return an array as a tensor on a device, without making the host wait for the device.

    Args:
        values: Of any shape and dtype.
        device: Where it goes; what is on its way to a GPU lies in memory that is pinned.
    """
    return _pinned(torch.from_numpy(values), device).to(device, non_blocking=True)


def _pinned(values: Tensor, device: torch.device) -> Tensor:
    # From memory that may be swapped out a copy begins when the device has done all before it.
    return values.pin_memory() if device.type == "cuda" else values


class _Resident:
    """The images of a subset that have been on the device, kept there as bytes."""

    def __init__(self, subset: Subset, device: torch.device) -> None:
        side = subset.split.side
        self._device = device
        self._pixels = torch.empty((len(subset), side, side, 3), dtype=torch.uint8, device=device)
        self._is_there = np.zeros(len(subset), dtype=bool)

    def has(self, positions: NDArray[np.int64]) -> bool:
        """Whether all of these images are there."""
        return bool(self._is_there[positions].all())

    def put(self, positions: NDArray[np.int64], pixels: Tensor) -> None:
        """Keep images `(B, P, P, 3)`, on the device."""
        self._pixels[send(positions, self._device)] = pixels
        self._is_there[positions] = True

    def get(self, positions: NDArray[np.int64]) -> Tensor:
        """Return images that are there, `(B, P, P, 3)`, on the device."""
        return self._pixels[send(positions, self._device)]


def _read_ahead(
    subset: Subset,
    groups: Sequence[NDArray[np.int64]],
    device: torch.device,
    resident: _Resident | None = None,
) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    """Yield `(B, 3, P, P)` uint8 on the device; a thread reads the next batch meanwhile.

    Batches of images that are all on the device already are not read again.
    """

    def read(positions: NDArray[np.int64]) -> Tensor:
        return _pinned(torch.from_numpy(subset.gather(positions)), device)

    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as pool:

        def begin(number: int) -> Future[Tensor] | None:
            if number == len(groups) or (resident and resident.has(groups[number])):
                return None
            return pool.submit(read, groups[number])

        reading = begin(0)
        for number, positions in enumerate(groups):
            if reading is not None:
                pixels = reading.result().to(device, non_blocking=True)
                if resident:
                    resident.put(positions, pixels)
            else:
                assert resident is not None  # or it would have been read
                pixels = resident.get(positions)
            reading = begin(number + 1)
            yield positions, pixels.permute(0, 3, 1, 2)


def _labels(subset: Subset, positions: NDArray[np.int64], device: torch.device) -> Tensor | None:
    labels = subset.split.labels
    return None if labels is None else send(labels[subset.indices[positions]], device)


def _check_side(subset: Subset, side: int) -> None:
    if subset.split.side < side:
        raise DatasetError(
            f"Prepared images must be at least as large as model.image_size ({side} px), these "
            f"are {subset.split.side} px. Prepare them again at {side} px or more."
        )
