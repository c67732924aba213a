"""Tokens of images on disk: what the lower blocks of a network made of them, mapped into memory.

A file is an array of NumPy's whose 16-bit integers are the bits of bfloat16 numbers, which NumPy
does not know. Their 8 significant bits round each number by up to 0.4 %.

Dimension key: N = images, T = tokens of an image, the class token first, D = their width.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.splits import Subset

BYTES_PER_NUMBER = 2


@contextmanager
def writing(path: Path, shape: tuple[int, int, int]) -> Iterator[Callable[[Tensor], None]]:
    """Write a file of tokens, some images at a time, in memory that does not grow.

    It is written and not mapped: on a full disk a map ends the process.

    Args:
        path: New file, or one to write anew.
        shape: `(N, T, D)`, of all that will be written.

    Yields:
        What takes the next images' tokens, `(B, T, D)`, on any device, in any floating dtype.

    Raises:
        OSError: If the disk is full.
    """
    header = {"shape": shape, "fortran_order": False, "descr": "<u2"}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)

        def append(tokens: Tensor) -> None:
            bits = tokens.to(torch.bfloat16).cpu().contiguous().view(torch.uint16)
            file.write(bits.numpy().tobytes())

        yield append


class Tokens:
    """Kept tokens of the images of a subset."""

    def __init__(self, path: Path, subset: Subset) -> None:
        """Map a file into memory.

        Args:
            path: What `writing` wrote: one row for each image of `subset`, in its order.
            subset: The images, for their labels and numbers.
        """
        self.subset = subset
        self._rows: NDArray[np.uint16] = np.load(path, mmap_mode="r")

    def gather(self, positions: NDArray[np.int64]) -> Tensor:
        """Return tokens by the images' positions in the subset, `(len(positions), T, D)`.

        They are bfloat16, on the CPU.
        """
        return torch.from_numpy(np.asarray(self._rows[positions])).view(torch.bfloat16)
