"""Decoding in threads: in order, a few images ahead, and without side effects on the process."""

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import threadpoolctl
import torch
from numpy.typing import NDArray

from data.decode import UndecodableError, decode_square
from data.records import Record

Decoded = tuple[Record, NDArray[np.uint8] | UndecodableError]
"""A record, and its pixels `(side, side, 3)` or why there are none."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class DecodingPool:
    """Threads that decode; made by `decoding_pool`."""

    def __init__(self, executor: ThreadPoolExecutor, ahead: int) -> None:
        self._executor, self._ahead = executor, ahead

    def decode(self, records: Iterator[Record], side: int) -> Iterator[Decoded]:
        """Yield the records in order, decoded, with few of them waiting in memory.

        Args:
            records: What to decode; read in the calling thread.
            side: Height and width of the result, in pixels.
        """

        def decode(record: Record) -> Decoded:
            try:
                return record, decode_square(record.image, side)
            except UndecodableError as error:
                return record, error

        return self.in_order(decode, records)

    def in_order(self, work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Yield `work(item)` of all items, in their order, with few of them waiting in memory.

        Args:
            work: Called in the threads; what it raises is raised here.
            items: What to work on; read in the calling thread.
        """
        waiting: deque[Future[Result]] = deque()
        for item in items:
            waiting.append(self._executor.submit(work, item))
            if len(waiting) > self._ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@contextmanager
def decoding_pool(workers: int) -> Iterator[DecodingPool]:
    """Start threads that decode, and stop them at the end.

    Meanwhile torch and NumPy use one thread per caller and Pillow's warnings are ignored; these
    belong to the whole process and are put back afterwards.

    Args:
        workers: Number of threads.
    """
    with (
        pillow_warnings_ignored(),
        _one_torch_thread(),
        threadpoolctl.threadpool_limits(1, user_api="blas"),
        ThreadPoolExecutor(workers, thread_name_prefix="decode") as executor,
    ):
        yield DecodingPool(executor, ahead=4 * workers)


@contextmanager
def pillow_warnings_ignored() -> Iterator[None]:
    """Keep quiet about what is odd and does no harm: damaged EXIF, palettes, large pictures.

    Around all decoding and not around each image, because the filters belong to the process and
    not to the thread. Without it, a user who turns warnings into errors would lose images.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    # Each decoding thread would start a team of torch's own, and the teams' waiting in loops cost
    # ten times the work itself on two processors.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
