"""How fast images come from an address, through a cache on this machine.

    python benchmarks/shard_cache.py                       # 8,192 images of 160 px; minutes
    python benchmarks/shard_cache.py --latency 100         # milliseconds until a server answers

A web server in a process of its own stands in for the store; it answers after a delay. One epoch
after the other is read, as a training does, but nothing is computed: from local files; from the
server with no cache; while a cache that is large enough is filled; from the full cache, for the
first time in a process and once more; and with a cache of a tenth. All epochs are of the same
seed, so that they must give the same bytes. The last line is JSON; the exit status is 1 when they
do not, or a bound is missed.
"""

import argparse
import asyncio
import hashlib
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data import manifest, remote_pixels
from data.loaders import Batches
from data.manifest import Manifest
from data.patience import Patience
from data.prepared import PreparedData
from data.pushed_shards import push, take
from data.remote_pixels import RemotePixels
from data.shard_cache import DIRECTORY_VARIABLE, LIMIT_VARIABLE
from data.shards import describe, write_pixels, write_shard_record
from data.splits import Subset
from training import hardware

IMAGES, SIDE, SHARD_IMAGES, BATCH_SIZE = 8192, 160, 1024, 256

LATENCY_MILLISECONDS = 30.0
"""Of the server: what object stores take until the first byte."""

TURNS = 3
"""How often each way is measured; in turns."""

FULL_OVER_LOCAL = 2.5
"""Bound: processor time of an image from a full cache over that of one from local files, both read
once before. Not the wall's time, of which neighbours take theirs."""

NEEDED_PER_SECOND = 5000
"""Images that a fast GPU may want in a second; only to say what that takes."""


