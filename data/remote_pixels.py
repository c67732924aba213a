"""Prepared images that lie at an address: fetched ahead of where they are needed, and kept here.

The order of an epoch is known when it begins, so images are on their way before they are asked for:
those that the cache on this machine lacks, one request each, as neighbours in an epoch are none in
a shard. Meanwhile a few long requests fill the cache, as far as it reaches, from one end. What
comes back is the same whatever the cache has, and in the order that was asked for.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from data import jpeg
from data.patience import DownloadError, Patience, Stop, TryAgainError, never, persist
from data.records import DatasetError
from data.remote_files import read_block
from data.shard_cache import CacheSpace, ShardCache, digest_of_image
from data.shards import PixelFormat

REQUESTS = 32
"""Images that are asked for at once."""

AHEAD_BYTES = 2**28
"""Images that are on their way, or have come and were not used yet; 13 batches of 256 at 160 px."""

FILL_REQUESTS = 4
"""Long requests at once by which the cache is filled."""

FILL_BYTES = 2**23
"""Length of such a request."""

FILL_FROM = 0.5
"""Smallest part of a split's images to be read for which the cache is filled, and smallest part of
a long request's images that must be missing; less is fetched one by one when it is needed."""

WRONG_COPIES = 3
"""Copies of an image with other bytes than were pushed after which no other one is asked for."""

PATIENCE = Patience()
"""How often and how long a store is asked."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RemoteShard:
    """A shard at an address."""

    url: str
    """Of the file that holds the pixels."""
    index: NDArray[np.uint64]
    """`(n + 1, 2)`, see `data.pushed_shards.read_index`."""


class RemotePixels:
    """The images of a split, `(n, S, S, 3)`; indexed like an array, fetched when asked for."""

    def __init__(
        self,
        shards: Sequence[RemoteShard],
        *,
        name: str,
        side: int,
        pixel_format: PixelFormat,
        stop: Stop = never,
    ) -> None:
        """Take note of where they are; nothing is fetched, and no cache opened.

        Args:
            shards: In the order of the images.
            name: Of the split in the cache: another name for other images.
            side: Height and width of the images, in pixels.
            pixel_format: How they are stored.
            stop: Asked while a store is waited for; true ends it with `InterruptedError`.
        """
        counts = [len(shard.index) - 1 for shard in shards]
        self.shape = (sum(counts), side, side, 3)
        self.fetched = 0
        """Images that came from the address, for those who measure."""
        self._urls = [shard.url for shard in shards]
        self._firsts = np.cumsum([0, *counts])
        places = [shard.index[:, 0].astype(np.int64) for shard in shards]
        self._begins = np.concatenate([each[:-1] for each in places])
        self._sizes = np.concatenate([np.diff(each) for each in places])
        self._digests = np.concatenate([shard.index[:-1, 1] for shard in shards])
        self._name, self._pixel_format, self._asked_to_stop = name, pixel_format, stop
        self._ahead: list[_Ahead] = []
        self._opening = threading.Lock()
        self._recovering = threading.Lock()

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, numbers: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return the images with these numbers, `(len(numbers), S, S, 3)`.

        Raises:
            DownloadError: If the store fails, or sends something else, as often as it is asked.
            DatasetError: If the store refuses, or the cache's folder cannot be used.
            InterruptedError: If `stop` said so.
        """
        out = np.empty((len(numbers), *self.shape[1:]), dtype=np.uint8)
        kept: dict[int, bytes] = {}
        coming: dict[int, Future[bytes]] = {}
        cache, pool, is_over = self.cache, self.pool, threading.Event()
        try:
            for row, number in enumerate(numbers.tolist()):
                future = self._taken(number)
                if future is None and self._pixel_format == "raw":
                    if cache.read_into(number, out[row].reshape(-1).data):
                        continue
                elif future is None and (content := cache.get(number)) is not None:
                    kept[row] = content
                    continue
                coming[row] = future or pool.submit(
                    self.fetch, number, lambda: is_over.is_set() or self.stopped()
                )
            for ahead in tuple(self._ahead):
                ahead.go_on()
            # What takes the processor comes last, while others are on their way.
            for row, content in kept.items():
                self._unpack(content, out[row])
            for row, future in coming.items():
                self._unpack(future.result(), out[row])
        finally:  # of what was not waited for, if one has failed
            is_over.set()  # or each of those under way would ask for as long as this one has
            for future in coming.values():
                future.cancel()
        return out

    @contextmanager
    def announced(self, groups: Iterable[NDArray[np.int64]], *, fill: bool) -> Iterator[None]:
        """Fetch images ahead for the `with` block.

        Args:
            groups: The numbers that will be asked for together, in the order in which they will be.
            fill: Whether the whole cache is filled meanwhile, with whatever fits.
        """
        ahead = _Ahead(self, groups)
        self._ahead.append(ahead)
        try:
            ahead.go_on()
            if fill:
                ahead.fill()
            yield
        finally:
            self._ahead.remove(ahead)
            ahead.close()

    @property
    def cache(self) -> ShardCache:
        """The images that are on this machine."""
        with self._opening:
            return self._cache

    @property
    def pool(self) -> ThreadPoolExecutor:
        """The threads that fetch single images."""
        with self._opening:
            return self._pool

    def size(self, number: int) -> int:
        """Return the bytes of an image."""
        return int(self._sizes[number])

    def stopped(self) -> bool:
        """Whether nobody wants anything any more."""
        return self._asked_to_stop() or not threading.main_thread().is_alive()

    def fetch(self, number: int, stop: Stop) -> bytes:
        """Return an image from the address, and keep it; from the cache if it is there by now."""
        content = self.cache.get(number)
        if content is None:
            (content,) = self._read(number, number + 1, stop)
            self.cache.put({number: content})
        return content

    def stretches(self) -> Iterator[tuple[int, int]]:
        """Yield the neighbours that one long request brings: first number, and after the last."""
        for first, end in zip(self._firsts[:-1].tolist(), self._firsts[1:].tolist(), strict=True):
            while first < end:
                limit = self._begins[first] + FILL_BYTES
                last = first + int(np.searchsorted(self._begins[first:end], limit))
                yield first, last
                first = last

    def fetch_stretch(self, first: int, end: int, stop: Stop) -> None:
        """Keep neighbours from the address, unless most of them are here."""
        absent = self.cache.missing(np.arange(first, end))
        if len(absent) <= FILL_FROM * (end - first):
            return
        first, end = int(absent[0]), int(absent[-1]) + 1
        contents = self._read(first, end, stop)
        self.cache.put({number: contents[number - first] for number in absent.tolist()})

    @cached_property
    def _cache(self) -> ShardCache:
        return ShardCache(CacheSpace.of_environment(), self._name, self._sizes, self._digests)

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(REQUESTS, thread_name_prefix="shards")

    def _unpack(self, content: bytes, out: NDArray[np.uint8]) -> None:
        if self._pixel_format == "jpeg":
            out[:] = jpeg.decode(content, self.shape[1])
        else:
            out[:] = np.frombuffer(content, dtype=np.uint8).reshape(self.shape[1:])

    def _taken(self, number: int) -> Future[bytes] | None:
        for ahead in tuple(self._ahead):
            future = ahead.take(number)
            if future is not None:
                return future
        return None

    def _read(self, first: int, end: int, stop: Stop) -> list[bytes]:
        """Return neighbours in a shard by one request, once they are what was pushed."""
        shard = int(np.searchsorted(self._firsts, first, side="right")) - 1
        url, begin = self._urls[shard], int(self._begins[first])
        until = int(self._begins[end - 1] + self._sizes[end - 1])
        wrong = 0

        def attempt() -> list[bytes]:
            nonlocal wrong
            if stop():
                raise InterruptedError("Stopped while images were fetched.")
            whole = read_block(url, begin, until, PATIENCE, stop)
            contents = []
            for number in range(first, end):
                start = int(self._begins[number]) - begin
                content = whole[start : start + self.size(number)]
                if digest_of_image(content) != int(self._digests[number]):
                    wrong += 1
                    place = number - int(self._firsts[shard])
                    if wrong >= WRONG_COPIES:
                        raise DownloadError(
                            f"{url} must be as it was pushed; {wrong} copies of its image {place} "
                            "had other bytes. Delete it there, and push again from the machine "
                            "that prepared the images."
                        )
                    raise TryAgainError(f"image {place} came with other bytes than were pushed")
                contents.append(content)
            return contents

        try:
            contents = attempt()
        except TryAgainError:
            # One asks again and the others wait for it: a server that fails needs no crowd.
            with self._recovering:
                contents = persist(attempt, url, PATIENCE, stop)
        self.fetched += end - first
        return contents


