"""How fast pretraining is, compared with other ways to train the same network on the same images.

    python benchmarks/against_others.py [--photos PHOTOS.parquet] [--set hardware.compile=true]

Four processes take turns of a few steps, in the same order again and again, so that what else the
machine does hits them all; one that waits stands still, with its workers:

- `ours`: the pretraining stage, on images that were prepared before, as a run trains.
- `plain`: a PyTorch loop of the usual kind: Pillow, torchvision's transforms for each image in two
  loader processes, float32, eager.
- `trainer`: transformers' Trainer with its defaults: float32, eager, images read by the process
  that trains.
- `trainer_best`: the same at its best: bfloat16 where the hardware has it, `torch_compile`, fused
  AdamW, a loader process per processor.

The network is the mission's (160 px, patch 16, width 512, 8 blocks), images are JPEG files; each
step shows the same number of them, in all four turns. All have as many torch threads as there are
processors, and `GOMP_SPINCOUNT=1000`, which our workflow sets for itself and the others gain by.

A first block of each (building, compiling, first batches) is printed and does not count. Ours
prepares images once and the others decode them in every epoch: `prepare_seconds` is what that took,
`paid_after_epochs_<other>` the number of epochs after which it was worth it. The last line is JSON;
`ratio_<other>` is samples per second of ours over theirs, the median over rounds. The exit status
is 1 where a ratio is below its bound.
"""

import argparse
import importlib.util
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from other_trainers import (
    PLAIN_WORKERS,
    Job,
    best_of_trainer,
    train_at_its_best,
    train_plainly,
    train_with_defaults,
)
from turns import Player, Turns

from data.drawn import draw
from data.rotation import NUM_ROTATIONS
from training import hardware, prepare_data, pretrain, progress, store
from training.configure import build_settings
from training.runner import run_stage
from training.stages import STAGES
from training.store import StageRequest

OTHERS = {
    "plain": train_plainly,
    "trainer": train_with_defaults,
    "trainer_best": train_at_its_best,
}

BOUNDS = {
    "cpu": {"plain": 1.8, "trainer": 1.6, "trainer_best": 1.0},
    "cuda": {"trainer_best": 1.3},
}
"""Smallest ratio by device; where there is none, the ratio is told and holds for nothing."""

PHOTO_SIZE = (427, 320)
"""Width and height of the pictures that are made where no photos are given: a photo of 4:3 with a
short side of 320 px, as the `320px` version of Imagenette has them."""


@dataclass(frozen=True)
class Case:
    """How much is measured.

    Attributes:
        images_per_step: Each gives four samples.
        block: Steps before it is another's turn.
        blocks: Turns of each; the first one of each warms up and does not count.
    """

    images_per_step: int
    block: int
    blocks: int

    @property
    def images(self) -> int:
        """Images that are needed for one epoch of as many steps as are measured."""
        # A tenth of all images is taken out for testing, then a tenth of the rest for val.
        return math.ceil(self.images_per_step * self.block * self.blocks / 0.8) + 20


CASES = {
    # A step of the preset's 256 images takes minutes on a processor.
    "cpu": Case(images_per_step=8, block=2, blocks=11),
    # What four processes, two of them in float32, have room for on a GPU of 80 GB.
    "cuda": Case(images_per_step=128, block=10, blocks=11),
}


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; the exit status says whether the bounds are kept."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--photos", type=Path, help="parquet file of JPEGs, in a column `image`")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="path.to.setting=value",
        help="a setting of the network or of what ours computes on; may be given several times",
    )
    parser.add_argument("--against", nargs="+", choices=list(OTHERS), default=list(OTHERS))
    parser.add_argument("--blocks", type=int, help="turns of each, instead of the usual number")
    options = parser.parse_args(arguments)
    if importlib.util.find_spec("accelerate") is None and set(options.against) != {"plain"}:
        parser.error("transformers' Trainer needs accelerate: pip install accelerate")
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # for the processes that are started
    device = "cuda" if torch.cuda.is_available() else "cpu"
    case = CASES[device]
    if options.blocks:
        case = Case(case.images_per_step, case.block, options.blocks)
    with tempfile.TemporaryDirectory(prefix="against-others-") as scratch:
        found = measure(case, options, Path(scratch))
    bounds = {name: least for name, least in BOUNDS[device].items() if name in options.against}
    missed = [name for name, least in bounds.items() if found[f"ratio_{name}"] < least]
    for name, value in found.items():
        if isinstance(value, float):
            print(f"{name:<36}{value:.4g}")
    print(json.dumps({**found, "bounds": bounds, "missed": missed, "kept": not missed}))
    return 1 if missed else 0


