"""How near pretraining comes to what its network alone can do on this machine.

    python benchmarks/throughput.py

Pretrains with the settings of two presets, and between every few steps of it trains the same
network on one batch of noise that lies on the device: no images, no turning, no schedule, no
clipping, no logging. Both in one process and in turn, so that what else the machine does hits both.
The last line is JSON; `ratio_<preset>` is samples per second of the one over those of the other,
the median over pairs of neighbours.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from data.drawn import draw
from data.rotation import NUM_ROTATIONS, ROTATION_NAMES
from models.freezing import set_train_mode
from training import hardware, optim, prepare_data, pretrain, progress, store
from training.configure import build_settings
from training.network import build_model
from training.progress import Progress
from training.runner import StageContext, run_stage
from training.settings import HardwareSettings
from training.stages import STAGES
from training.stopping import StopRequest
from training.store import StageRequest

BOUND = 0.95
"""Smallest ratio that counts as near."""


@dataclass(frozen=True)
class Case:
    """What is measured of a preset.

    Attributes:
        images_per_step: Source images; each gives four samples.
        block: Steps before it is the other's turn.
        blocks: Turns of each; the first one of each warms up and does not count.
    """

    images_per_step: int
    block: int
    blocks: int


CASES = {
    "drawn": Case(images_per_step=32, block=8, blocks=11),
    # Fewer images per step than the preset's 256: on a processor such a step takes minutes.
    "imagenet": Case(images_per_step=4, block=3, blocks=9),
}


class Done(Exception):
    """Ends the pretraining when enough has been measured."""


@dataclass
class Meter:
    """Takes turns with the training loop, which reports after every block of steps."""

    case: Case
    make_network: Callable[[], Callable[[], None]]
    """Returns what takes one step on resident noise."""
    seconds: dict[str, list[float]] = field(
        default_factory=lambda: {"pretraining": [], "network": []}
    )
    _since: float = field(default_factory=time.perf_counter)
    _step: Callable[[], None] | None = None

    def block_ended(self, report: Progress) -> None:
        """Note how long the loop took for its block, then time the same number of bare steps."""
        _wait_for_device()
        self.seconds["pretraining"].append(time.perf_counter() - self._since)
        if self._step is None:
            self._step = self.make_network()
        started = time.perf_counter()
        for _ in range(self.case.block):
            self._step()
        _wait_for_device()
        self.seconds["network"].append(time.perf_counter() - started)
        if report.done >= self.case.block * self.case.blocks:
            raise Done
        self._since = time.perf_counter()

    def figures(self) -> dict[str, float]:
        """Return samples per second of both, and their ratio."""
        samples = self.case.block * self.case.images_per_step * NUM_ROTATIONS
        counted = {name: values[1:] for name, values in self.seconds.items()}
        rates = {name: samples / statistics.median(v) for name, v in counted.items()}
        ratios = [
            alone / whole
            for whole, alone in zip(counted["pretraining"], counted["network"], strict=True)
        ]
        return {
            "samples_per_second": rates["pretraining"],
            "network_samples_per_second": rates["network"],
            "ratio": statistics.median(ratios),
            "ratio_lowest": min(ratios),
            "ratio_highest": max(ratios),
        }


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; the exit status says whether the bound is kept."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--presets", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--blocks", type=int, help="turns of each, instead of the usual number")
    options = parser.parse_args(arguments)
    found: dict[str, Any] = {
        "hardware": hardware.describe(),
        "torch": torch.__version__,
        "precision": hardware.decide(HardwareSettings()).precision,
    }
    for preset in options.presets:
        case = CASES[preset]
        if options.blocks:
            case = Case(case.images_per_step, case.block, options.blocks)
        with tempfile.TemporaryDirectory(prefix="throughput-") as scratch:
            figures = measure(preset, case, Path(scratch))
        for name, value in figures.items():
            found[f"{name}_{preset}"] = value
            print(f"{preset:<10}{name:<28}{value:.4g}")
    kept = all(found[f"ratio_{preset}"] >= BOUND for preset in options.presets)
    print(json.dumps({**found, "kept": kept}))
    return 0 if kept else 1


def measure(preset: str, case: Case, scratch: Path) -> dict[str, float]:
    """Pretrain with a preset's network and recipe, on drawn things, as long as is measured."""
    request = _request(preset, case, scratch)
    meter = Meter(case, lambda: _bare_step(StageContext(request, StopRequest())))
    try:
        with progress.listening(meter.block_ended):
            run_stage(request, pretrain.compute)
    except Done:
        pass
    return meter.figures()


def _bare_step(context: StageContext) -> Callable[[], None]:
    """Return a step of the same network, with the same optimiser and precision, on noise."""
    settings, device = context.settings, context.hardware().torch_device
    model = context.hardware().place(build_model(context, ROTATION_NAMES))
    set_train_mode(model)
    optimizer = optim.make_optimizer(model, weight_decay=settings.pretrain.weight_decay)
    optim.set_learning_rate(optimizer, 1e-4)
    samples, side = settings.pretrain.samples_per_step, settings.model.image_size
    images = torch.rand(samples, 3, side, side, device=device) * 2 - 1
    turns = torch.arange(samples, device=device) % NUM_ROTATIONS
    forward = context.hardware().for_training(model, cache=context.compile_cache)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with context.hardware().autocast():
            logits = forward(images).logits
        loss: Tensor = functional.cross_entropy(logits.float(), turns)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def _request(preset: str, case: Case, scratch: Path) -> StageRequest:
    images = scratch / "images"
    # One epoch of as many steps as are measured: none of them is an evaluation.
    needed = int(1.2 * case.images_per_step * case.block * (case.blocks + 1)) + 20
    draw_files(images, needed, build_settings(preset).model.image_size)
    settings = build_settings(
        preset,
        overrides=[
            f"data.source=folder:{images}",
            "transfer.source=none",
            "transfer.labels=none",
            f"pretrain.batch_size={case.images_per_step}",
            "pretrain.epochs=1",
            "pretrain.warmup_epochs=0",
            f"tracking.log_every_steps={case.block}",
            "tracking.wandb=disabled",
        ],
    )
    outputs = scratch / "outputs"
    prepare = store.make_request(STAGES["prepare_data"], settings, outputs, {})
    results = {"prepare_data": run_stage(prepare, prepare_data.compute)}
    return store.make_request(STAGES["pretrain"], settings, outputs, results)


def draw_files(folder: Path, count: int, side: int, distinct: int | None = None) -> None:
    """Fill a new folder with drawn things.

    Args:
        folder: Made here.
        count: Number of files.
        side: Height and width of the pictures, in pixels.
        distinct: How many different ones there are; the others are links to them. None for all.
    """
    folder.mkdir()
    for index in range(count):
        path = folder / f"{index:05d}.png"
        if distinct is None or index < distinct:
            draw(index, "train", side).save(path)
        else:
            path.hardlink_to(folder / f"{index % distinct:05d}.png")


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
