"""From the host's memory to the device: one batch ahead, without making either wait.

Dimension key: B = images in the batch, P = side of the prepared images in pixels.
"""

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.splits import Subset


class Resident:
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


def send(values: NDArray[Any], device: torch.device) -> Tensor:
    """Return an array as a tensor on a device, without making the host wait for the device.

    Args:
        values: Of any shape and dtype.
        device: Where it goes; what is on its way to a GPU lies in memory that is pinned.
    """
    return _pinned(torch.from_numpy(values), device).to(device, non_blocking=True)


def read_ahead(
    gather: Callable[[NDArray[np.int64]], Tensor],
    groups: Sequence[NDArray[np.int64]],
    device: torch.device,
    resident: Resident | None = None,
) -> Generator[tuple[NDArray[np.int64], Tensor], None, None]:
    """Yield positions and what was gathered, on the device; a thread reads the next meanwhile.

    Args:
        gather: Reads the rows at some positions, on the host.
        groups: The positions of each batch.
        device: Where the rows go.
        resident: Keeps them there; groups of which it has all are not read again.
    """

    def read(positions: NDArray[np.int64]) -> Tensor:
        return _pinned(gather(positions), device)

    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as pool:

        def begin(number: int) -> Future[Tensor] | None:
            if number == len(groups) or (resident and resident.has(groups[number])):
                return None
            return pool.submit(read, groups[number])

        reading = begin(0)
        for number, positions in enumerate(groups):
            if reading is not None:
                rows = reading.result().to(device, non_blocking=True)
                if resident:
                    resident.put(positions, rows)
            else:
                assert resident is not None  # or it would have been read
                rows = resident.get(positions)
            reading = begin(number + 1)
            yield positions, rows


def _pinned(values: Tensor, device: torch.device) -> Tensor:
    # From memory that may be swapped out a copy begins when the device has done all before it.
    return values.pin_memory() if device.type == "cuda" else values