class _Ahead:
    """Images that somebody will ask for, on their way. Any thread may use it."""

    def __init__(self, pixels: RemotePixels, groups: Iterable[NDArray[np.int64]]) -> None:
        self._pixels, self._groups = pixels, iter(groups)
        self._coming: dict[int, Future[bytes]] = {}
        self._bytes = 0
        self._lock = threading.Lock()
        self._closed = False

    def go_on(self) -> None:
        """Ask for images, as long as there is room for them."""
        cache, pool = self._pixels.cache, self._pixels.pool
        with self._lock:
            while not self._closed and self._bytes < AHEAD_BYTES:
                group = next(self._groups, None)
                if group is None:
                    return
                for number in cache.missing(group).tolist():
                    if number not in self._coming:
                        self._coming[number] = pool.submit(
                            self._pixels.fetch, number, self._stopped
                        )
                        self._bytes += self._pixels.size(number)

    def take(self, number: int) -> Future[bytes] | None:
        """Return an image that is on its way, once; None if it is not."""
        with self._lock:
            future = self._coming.pop(number, None)
            if future is not None:
                self._bytes -= self._pixels.size(number)
            return future

    def fill(self) -> None:
        """Let the cache be filled, unless another process is at it."""
        # Nobody waits for it: it ends by itself, at the latest with its request.
        threading.Thread(target=self._fill, name="fill-shards", daemon=True).start()

    def close(self) -> None:
        """Want nothing any more."""
        with self._lock:
            self._closed = True
            for future in self._coming.values():
                future.cancel()
            self._coming.clear()

    def _stopped(self) -> bool:
        return self._closed or self._pixels.stopped()

    def _fill(self) -> None:
        cache, stretches, lock = self._pixels.cache, self._pixels.stretches(), threading.Lock()

        def work() -> None:
            while not (self._stopped() or cache.is_full):
                with lock:
                    stretch = next(stretches, None)
                if stretch is None:
                    return
                self._pixels.fetch_stretch(*stretch, self._stopped)

        while not (self._stopped() or cache.is_full):
            with cache.filling() as is_ours:
                if is_ours:
                    self._in_threads(work)
                    return
            time.sleep(1)  # another process is at it, or this one before, for a moment

    def _in_threads(self, work: Callable[[], None]) -> None:
        try:
            with ThreadPoolExecutor(FILL_REQUESTS, thread_name_prefix="fill-shards") as pool:
                for each in [pool.submit(work) for _ in range(FILL_REQUESTS)]:
                    each.result()
        except InterruptedError:
            return
        except (DownloadError, DatasetError) as error:
            # Whoever needs the image says so, too, and that ends the stage.
            _log.warning("The shard cache is not filled any further: %s", error)