class Answers(asyncio.Protocol):
    """One connection of the stand-in: GET with a range, answered after a delay."""

    def __init__(self, folder: Path, latency: float) -> None:
        self._folder, self._latency, self._received = folder, latency, b""

    def connection_made(self, transport: Any) -> None:
        """Begin."""
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Take in a part of a request, and answer when it is whole."""
        self._received += data
        while b"\r\n\r\n" in self._received:
            head, _, self._received = self._received.partition(b"\r\n\r\n")
            asyncio.get_running_loop().call_later(self._latency, self._answer, head.decode())

    def _answer(self, head: str) -> None:
        path = self._folder / head.split()[1].lstrip("/")
        if not path.is_file():
            self._transport.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            return
        size, found = path.stat().st_size, re.search(r"(?i)range: bytes=(\d+)-(\d*)", head)
        start, end = (int(found[1]), int(found[2] or size - 1) + 1) if found else (0, size)
        with path.open("rb") as file:
            body = os.pread(file.fileno(), end - start, start)
        status = "206 Partial Content" if found else "200 OK"
        length = f"Content-Length: {len(body)}\r\nContent-Range: bytes {start}-{end - 1}/{size}"
        self._transport.write(f"HTTP/1.1 {status}\r\n{length}\r\n\r\n".encode() + body)


def serve(folder: Path, latency: float, ports: Any) -> None:
    """Serve a folder until this process is ended."""

    async def forever() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(partial(Answers, folder, latency), "127.0.0.1", 0)
        ports.put(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(forever())


def make_prepared(directory: Path, images: int) -> Manifest:
    """Write noise as `data.prepare` writes images."""
    directory.mkdir(parents=True)
    names = []
    for first in range(0, images, SHARD_IMAGES):
        rng = np.random.default_rng(first)
        count = min(SHARD_IMAGES, images - first)
        pixels = (rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8) for _ in range(count))
        path = directory / f"train-{first // SHARD_IMAGES:05d}.npy"
        write_pixels(path, pixels, SIDE, most=count)
        shard = describe(path, made_from="noise", images=count, labels=None, skipped=[], hashes="")
        write_shard_record(directory, shard)
        names.append(path.stem)
    found = manifest.build(
        directory,
        {"train": names},
        side=SIDE,
        class_names=None,
        made_from="noise",
        pixel_format="raw",
    )
    manifest.write(directory, found)
    return found


def read_epoch(directory: Path, *, before: int = 0) -> dict[str, float | str]:
    """Read an epoch; return images/s, processor time of an image, what was fetched, a digest.

    Args:
        directory: Of the prepared images.
        before: How often it is read before, by the same objects.
    """
    opened = PreparedData.open(directory)
    train = Subset(opened.train, np.arange(len(opened.train), dtype=np.int64))
    made = Batches(
        train,
        batch_size=BATCH_SIZE,
        side=SIDE,
        flip=False,
        seed=0,
        device=torch.device("cpu"),
    )
    # What is done with the pixels afterwards is the same for all, and left out.
    made._augment = lambda pixels, ids, epoch: pixels  # type: ignore[method-assign]
    for _ in range(before):
        for _batch in made.epoch(0):
            pass
    began, processor = time.perf_counter(), time.process_time()
    digest, count = hashlib.blake2b(), 0
    for batch in made.epoch(0):
        count += len(batch.ids)
        digest.update(batch.images[:, :, ::40, ::40].contiguous().numpy().tobytes())
        digest.update(batch.ids.tobytes())
    seconds = time.perf_counter() - began
    (pixels,) = opened.train._shards[:1]
    return {
        "images_per_second": count / seconds,
        "processor_microseconds": 1e6 * (time.process_time() - processor) / count,
        "fetched": pixels.fetched if isinstance(pixels, RemotePixels) else 0,
        "digest": digest.hexdigest(),
    }


def ways(root: Path, size: int) -> Iterator[tuple[str, Callable[[], dict[str, float | str]]]]:
    """Yield what is compared, in the order of a turn."""

    def through(cache: str, share_of_set: float, before: int = 0) -> dict[str, float | str]:
        os.environ[DIRECTORY_VARIABLE] = str(root / cache)
        os.environ[LIMIT_VARIABLE] = str(share_of_set * size / 2**30)
        return read_epoch(root / "remote", before=before)

    def emptied(cache: str) -> str:
        for path in (root / cache).glob("*/have"):
            path.unlink()  # without it a set is begun anew
        return cache

    yield "local files", lambda: read_epoch(root / "local", before=1)
    yield "no cache", lambda: through("none", 0)
    yield "cache being filled", lambda: through(emptied("whole"), 1.2)
    yield "cache full", lambda: through("whole", 1.2)
    yield "cache full again", lambda: through("whole", 1.2, before=1)
    yield "cache of a tenth", lambda: through("tenth", 0.1)


def measure(root: Path, size: int, turns: int) -> tuple[dict[str, dict[str, float]], bool]:
    """Return the medians of every way, and whether all gave the same bytes."""
    seen: dict[str, list[dict[str, float | str]]] = {}
    for _ in range(turns):
        for name, read in ways(root, size):
            seen.setdefault(name, []).append(read())
    digests = {row["digest"] for rows in seen.values() for row in rows}
    medians = {
        name: {
            key: float(np.median([float(row[key]) for row in rows]))
            for key in ("images_per_second", "processor_microseconds", "fetched")
        }
        for name, rows in seen.items()
    }
    for name, rows in seen.items():
        rates = [float(row["images_per_second"]) for row in rows]
        medians[name] |= {"least": min(rates), "most": max(rates)}
    return medians, len(digests) == 1


def missed_bounds(figures: dict[str, Any]) -> list[str]:
    """Name the promises that were not kept."""
    kept = {
        "same bytes": figures["same_bytes"],
        "cache full again": figures["cache_full_over_local"] <= FULL_OVER_LOCAL,
    }
    return [name for name, value in kept.items() if not value]


def main() -> int:
    """Measure and print; the exit status says whether the bounds are kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--latency", type=float, default=LATENCY_MILLISECONDS, help="milliseconds")
    parser.add_argument("--turns", type=int, default=TURNS)
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="shards-") as scratch:
        root = Path(scratch)
        found = make_prepared(root / "local", arguments.images)
        size = sum(entry.size for entry in found.shards["train"])
        nothing: dict[str, Any] = {"report": lambda done, total: None, "patience": Patience()}
        push(root / "local", str(root / "there"), **nothing)
        ports = context.Queue()
        server = context.Process(
            target=serve, args=(root / "there", arguments.latency / 1e3, ports), daemon=True
        )
        server.start()
        take(f"http://127.0.0.1:{ports.get()}", root / "remote", made_from="noise", **nothing)
        medians, same = measure(root, size, arguments.turns)
        server.terminate()
    image = SIDE * SIDE * 3
    figures: dict[str, Any] = {
        "hardware": hardware.describe(),
        "images": arguments.images,
        "latency_milliseconds": arguments.latency,
        "requests_at_once": remote_pixels.REQUESTS,
        "same_bytes": same,
        **{name.replace(" ", "_"): values for name, values in medians.items()},
        "megabytes_per_second_needed": NEEDED_PER_SECOND * image / 1e6,
    }
    full, local = (
        medians[name]["processor_microseconds"] for name in ("cache full again", "local files")
    )
    figures["cache_full_over_local"] = full / local
    figures["missed"] = missed_bounds(figures)
    print(
        f"{'':<20}{'images/s':>10}{'MB/s':>8}{'least':>8}{'most':>8}{'µs/image':>10}{'fetched':>9}"
    )
    for name, row in medians.items():
        print(
            f"{name:<20}{row['images_per_second']:>10.0f}"
            f"{row['images_per_second'] * image / 1e6:>8.0f}{row['least']:>8.0f}{row['most']:>8.0f}"
            f"{row['processor_microseconds']:>10.0f}{row['fetched']:>9.0f}"
        )
    print(json.dumps(figures))
    return 1 if figures["missed"] else 0


if __name__ == "__main__":
    sys.exit(main())
