"""How near preparing images comes to only decoding them, and whether memory grows with them.

    python benchmarks/prepare.py                            # on JPEG files that it makes itself
    python benchmarks/prepare.py --photos samples.parquet   # on photos, in a column `image`

The whole stage, from listing a folder to the last file written, is measured in turn with Pillow
opening, loading and converting the same files to RGB on as many threads and doing nothing else.
(On one, a processor decodes some 7 % more: neighbours share caches and memory.) Rates are images
per second of the processors' time, all threads and child processes counted, so that
neither the number of processors nor what else the machine does matters. Before that, fresh
processes as the workflow starts them prepare few and many images. The exit status is 1 when a
bound is missed.

The last line is JSON. `ratio` is the median over pairs of neighbours (`ratio_lowest`,
`ratio_highest`) of `prepare_per_core` over `decode_per_core`, both in images per second;
`prepare_per_second` and `decode_per_second` are by the clock, on all `processors`.
`peak_mib_few` and `peak_mib_many` are the peaks of resident memory with `few` and `many` images.
`pixels` and `bytes` are means over the files. `missed` names the bounds that were not kept.
"""

import argparse
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pyarrow.parquet
import torch
from PIL import Image, features

from data.canary import NoiseSource
from data.decoding_pool import decoding_pool
from data.processors import available_processors
from training import hardware, prepare_data, store
from training.configure import build_settings
from training.runner import run_stage
from training.stages import STAGES
from training.store import StageRequest

RATIO = 0.5
"""Smallest ratio of preparing to decoding that counts as near."""

GROWTH, GROWTH_MIB = 0.1, 20.0
"""Largest growth of the peak of memory from few to many images: a fraction, and in MiB besides."""

FEW, MANY = 1000, 10_000
"""Images between which memory must stay flat. The ratio is measured on few."""

MADE, LONG_SIDE_PX, QUALITY = 100, 500, 81
"""Files that are made where no photos are given, their longer side, and their quality."""

SUBSAMPLINGS = ("4:4:4", "4:4:4", "4:4:4", "4:2:0")
"""Of the colours of these files, in turn: of 200 original ones of ImageNet 77 % keep them whole. So
the files have, on average, as many bytes as those (110 kB), as large squares (149,000 pixels), and
4 % fewer pixels."""

ROOT = Path(__file__).parents[1]

LAUNCH = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
"""Runs a command and prints the peak of its memory. A process of its own, and a small one, because
what the kernel counts begins with the memory of whoever started the command."""


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; the exit status says whether the bounds are kept."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--photos", type=Path, help="Parquet file with encoded images")
    parser.add_argument("--turns", type=int, default=5, help="of preparing and decoding each")
    parser.add_argument("--few", type=int, default=FEW, help="images")
    parser.add_argument("--many", type=int, default=MANY, help="images, for the peak of memory")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="prepare-") as name:
        scratch = Path(name)
        originals = write_originals(scratch / "originals", options.photos)
        few = link(originals, scratch / "few", options.few)
        many = link(originals, scratch / "many", options.many)
        peaks = [peak_mib(folder, scratch / "peaks" / folder.name) for folder in (few, many)]
        figures: dict[str, Any] = {
            "hardware": hardware.describe(),
            "versions": {
                "python": sys.version.split()[0],
                "torch": torch.__version__,
                "numpy": np.__version__,
                "pillow": PIL.__version__,
                "libjpeg-turbo": features.version("libjpeg_turbo"),
            },
            "images": "photos" if options.photos else "made",
            "few": options.few,
            "many": options.many,
            **describe(originals),
            "peak_mib_few": peaks[0],
            "peak_mib_many": peaks[1],
            **measure_rates(few, scratch / "rates", options.turns),
        }
    figures["missed"] = missed_bounds(figures)
    for name, value in figures.items():
        print(f"{name:<20}{value:.4g}" if isinstance(value, float) else f"{name:<20}{value}")
    print(json.dumps(figures))
    return 1 if figures["missed"] else 0


def write_originals(folder: Path, photos: Path | None) -> list[Path]:
    """Write the files that are prepared: photos, or noise in files like ImageNet's."""
    folder.mkdir()
    paths = []
    for number, content in enumerate(_noise() if photos is None else _photos(photos)):
        paths.append(folder / f"{number:05d}.jpg")
        paths[-1].write_bytes(content)
    return paths


def _photos(path: Path) -> Iterator[bytes]:
    for image in pyarrow.parquet.read_table(path, columns=["image"])["image"].to_pylist():
        yield image["bytes"]


