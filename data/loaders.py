"""Batches in an order that is a function of (seed, epoch), and so can be resumed anywhere.

Dimension key: B = images in the batch, S = side of the crop, P = side of the prepared images, in
pixels.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.randomness import order_by, uniform
from data.records import DatasetError
from data.splits import Subset
from data.transforms import crop, flip, jitter_colours, make_grey, normalise


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
        colour_jitter: float = 0.0,
        greyscale: float = 0.0,
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
            colour_jitter: Brightness, contrast and saturation of each image are multiplied by
                factors between 1 minus this and 1 plus this; in [0, 1].
            greyscale: Probability in [0, 1] with which an image loses its colours.

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
        self._colour_jitter, self._greyscale = colour_jitter, greyscale

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
        for positions, pixels in _read_ahead(self._subset, groups, self._device):
            ids = self._subset.indices[positions]
            images = self._augment(pixels, ids, epoch)
            yield Batch(
                normalise(images), _labels(self._subset, positions, self._device), ids, epoch
            )

    def _augment(self, images: Tensor, ids: NDArray[np.int64], epoch: int) -> Tensor:
        spare = images.shape[-1] - self._side
        if spare:
            tops, lefts = (
                (uniform(self._seed, epoch, ids, stream) * (spare + 1)).astype(np.int64)
                for stream in ("crop top", "crop left")
            )
            images = crop(images, self._send(tops), self._send(lefts), self._side)
        if self._flip:
            images = flip(images, self._send(uniform(self._seed, epoch, ids, "flip") < 0.5))
        if self._colour_jitter:
            factors = (
                1 + self._colour_jitter * (2 * uniform(self._seed, epoch, ids, stream) - 1)
                for stream in ("brightness", "contrast", "saturation")
            )
            images = jitter_colours(images, *(self._send(each) for each in factors))
        if self._greyscale:
            chosen = uniform(self._seed, epoch, ids, "greyscale") < self._greyscale
            images = make_grey(images, self._send(chosen))
        return images

    def _send(self, values: NDArray[np.int64] | NDArray[np.bool_] | NDArray[np.float64]) -> Tensor:
        return torch.from_numpy(values).to(self._device, non_blocking=True)


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


def _read_ahead(
    subset: Subset, groups: Sequence[NDArray[np.int64]], device: torch.device
) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    """Yield `(B, 3, P, P)` uint8 on the device; a thread reads the next batch meanwhile."""

    def read(positions: NDArray[np.int64]) -> Tensor:
        pixels = torch.from_numpy(subset.gather(positions))
        return pixels.pin_memory() if device.type == "cuda" else pixels

    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as pool:
        waiting = [pool.submit(read, positions) for positions in groups[:1]]
        for number, positions in enumerate(groups):
            pixels = waiting.pop().result()
            waiting = [pool.submit(read, following) for following in groups[number + 1 :][:1]]
            yield positions, pixels.to(device, non_blocking=True).permute(0, 3, 1, 2)


def _labels(subset: Subset, positions: NDArray[np.int64], device: torch.device) -> Tensor | None:
    labels = subset.split.labels
    if labels is None:
        return None
    return torch.from_numpy(labels[subset.indices[positions]]).to(device, non_blocking=True)


def _check_side(subset: Subset, side: int) -> None:
    if subset.split.side < side:
        raise DatasetError(
            f"Prepared images must be at least as large as model.image_size ({side} px), these "
            f"are {subset.split.side} px. Prepare them again at {side} px or more."
        )