def measure(case: Case, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Prepare the images, let all take their turns, and return what was found."""
    images = scratch / "images"
    images.mkdir()
    files = write_images(images, case.images, options.photos)
    request, prepare_seconds = _prepare(case, images, scratch, options.set)
    players: dict[str, Player] = {}
    seconds: dict[str, list[float]] = {name: [] for name in ("ours", *options.against)}
    try:
        players["ours"] = Player("ours", train_ours, request, case.block)
        for name in options.against:
            job = Job(request.settings, files, scratch / name)
            players[name] = Player(name, OTHERS[name], job, case.block)
        for _ in range(case.blocks):
            for name, player in players.items():
                seconds[name].append(player.turn())
    finally:
        for player in players.values():
            player.end()
    return {
        **_describe(request, options),
        "images_per_step": case.images_per_step,
        "steps_per_block": case.block,
        "prepare_seconds": prepare_seconds,
        "prepared_images": len(files),
        **figures(case, seconds, prepare_seconds),
    }


def figures(
    case: Case, seconds: dict[str, list[float]], prepare_seconds: float
) -> dict[str, float | None]:
    """Return rates, ratios and what preparation is worth.

    Args:
        case: What was measured.
        seconds: Of each block of `ours` and the others, in order.
        prepare_seconds: What preparing `case.images` images took.

    Returns:
        By name; none for `paid_after_epochs_…` of one that is no slower than ours.
    """
    samples = case.block * case.images_per_step * NUM_ROTATIONS
    counted = {name: values[1:] for name, values in seconds.items()}
    rates = {name: samples / statistics.median(values) for name, values in counted.items()}
    found: dict[str, float | None] = {
        f"first_block_seconds_{name}": values[0] for name, values in seconds.items()
    }
    found |= {f"samples_per_second_{name}": rate for name, rate in rates.items()}
    for name in [name for name in counted if name != "ours"]:
        ratios = [
            theirs / ours for ours, theirs in zip(counted["ours"], counted[name], strict=True)
        ]
        found[f"ratio_{name}"] = statistics.median(ratios)
        found[f"ratio_lowest_{name}"] = min(ratios)
        found[f"ratio_highest_{name}"] = max(ratios)
        saved = case.images * NUM_ROTATIONS * (1 / rates[name] - 1 / rates["ours"])
        found[f"paid_after_epochs_{name}"] = prepare_seconds / saved if saved > 0 else None
    return found


def train_ours(request: StageRequest, turns: Turns) -> None:
    """Pretrain as a run does; the loop reports after every block of steps."""
    turns.begin()
    with progress.listening(lambda _: turns.block_ended()):
        run_stage(request, pretrain.compute)


def write_images(folder: Path, count: int, photos: Path | None) -> list[Path]:
    """Write JPEG files, those of a parquet file (again from the first where they are too few)."""
    files = [folder / f"{index:06d}.jpg" for index in range(count)]
    if photos is None:
        width, height = PHOTO_SIZE
        top = (width - height) // 2
        for index, file in enumerate(files):
            picture = draw(index, "train", width).crop((0, top, width, top + height))
            picture.save(file, quality=90)
        return files
    rows = pq.read_table(photos, columns=["image"])["image"].to_pylist()
    for index, file in enumerate(files):
        file.write_bytes(rows[index % len(rows)]["bytes"])
    return files


def _prepare(
    case: Case, images: Path, scratch: Path, overrides: Sequence[str]
) -> tuple[StageRequest, float]:
    """Prepare the images; return the request to pretrain on them, and the seconds that it took."""
    settings = build_settings(
        "imagenet",
        overrides=[
            *overrides,
            f"data.source=folder:{images}",
            "transfer.source=none",
            f"pretrain.batch_size={case.images_per_step}",
            # One epoch of as many steps as are measured: none of them is an evaluation.
            "pretrain.epochs=1",
            "pretrain.warmup_epochs=0",
            f"tracking.log_every_steps={case.block}",
            "tracking.wandb=disabled",
            # The clock goes on while the others have their turns; nobody saves here.
            "checkpoint.every_seconds=86400",
        ],
    )
    outputs = scratch / "outputs"
    prepare = store.make_request(STAGES["prepare_data"], settings, outputs, {})
    started = time.perf_counter()
    results = {"prepare_data": run_stage(prepare, prepare_data.compute)}
    seconds = time.perf_counter() - started
    return store.make_request(STAGES["pretrain"], settings, outputs, results), seconds


def _describe(request: StageRequest, options: argparse.Namespace) -> dict[str, Any]:
    photos = options.photos
    packages = ["torch", "torchvision", "transformers", "pillow"]
    if set(options.against) != {"plain"}:
        packages.append("accelerate")
    return {
        "hardware": hardware.describe(),
        "versions": {name: metadata.version(name) for name in packages},
        "images": f"{photos.parent.name}/{photos.name}" if photos else "drawn, 427x320",
        "set": options.set,
        "ours": json.loads((request.directory / "hardware.json").read_bytes()),
        "plain_workers": PLAIN_WORKERS,
        "trainer_best": best_of_trainer(request.settings),
    }


if __name__ == "__main__":
    sys.exit(main())
