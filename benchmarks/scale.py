"""Whether preparation and loading keep their promises at the size of ImageNet-1k.

    python benchmarks/scale.py                      # 1.28 million images; minutes on two cores
    python benchmarks/scale.py --records 50000      # a short one

Prepares generated images of 8 px, as many as ImageNet-1k has, with an interruption half way, and
then loads them as a training would. What is measured does not depend on the size of an image:
memory that must not grow with their number, time that must grow no faster, how long it takes until
the first batch, and whether an epoch that is entered anywhere goes on exactly. The last line is
JSON; the exit status is 1 when a bound is missed.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from numpy.typing import NDArray
from PIL import Image

from data.loaders import Batch, Batches
from data.prepare import SHARD_IMAGES, prepare
from data.prepared import PreparedData, verify
from data.records import Record, Source, Split
from data.splits import Subset, split
from training import hardware

RECORDS = 1_281_167
"""Training images of ImageNet-1k."""

SIDE = 8
"""Side of the images, in pixels."""

CLASSES = 1000
BATCH_SIZE = 256

WORKERS = 8
"""Threads that decode: more than processors, as images this small take less than waking one."""

CUT = 0.55
"""Where the preparation is interrupted, as a fraction of the images."""

GROWTH_MIB, SLOWDOWN, START_SECONDS = 16.0, 1.25, 2.0
"""Bounds: growth of the peak of memory from a tenth of the images to all; time of an image in the
last tenth over that in the first; time from nothing open to the first batch, and from the command
to the first image after a cut. Times are the processor's: of the wall's, neighbours take theirs."""


class CutOff(Exception):
    """Ends a preparation as a crash would."""


class GeneratedSource(Source):
    """Labelled noise, each image a function of its number; as pictures, like `drawn10`'s."""

    spec = "generated"
    class_names = tuple(f"class {number}" for number in range(CLASSES))

    def __init__(self, records: int) -> None:
        self.counts = {"train": records}

    def identity(self) -> dict[str, Any]:
        """Return what determines the images."""
        return {"kind": self.spec, "counts": self.counts}

    def records(self, split: Split, start: int = 0) -> Iterator[Record]:
        """Yield pictures; the first one comes at once wherever it is."""
        pixels: NDArray[np.uint8] | None = None
        for index in range(start, self.counts[split]):
            place = index % SHARD_IMAGES
            if place == 0 or pixels is None:
                pixels = block(index // SHARD_IMAGES)
            picture = Image.fromarray(pixels[place])
            yield Record(f"{split}/{index}", picture, index * 7919 % CLASSES)


def block(number: int) -> NDArray[np.uint8]:
    """Return images `number * 4096` and on, `(4096, SIDE, SIDE, 3)`."""
    rng = np.random.default_rng(number)
    return rng.integers(0, 256, (SHARD_IMAGES, SIDE, SIDE, 3), dtype=np.uint8)


@dataclass
class Meter:
    """Notes time and memory at every tenth of the preparation."""

    cut: int | None
    wall: dict[int, float] = field(default_factory=dict)
    processor: dict[int, float] = field(default_factory=dict)
    peak_mib: dict[int, float] = field(default_factory=dict)
    began: float | None = None
    """Processor time at which what was there was known."""

    def report(self, done: int, total: int) -> None:
        """Take the place of what shows progress."""
        if self.began is None:
            self.began = time.process_time()
        tenth, rest = divmod(done * 10, total)
        if rest < 10 and tenth not in self.wall:
            self.wall[tenth] = time.perf_counter()
            self.processor[tenth] = time.process_time()
            self.peak_mib[tenth] = peak_mib()
        if self.cut is not None and done >= self.cut:
            raise CutOff


def peak_mib() -> float:
    """Return the largest memory that this process has had resident so far, in MiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def measure_preparation(directory: Path, records: int, pixel_format: Any) -> dict[str, Any]:
    """Prepare with a cut, and return what it took."""
    source = GeneratedSource(records)
    options: dict[str, Any] = {
        "side": SIDE,
        "workers": WORKERS,
        "pixel_format": pixel_format,
    }
    before, after = Meter(cut=round(records * CUT)), Meter(cut=None)
    with suppress(CutOff):
        prepare(source, directory, report=before.report, **options)
    resumed = time.process_time()
    found = prepare(source, directory, report=after.report, **options)
    ended = time.perf_counter()
    image = {
        name: (last - first) / (records / 10)
        for name, first, last in (
            ("first_wall", before.wall[0], before.wall[1]),
            ("last_wall", after.wall[9], after.wall[10]),
            ("first_processor", before.processor[0], before.processor[1]),
            ("last_processor", after.processor[9], after.processor[10]),
        )
    }
    assert after.began is not None
    verified = []
    for full in (False, True):
        started = time.process_time()
        if verify(directory, full=full) is not None:
            raise AssertionError("what was just written does not verify")
        verified.append(time.process_time() - started)
    return {
        "shards": len(found.shards["train"]),
        "bytes_per_image": sum(entry.size for entry in found.shards["train"]) / records,
        "prepare_seconds": before.wall[5] - before.wall[0] + ended - after.wall[6],
        "wall_microseconds_first_tenth": 1e6 * image["first_wall"],
        "wall_microseconds_last_tenth": 1e6 * image["last_wall"],
        "processor_microseconds_first_tenth": 1e6 * image["first_processor"],
        "processor_microseconds_last_tenth": 1e6 * image["last_processor"],
        "peak_mib_at_a_tenth": before.peak_mib[1],
        "peak_mib_at_the_end": peak_mib(),
        "go_on_processor_seconds": after.began - resumed,
        "verify_quick_processor_seconds": verified[0],
        "verify_full_processor_seconds": verified[1],
    }


def open_batches(directory: Path) -> Batches:
    """Open a prepared directory as a training does."""
    opened = PreparedData.open(directory)
    train: Subset = split(opened, val_fraction=0.1, test_fraction=0.1, seed=0).train
    cpu = torch.device("cpu")
    batch_size = min(BATCH_SIZE, len(train))
    return Batches(train, batch_size=batch_size, side=SIDE, flip=False, seed=0, device=cpu)


def measure_loading(directory: Path, pixel_format: str) -> dict[str, Any]:
    """Enter an epoch at its begin, middle and end, then go through it without a break."""
    steps = open_batches(directory).steps_per_epoch
    places = {"first": 0, "middle": steps // 2, "last": steps - 1}
    starts: dict[str, float] = {}
    entered: dict[int, Batch] = {}
    for name, step in places.items():
        wall, processor = time.perf_counter(), time.process_time()
        entered[step] = next(open_batches(directory).epoch(0, start_step=step))
        starts[f"start_processor_seconds_{name}"] = time.process_time() - processor
        starts[f"start_wall_seconds_{name}"] = time.perf_counter() - wall
    same = 0
    ends = [time.perf_counter()]
    for step, batch in enumerate(open_batches(directory).epoch(0)):
        ends.append(time.perf_counter())
        if step in entered:
            same += is_same(batch, entered[step])
    if pixel_format == "raw":
        check_content(entered[places["middle"]])
    return {
        "steps": steps,
        **starts,
        "same_batches": same == len(entered),
        "images_per_second": BATCH_SIZE * steps / (ends[-1] - ends[1]) if steps > 1 else None,
    }


def is_same(one: Batch, other: Batch) -> bool:
    """Tell whether two batches hold the same images in the same order."""
    return np.array_equal(one.ids, other.ids) and torch.equal(one.images, other.images)


def check_content(batch: Batch) -> None:
    """Compare images with those that the source generates for their numbers."""
    for number, image in zip(batch.ids[:20], batch.images, strict=False):
        expected = block(int(number) // SHARD_IMAGES)[int(number) % SHARD_IMAGES]
        found = ((image + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
        if not np.array_equal(found, expected):
            raise AssertionError(f"image {number} is not the one that was generated")


def missed_bounds(figures: dict[str, Any]) -> list[str]:
    """Name the promises that were not kept."""
    growth = figures["peak_mib_at_the_end"] - figures["peak_mib_at_a_tenth"]
    first, last = (figures[f"processor_microseconds_{end}_tenth"] for end in ("first", "last"))
    starts = [figures[f"start_processor_seconds_{name}"] for name in ("first", "middle", "last")]
    kept = {
        "memory": growth <= GROWTH_MIB,
        "linear": last <= SLOWDOWN * first,
        "goes on": figures["go_on_processor_seconds"] <= START_SECONDS,
        "loader starts": max(starts) <= START_SECONDS,
        "exact position": figures["same_batches"],
    }
    return [name for name, value in kept.items() if not value]


def main() -> int:
    """Measure and print; the exit status says whether the bounds are kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=RECORDS, help="images; 100 at least")
    parser.add_argument("--format", choices=["raw", "jpeg"], default="raw")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="scale-") as scratch:
        directory = Path(scratch) / "prepared"
        figures = {
            "hardware": hardware.describe(),
            "versions": {
                "python": sys.version.split()[0],
                "torch": torch.__version__,
                "numpy": np.__version__,
                "pillow": PIL.__version__,
            },
            "records": arguments.records,
            "format": arguments.format,
            **measure_preparation(directory, arguments.records, arguments.format),
            **measure_loading(directory, arguments.format),
        }
    figures["missed"] = missed_bounds(figures)
    for name, value in figures.items():
        print(f"{name:<40}{value:.4g}" if isinstance(value, float) else f"{name:<40}{value}")
    print(json.dumps(figures))
    return 1 if figures["missed"] else 0


if __name__ == "__main__":
    sys.exit(main())
