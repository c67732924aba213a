"""A shard of images stored as JPEG: their files one after the other, then where each begins.

The last `8 * (n + 1)` bytes are little-endian 64-bit offsets: image k lies from the k-th to the
next one, and the last is where the images end.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data import jpeg
from data.records import DatasetError
from data.shards import written_whole

_OFFSET = np.dtype("<u8")


def write_jpegs(path: Path, files: Iterable[bytes]) -> int:
    """Write JPEG files into one, whole or not at all; one image is in memory at a time.

    Returns:
        How many there were.
    """
    offsets = [0]
    with written_whole(path) as packed:
        for content in files:
            packed.write(content)
            offsets.append(offsets[-1] + len(content))
        packed.write(np.array(offsets, dtype=_OFFSET).tobytes())
    return len(offsets) - 1


class JpegShard:
    """The images of a shard; indexed like the array of a raw one, decoded when asked for."""

    def __init__(self, path: Path, images: int, side: int) -> None:
        """Map the file into memory.

        Args:
            path: What `write_jpegs` wrote.
            images: How many images it holds.
            side: Their height and width, in pixels.

        Raises:
            OSError: If it cannot be read.
            ValueError: If it does not hold so many images.
        """
        self.shape = (images, side, side, 3)
        self._path = path
        self._content: NDArray[np.uint8] = np.memmap(path, dtype=np.uint8, mode="r")
        length = _OFFSET.itemsize * (images + 1)
        self._offsets = np.frombuffer(self._content[-length:].tobytes(), dtype=_OFFSET)
        ends = [0, len(self._content) - length]
        if len(self._offsets) != images + 1 or self._offsets[[0, -1]].tolist() != ends:
            raise ValueError(f"it does not hold {images} images")

    @property
    def begins(self) -> NDArray[np.int64]:
        """First byte in the file of each image, then where the last one ends, `(n + 1,)`."""
        return self._offsets.astype(np.int64)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, numbers: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return the images with these numbers, `(len(numbers), side, side, 3)`.

        Raises:
            DatasetError: If one of them is damaged so that it cannot be decoded.
        """
        out = np.empty((len(numbers), *self.shape[1:]), dtype=np.uint8)
        for row, number in enumerate(numbers):
            content = self._content[self._offsets[number] : self._offsets[number + 1]].tobytes()
            try:
                out[row] = jpeg.decode(content, self.shape[1])
            except Exception as error:  # damaged files make decoders raise almost anything
                raise DatasetError(
                    f"{self._path} must be as it was written, its image {number} cannot be "
                    f"decoded: {error}. Delete manifest.json beside it and run the prepare-data "
                    "stage, which keeps the sound parts."
                ) from error
        return out
