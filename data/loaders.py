"""Batches in an order that is a function of (seed, epoch), and so can be resumed anywhere.

Dimension key: B = images in the batch, S = side of the crop, P = side of the prepared images, in
pixels, T = tokens of an image, D = their width.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.randomness import order_by, uniform
from data.reading import Resident, read_ahead, send
from data.records import DatasetError
from data.splits import Subset
from data.tokens import Tokens
from data.transforms import crop, flip, jitter_colours, make_grey, normalise, resized_crop


@dataclass(frozen=True, slots=True)
class Batch:
    """Images ready for the network."""

    images: Tensor
    """`(B, 3, S, S)`, float32 in [-1, 1], on the device; or of images that have been through the
    lower blocks already what these made of them, `(B, T, D)`, float32."""
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


@dataclass(frozen=True)
class Share:
    """Which part of the images is read here, where several processes divide them.

    Attributes:
        index: Number of the part, from 0.
        count: Parts in all.
    """

    index: int = 0
    count: int = 1

    def of_batch(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the own part of a batch: one of `count` equal ones, in order.

        Raises:
            ValueError: If its images cannot be divided so.
        """
        size, rest = divmod(len(positions), self.count)
        if rest:
            raise ValueError(f"A batch of {len(positions)} images has no {self.count} equal parts.")
        return positions[self.index * size : (self.index + 1) * size]

    def of_all(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the own part of what is divided as equally as it can be, in order."""
        first, end = (
            len(positions) * place // self.count for place in (self.index, self.index + 1)
        )
        return positions[first:end]


ALL = Share()
"""All of the images, in one process."""


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
        colour_jitter: float = 0.0,
        greyscale: float = 0.0,
        share: Share = ALL,
    ) -> None:
        """Check that batches can be made.

        Args:
            subset: The images.
            batch_size: Images per batch, those of all parts together; the last images of an epoch
                that fill no batch are left out, others each time.
            side: Side of the crop, in pixels: at a random place if the prepared images are
                larger.
            flip: Mirror each image with probability one half.
            seed: Base seed of order, crops, mirroring and colours.
            device: Where the batches go; bytes are sent there and expanded there.
            crop_scale: Smallest part of the prepared image's area, in (0, 1], that a crop of random
                place and size takes, which is then resized to `side`; none for crops of `side`.
            colour_jitter: Brightness, contrast and saturation of each image are multiplied by
                factors between 1 minus this and 1 plus this; in [0, 1].
            greyscale: Probability in [0, 1] with which an image loses its colours.
            share: The part of each batch that is made here.
            keep_on_device: Whether images stay on the device once they were there, so that they
                are read from the host in the first epoch only. The batches are the same.

        Raises:
            DatasetError: If the images fill no batch or are smaller than the crop.
        """
        self.steps_per_epoch = _steps_per_epoch(subset, batch_size)
        _check_side(subset, side)
        self._subset, self._batch_size, self._side = subset, batch_size, side
        self._flip, self._seed, self._device = flip, seed, device
        self._crop_scale = crop_scale
        self._colour_jitter, self._greyscale = colour_jitter, greyscale
        self._resident = Resident(subset, device) if keep_on_device else None
        self._share = share

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Yield the batches of one epoch, from step `start_step`.

        What a batch holds depends on its epoch and step alone, not on where iteration began.

        Args:
            epoch: From 0.
            start_step: Number of batches left out at the beginning.

        Yields:
            `steps_per_epoch - start_step` batches.
        """
        batches = _epoch_groups(len(self._subset), self._batch_size, self._seed, epoch, start_step)
        groups = [self._share.of_batch(batch) for batch in batches]
        for positions, pixels in _pixels(self._subset, groups, self._device, self._resident):
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
        images = normalise(self._recolour(pixels, ids, epoch))
        if self._crop_scale is not None:
            area = 1 - (1 - self._crop_scale) * uniform(self._seed, epoch, ids, "crop scale")
            sides = (size * np.sqrt(area)).round().clip(1).astype(np.int64)
            tops, lefts = self._places(size - sides, ids, epoch)
            images = resized_crop(images, tops, lefts, send(sides, self._device), self._side)
        return images

    def _recolour(self, pixels: Tensor, ids: NDArray[np.int64], epoch: int) -> Tensor:
        """Return `(B, 3, P, P)`, uint8, from the same."""
        if self._colour_jitter:
            factors = (
                1 + self._colour_jitter * (2 * uniform(self._seed, epoch, ids, stream) - 1)
                for stream in ("brightness", "contrast", "saturation")
            )
            pixels = jitter_colours(pixels, *(send(each, self._device) for each in factors))
        if self._greyscale:
            chosen = uniform(self._seed, epoch, ids, "greyscale") < self._greyscale
            pixels = make_grey(pixels, send(chosen, self._device))
        return pixels

    def _places(
        self, spare: int | NDArray[np.int64], ids: NDArray[np.int64], epoch: int
    ) -> list[Tensor]:
        """Return first rows and first columns of crops, from 0 to `spare`."""
        chance = (uniform(self._seed, epoch, ids, stream) for stream in ("crop top", "crop left"))
        return [send((part * (spare + 1)).astype(np.int64), self._device) for part in chance]


def eval_batches(
    subset: Subset, batch_size: int, side: int, device: torch.device, share: Share = ALL
) -> Iterator[Batch]:
    """Yield every image exactly once, in order, cropped in the middle.

    Args:
        subset: The images.
        batch_size: Images per batch, those of all parts together; the last one may be smaller.
        side: Side of the crop, in pixels.
        device: Where the batches go.
        share: The part of the images that is read here.

    Yields:
        Batches of epoch 0.

    Raises:
        DatasetError: If the images are smaller than the crop.
    """
    _check_side(subset, side)
    first = (subset.split.side - side) // 2
    groups = _groups_in_order(len(subset), batch_size, share)
    for positions, pixels in _pixels(subset, groups, device):
        images = pixels[:, :, first : first + side, first : first + side]
        labels = _labels(subset, positions, device)
        yield Batch(normalise(images), labels, subset.indices[positions], epoch=0)


class TokenBatches:
    """Training batches of kept tokens: of the same images in the same order as `Batches`."""

    def __init__(
        self,
        tokens: Tokens,
        *,
        batch_size: int,
        seed: int,
        device: torch.device,
        share: Share = ALL,
    ) -> None:
        """Check that batches can be made.

        Args:
            tokens: Of the training images.
            batch_size: Images per batch; see `Batches`.
            seed: Base seed of the order.
            device: Where the batches go; bfloat16 is sent there and widened there.
            share: The part of each batch that is made here.

        Raises:
            DatasetError: If the images fill no batch.
        """
        self.steps_per_epoch = _steps_per_epoch(tokens.subset, batch_size)
        self._tokens, self._batch_size, self._seed = tokens, batch_size, seed
        self._device, self._share = device, share

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Yield the batches of one epoch, from step `start_step`; see `Batches.epoch`."""
        count = len(self._tokens.subset)
        batches = _epoch_groups(count, self._batch_size, self._seed, epoch, start_step)
        groups = [self._share.of_batch(batch) for batch in batches]
        yield from _token_batches(self._tokens, groups, self._device, epoch)


def token_eval_batches(
    tokens: Tokens, batch_size: int, device: torch.device, share: Share = ALL
) -> Iterator[Batch]:
    """Yield the tokens of every image exactly once, in order; see `eval_batches`."""
    groups = _groups_in_order(len(tokens.subset), batch_size, share)
    yield from _token_batches(tokens, groups, device, epoch=0)


def _token_batches(
    tokens: Tokens, groups: Sequence[NDArray[np.int64]], device: torch.device, epoch: int
) -> Iterator[Batch]:
    subset = tokens.subset
    for positions, rows in read_ahead(tokens.gather, groups, device):
        labels = _labels(subset, positions, device)
        yield Batch(rows.float(), labels, subset.indices[positions], epoch)


def _epoch_groups(
    count: int, batch_size: int, seed: int, epoch: int, start_step: int
) -> list[NDArray[np.int64]]:
    """Return the positions of each batch of an epoch, from a step on; whole batches only."""
    order = epoch_order(count, seed, epoch)
    steps = range(start_step, count // batch_size)
    return [order[step * batch_size : (step + 1) * batch_size] for step in steps]


def _groups_in_order(count: int, batch_size: int, share: Share) -> list[NDArray[np.int64]]:
    order = share.of_all(np.arange(count, dtype=np.int64))
    size = max(1, batch_size // share.count)
    return [order[start : start + size] for start in range(0, len(order), size)]


def _pixels(
    subset: Subset,
    groups: Sequence[NDArray[np.int64]],
    device: torch.device,
    resident: Resident | None = None,
) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    """Yield positions and their images, `(B, 3, P, P)`, uint8, on the device."""

    def gather(positions: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(subset.gather(positions))

    reading = read_ahead(gather, groups, device, resident)
    wanted = [each for each in groups if not (resident and resident.has(each))]
    # Given up, what was announced is taken back before anybody waits for the batch being read.
    with closing(reading), subset.announced(wanted):
        for positions, pixels in reading:
            yield positions, pixels.permute(0, 3, 1, 2)


def _labels(subset: Subset, positions: NDArray[np.int64], device: torch.device) -> Tensor | None:
    labels = subset.split.labels
    return None if labels is None else send(labels[subset.indices[positions]], device)


def _steps_per_epoch(subset: Subset, batch_size: int) -> int:
    if len(subset) < batch_size:
        raise DatasetError(
            f"There must be at least one batch of training images: batch_size is {batch_size}, "
            f"and there are {len(subset)}. Lower batch_size or use more images."
        )
    return len(subset) // batch_size


def _check_side(subset: Subset, side: int) -> None:
    if subset.split.side < side:
        raise DatasetError(
            f"Prepared images must be at least as large as model.image_size ({side} px), these "
            f"are {subset.split.side} px. Prepare them again at {side} px or more."
        )
