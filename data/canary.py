"""The noise canary: pictures without content, and a classifier that looks for traces.

Isotropic noise has no up. If a classifier can tell which way it was turned after it has passed
through the data path, the path has left a mark, and a network pretrained on photos would learn to
read that mark instead of the photos. Squashing to a square, 8-bit resizing and JPEG all leave one.

Dimension key: N = images, S = their side in pixels, F = numbers per image.
"""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from data.records import Record, Source, Split

ASPECT_RATIOS = ((4, 3), (4, 3), (3, 2), (4, 3), (3, 4), (2, 3), (1, 1), (5, 4))
"""Width to height, in turn: about as many landscape, portrait and square as in ImageNet."""

BLOCK_PX = 8
"""Side of the blocks whose spectrum is measured, that of JPEG."""

_TINY = 1e-9  # far below one grey level squared; keeps logarithms of flat images finite


class NoiseSource(Source):
    """Isotropic noise with a 1/f spectrum, like photos have, as PNG files of many shapes."""

    spec = "noise"
    class_names = None

    def __init__(self, train: int, test: int, *, long_side_px: int, seed: int) -> None:
        self.counts = {"train": train, "test": test}
        self._long_side_px, self._seed = long_side_px, seed

    def identity(self) -> dict[str, Any]:
        """Return what determines the noise."""
        return {"kind": self.spec, "counts": self.counts, "seed": self._seed}

    def records(self, split: Split, start: int = 0) -> Iterator[Record]:
        """Yield noise images as encoded PNG files."""
        for index in range(start, self.counts[split]):
            rng = np.random.default_rng([self._seed, ("train", "test").index(split), index])
            file = io.BytesIO()
            self._picture(rng, *ASPECT_RATIOS[index % len(ASPECT_RATIOS)]).save(file, "PNG")
            yield Record(f"{split}/{index}", file.getvalue(), None)

    def _picture(self, rng: np.random.Generator, across: int, down: int) -> Image.Image:
        # Cut from a square, whose noise is the same in all directions.
        noise = pink_noise(rng, self._long_side_px)
        scale = self._long_side_px / max(across, down)
        return Image.fromarray(noise[: round(down * scale), : round(across * scale)])


def probe_rotation(
    train: tuple[NDArray[np.float64], NDArray[np.int64]],
    test: tuple[NDArray[np.float64], NDArray[np.int64]],
) -> float:
    """Return how often a linear classifier tells which way unseen images were turned.

    Args:
        train: Marks of rotated images `(N, F)` and their rotations `(N,)`, to learn from.
        test: The same, of other images, to be tested on.

    Returns:
        Fraction of the test images told right; 0.25 is chance, or 0.5 where the rotations are
        told apart modulo 180 degrees only.
    """
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300))
    classifier.fit(*train)
    return float(classifier.score(*test))


def marks(images: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the numbers that a trace of orientation would show in.

    They are the spectrum of 8 x 8 blocks, the strength and skewness of the differences along rows
    and columns, and the mean brightness of the borders: where the known marks are.

    Args:
        images: `(N, 3, S, S)` in [-1, 1], S at least 8.

    Returns:
        `(N, F)`, F = 72 numbers of each image.
    """
    grey = images.astype(np.float64).mean(axis=1)
    side = grey.shape[1] // BLOCK_PX * BLOCK_PX
    blocks = grey[:, :side, :side].reshape(len(grey), side // BLOCK_PX, BLOCK_PX, -1, BLOCK_PX)
    cosines = _cosine_basis(BLOCK_PX)
    spectrum = np.einsum("ui,nyixj,vj->nyxuv", cosines, blocks, cosines, optimize=True)
    energy = np.log((spectrum**2).mean(axis=(1, 2)) + _TINY).reshape(len(grey), -1)
    differences = (np.diff(grey, axis=1), np.diff(grey, axis=2))
    borders = (grey[:, 0], grey[:, -1], grey[:, :, 0], grey[:, :, -1])
    return np.column_stack(
        [
            energy,
            *(_log_energy(values) for values in differences),
            *(_skewness(values) for values in differences),
            *(border.mean(axis=1) for border in borders),
        ]
    )


def _log_energy(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.log((values**2).mean(axis=(1, 2)) + _TINY))


def _skewness(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(
        (values**3).mean(axis=(1, 2)) / ((values**2).mean(axis=(1, 2)) ** 1.5 + _TINY)
    )


def _cosine_basis(size: int) -> NDArray[np.float64]:
    """Return the cosine transform (DCT-II, not scaled) of `size` points as a matrix."""
    points = np.arange(size)
    return np.asarray(np.cos(np.pi * np.outer(points, points + 0.5) / size))


def pink_noise(rng: np.random.Generator, side: int) -> NDArray[np.uint8]:
    """Return `(side, side, 3)` noise whose amplitude falls as 1/frequency in all directions.

    It goes on without a seam where it is repeated.
    """
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side)[None, :])
    frequency[0, 0] = np.inf  # no mean; it is set below
    spectrum = np.fft.fft2(rng.standard_normal((3, side, side))) / frequency
    noise = np.fft.ifft2(spectrum).real.transpose(1, 2, 0)
    return np.asarray((128 + 40 * noise / noise.std()).clip(0, 255).round().astype(np.uint8))