def _noise() -> Iterator[bytes]:
    noise = NoiseSource(train=MADE, test=0, long_side_px=LONG_SIDE_PX, seed=0)
    for record, subsampling in zip(noise.records("train"), cycle(SUBSAMPLINGS), strict=False):
        assert isinstance(record.image, bytes)
        file = io.BytesIO()
        picture = Image.open(io.BytesIO(record.image))
        picture.save(file, "JPEG", quality=QUALITY, subsampling=subsampling)
        yield file.getvalue()


def link(originals: list[Path], folder: Path, count: int) -> Path:
    """Make a folder of so many images, each original under as many names as it takes."""
    folder.mkdir()
    for number in range(count):
        os.link(originals[number % len(originals)], folder / f"{number:05d}.jpg")
    return folder


def describe(originals: list[Path]) -> dict[str, float]:
    """Return the mean size of the files, in pixels and bytes."""
    pixels = []
    for path in originals:
        with Image.open(path) as picture:
            pixels.append(picture.width * picture.height)
    sizes = [path.stat().st_size for path in originals]
    return {"pixels": statistics.fmean(pixels), "bytes": statistics.fmean(sizes)}


def peak_mib(folder: Path, outputs: Path) -> float:
    """Prepare a folder as the workflow does, in a fresh process; return its peak of memory."""
    request = make_request(folder, outputs)
    store.write_config(request)
    stage = [sys.executable, "-P", "-m", "training.prepare_data", str(request.directory)]
    # As the workflow's own processes; see training/hardware.py.
    environment = {"GOMP_SPINCOUNT": "1000", **os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", LAUNCH, *stage], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"preparing {folder} failed:\n{done.stderr}")
    return int(done.stdout) * (1 if sys.platform == "darwin" else 1024) / 2**20


def make_request(folder: Path, outputs: Path) -> StageRequest:
    """Ask for a folder to be prepared as for the mission's network."""
    settings = build_settings(
        "imagenet",
        overrides=[
            f"data.source=folder:{folder}",
            "transfer.source=none",
            "tracking.wandb=disabled",
        ],
    )
    return store.make_request(STAGES["prepare_data"], settings, outputs, {})


@dataclass(frozen=True)
class Took:
    """What a turn took, in seconds."""

    clock: float
    processors: float


def timed(work: Callable[[], object]) -> Took:
    """Run `work`; return its time by the clock and of all processors."""
    clock, processors = time.perf_counter(), _processor_seconds()
    work()
    return Took(time.perf_counter() - clock, _processor_seconds() - processors)


def _processor_seconds() -> float:
    used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    # Not `os.times`, which counts hundredths of a second: decoding a few files takes less.
    return sum(each.ru_utime + each.ru_stime for each in used)


def measure_rates(folder: Path, outputs: Path, turns: int) -> dict[str, float]:
    """Prepare and decode in turn; the first turn of each warms up and does not count."""
    files = sorted(folder.iterdir())
    took: dict[str, list[Took]] = {"prepare": [], "decode": []}
    for turn in range(turns + 1):
        took["prepare"].append(timed(partial(prepare, folder, outputs / str(turn))))
        took["decode"].append(timed(partial(decode_only, files)))
    counted = {name: turns[1:] for name, turns in took.items()}
    ratios = [
        decoded.processors / prepared.processors
        for prepared, decoded in zip(counted["prepare"], counted["decode"], strict=True)
    ]
    rates: dict[str, float] = {}
    for name, turn_times in counted.items():
        for of, kind in (("core", "processors"), ("second", "clock")):
            seconds = statistics.median(getattr(each, kind) for each in turn_times)
            rates[f"{name}_per_{of}"] = len(files) / seconds
    return {
        **rates,
        "ratio": statistics.median(ratios),
        "ratio_lowest": min(ratios),
        "ratio_highest": max(ratios),
    }


def prepare(folder: Path, outputs: Path) -> None:
    """Prepare a folder with the whole stage, into a place where nothing is yet."""
    run_stage(make_request(folder, outputs), prepare_data.compute)


def decode_only(files: list[Path]) -> None:
    """Decode files to RGB, the floor of any preparation with this decoder."""

    def decode(path: Path) -> None:
        with Image.open(path) as picture:
            picture.load()
            picture.convert("RGB")

    with decoding_pool(available_processors()) as pool:
        for _ in pool.in_order(decode, files):
            pass


def missed_bounds(figures: dict[str, Any]) -> list[str]:
    """Name the promises that were not kept."""
    most = (1 + GROWTH) * figures["peak_mib_few"] + GROWTH_MIB
    kept = {"ratio": figures["ratio"] >= RATIO, "memory": figures["peak_mib_many"] <= most}
    return [name for name, value in kept.items() if not value]


if __name__ == "__main__":
    sys.exit(main())
