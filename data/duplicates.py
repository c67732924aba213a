"""Pictures that are in two sets at once, also as other files: found by perceptual hashes.

Dimension key: B = images, S = their side in pixels, N and M = images of two sets.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

WORDS = 2
"""Numbers of 64 bits per hash."""

NEAR = 12
"""Bits, of 128, in which a copy may differ: re-encoded and resized copies of photos differ in
fewer, other photos in more. Measured on Imagenette, see `EXPERIMENTS.md`."""

_GRID = 8
_ROWS, _COLUMNS = 64, 8192  # of the table of differences in work at once: it stays in the cache


def perceptual_hashes(images: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Return what survives encoding and resizing: where an image gets brighter.

    64 bits say for each cell of a grid of 8 x 8 whether brightness rises to the right, 64 whether
    it rises downwards (the "difference hash" of the imagehash library, in both directions).
    Mirrored and turned copies have other hashes, flat pictures all the same.

    Args:
        images: `(B, S, S, 3)`.

    Returns:
        `(B, 2)`.
    """
    side = images.shape[1]
    # Written out: a sum over the last axis takes NumPy ten times as long.
    grey = images[..., 0].astype(np.float32) + images[..., 1] + images[..., 2]
    narrow, wide = _averages(side, _GRID), _averages(side, _GRID + 1)
    # Half a grey level: flat areas must not have the hash of their noise.
    right = np.diff(narrow @ grey @ wide.T, axis=2) > 1.5
    down = np.diff(wide @ grey @ narrow.T, axis=1) > 1.5
    bits = np.concatenate([right.reshape(len(images), -1), down.reshape(len(images), -1)], axis=1)
    return np.packbits(bits, axis=1).view("<u8").astype(np.uint64)


def hashes_to_text(hashes: Sequence[NDArray[np.uint64]]) -> str:
    """Return hashes, `(B, 2)` each, as hex digits for a JSON file."""
    return b"".join(each.astype("<u8").tobytes() for each in hashes).hex()


def hashes_from_text(text: str) -> NDArray[np.uint64]:
    """Return what `hashes_to_text` was given, `(B, 2)`."""
    return np.frombuffer(bytes.fromhex(text), dtype="<u8").astype(np.uint64).reshape(-1, WORDS)


def has_copy(
    first: NDArray[np.uint64],
    second: NDArray[np.uint64],
    most: int = NEAR,
    give_up: Callable[[], None] = lambda: None,
) -> NDArray[np.bool_]:
    """Tell for each hash of `first` whether one in `second` differs in few bits.

    Memory does not depend on how many do.

    Args:
        first: `(N, 2)`.
        second: `(M, 2)`.
        most: Largest number of bits that differ; 0 for equal hashes.
        give_up: Called now and then; ends the work by raising.

    Returns:
        `(N,)`.
    """
    result = np.zeros(len(first), dtype=np.bool_)
    columns = [np.ascontiguousarray(second[:, word]) for word in range(WORDS)]
    for left in range(0, len(second), _COLUMNS):
        give_up()
        here = [column[left : left + _COLUMNS] for column in columns]
        # Who has one already is not asked again: pictures that are all alike cost no more.
        missing = np.flatnonzero(~result)
        for top in range(0, len(missing), _ROWS):
            rows = missing[top : top + _ROWS]
            # Most pairs differ too much in the first word already.
            close = _differing(first[rows, :1], here[0]) <= most
            near = close.any(axis=1)
            for row, candidates in zip(rows[near], close[near], strict=True):
                places = np.flatnonzero(candidates)
                bits = _differing(first[row, 0], here[0][places])
                for word in range(1, WORDS):
                    bits = bits + _differing(first[row, word], here[word][places])
                result[row] = bool((bits <= most).any())
    return result


def _differing(one: NDArray[np.uint64] | np.uint64, other: NDArray[np.uint64]) -> NDArray[np.uint8]:
    """Return in how many bits numbers differ, by NumPy's rules of broadcasting."""
    return np.asarray(np.bitwise_count(np.bitwise_xor(one, other)))


def _averages(side: int, cells: int) -> NDArray[np.float32]:
    """Return the matrix that averages `side` pixels to `cells` of equal width, `(cells, side)`."""
    edges = np.arange(cells + 1)[:, None] * side / cells
    pixels = np.arange(side)[None]
    overlap = np.minimum(edges[1:], pixels + 1) - np.maximum(edges[:-1], pixels)
    return np.asarray(np.clip(overlap, 0, None) * cells / side, dtype=np.float32)
