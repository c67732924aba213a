"""Training, validation and test images, divided the same way on every machine."""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.prepared import PreparedData, PreparedSplit
from data.randomness import order_by, uniform
from data.records import DatasetError, Split


@dataclass(frozen=True, slots=True)
class Subset:
    """Some of the images of a prepared split."""

    split: PreparedSplit
    """Where the images are."""
    indices: NDArray[np.int64]
    """Numbers within `split`, `(N,)`, ascending: also the samples' identity for randomness."""

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """Labels of the images, `(N,)`, or None if there are none."""
        return None if self.split.labels is None else self.split.labels[self.indices]

    @property
    def nbytes(self) -> int:
        """Bytes that the images take, as `gather` returns them."""
        return len(self) * self.split.side**2 * 3

    def places_of(self, part: "Subset") -> NDArray[np.int64]:
        """Return the positions in this subset of the images of a part of it, `(len(part),)`."""
        return np.searchsorted(self.indices, part.indices)

    def announced(self, groups: Sequence[NDArray[np.int64]]) -> AbstractContextManager[None]:
        """Return a context in which images are gathered in this order; see `PreparedSplit`.

        Args:
            groups: The positions that will be asked for together.
        """
        share = len(self) / max(1, len(self.split))
        return self.split.announced((self.indices[group] for group in groups), share=share)

    def gather(self, positions: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return images by their positions in this subset, `(len(positions), S, S, 3)`."""
        return self.split.gather(self.indices[positions])


@dataclass(frozen=True, slots=True)
class Splits:
    """The three parts. Train and val are disjoint; choices are made on val, test is read once."""

    train: Subset
    val: Subset
    test: Subset


def split(
    prepared: PreparedData, *, val_fraction: float, test_fraction: float, seed: int
) -> Splits:
    """Divide prepared images into train, val and test.

    The parts taken out are stratified: each class gives in proportion. They depend on the labels
    and the seed alone, not on a library's generator, so they are the same everywhere.

    Args:
        prepared: The images.
        val_fraction: Part of the training images kept for choices, in (0, 1).
        test_fraction: Part of all images kept for testing, in (0, 1), used only if the source has
            no test images of its own. Taken before `val_fraction`.
        seed: Seed of the division.

    Returns:
        The three parts.

    Raises:
        DatasetError: If a fraction is out of range or leaves a part empty.
    """
    rest = Subset(prepared.train, np.arange(len(prepared.train), dtype=np.int64))
    if prepared.test is not None:
        test = Subset(prepared.test, np.arange(len(prepared.test), dtype=np.int64))
    else:
        test, rest = _take_out(rest, test_fraction, seed, "test")
    val, train = _take_out(rest, val_fraction, seed, "val")
    return Splits(train, val, test)


def take_labelled(subset: Subset, count: int | None, seed: int) -> Subset:
    """Return `count` images whose labels may be used.

    Classes are taken in proportion, at least one image of each. Selections are nested: with the
    same seed, the images for a smaller count are among those for a larger one.

    Args:
        subset: Labelled images.
        count: How many; None for all of them.
        seed: Seed of the selection.

    Returns:
        The selection.

    Raises:
        DatasetError: If there are no labels, fewer images than `count`, or more classes.
    """
    labels = subset.labels
    if labels is None:
        raise DatasetError(
            "Transfer needs labelled images, and these have no labels. Set transfer.source to a "
            "source with classes, such as transfer.source=folder:<one folder per class>."
        )
    if count is None:
        return subset
    num_classes = len(np.unique(labels))
    if not num_classes <= count <= len(subset):
        raise DatasetError(
            f"transfer.labels must be from {num_classes} (one for each class) to {len(subset)} "
            f"(all training images), got {count}."
        )
    rank, share = _ranks(labels, subset.indices, seed, "labels")
    order = np.lexsort((share, rank > 0))
    return Subset(subset.split, np.sort(subset.indices[order[:count]]))


def train_size(
    counts: Mapping[Split, int] | Mapping[str, int], *, val_fraction: float, test_fraction: float
) -> int:
    """Return how many images `split` leaves in train, known from the counts alone.

    Args:
        counts: Images by split of the source: `train`, and `test` where it brings one.
        val_fraction: As for `split`.
        test_fraction: As for `split`.
    """
    images = counts["train"]
    if "test" not in counts:
        images -= _count(test_fraction, images)
    return images - _count(val_fraction, images)


def label_counts(fractions: Sequence[float], images: int, classes: int) -> dict[int, float]:
    """Return how many labelled images each fraction of a train split stands for.

    At least one of each class; a fraction that comes to as many images as the one before it is
    left out.

    Args:
        fractions: Of the images, in (0, 1], ascending.
        images: In the train split.
        classes: That these images are of.

    Returns:
        The fraction of each number of images, ascending; `take_labelled` draws that many.
    """
    found: dict[int, float] = {}
    for fraction in fractions:
        found.setdefault(min(images, max(classes, round(fraction * images))), fraction)
    return found


def _take_out(subset: Subset, fraction: float, seed: int, part: str) -> tuple[Subset, Subset]:
    """Return the part taken out, and what is left."""
    count = _count(fraction, len(subset))
    if not (0 < fraction < 1 and 0 < count < len(subset)):
        raise DatasetError(
            f"data.{part}_fraction must leave images on both sides, {fraction} of {len(subset)} "
            "images does not. Choose a fraction between 0 and 1, or use more images."
        )
    labels = subset.labels
    if labels is None:
        labels = np.zeros(len(subset), dtype=np.int64)
    _, share = _ranks(labels, subset.indices, seed, part)
    largest = np.partition(share, count - 1)[count - 1]
    taken = share < largest
    ties = np.flatnonzero(share == largest)
    taken[ties[: count - np.count_nonzero(taken)]] = True
    return Subset(subset.split, subset.indices[taken]), Subset(subset.split, subset.indices[~taken])


def _count(fraction: float, images: int) -> int:
    # Rounded before rounding up, or 0.07 * 100 would count as more than 7.
    return math.ceil(round(fraction * images, 6))


def _ranks(
    labels: NDArray[np.int64], ids: NDArray[np.int64], seed: int, stream: str
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Shuffle each class and return where each image came in its class.

    Returns:
        rank: `(N,)`, place within the class, from 0.
        share: `(N,)`, the same as a fraction of the class, in (0, 1). The images with the smallest
            shares, however many, are a stratified selection.
    """
    chance = uniform(seed, 0, ids, f"split {stream}")
    # Class by class, each one shuffled. A million images are divided whenever a stage starts, and
    # numbers of 16 bits are sorted in a tenth of the time.
    order = order_by(chance)
    narrow = labels[order].astype(np.min_scalar_type(labels.max(initial=0)))
    order = order[np.argsort(narrow, kind="stable")]
    firsts = np.flatnonzero(np.diff(labels[order], prepend=-1))
    sizes = np.diff(firsts, append=len(labels))
    rank = np.empty(len(labels), dtype=np.int64)
    rank[order] = np.arange(len(labels)) - np.repeat(firsts, sizes)
    size = np.empty(len(labels), dtype=np.int64)
    size[order] = np.repeat(sizes, sizes)
    # Classes of one size would tie at every rank; chance decides which of them gives first.
    return rank, (rank + chance) / size
