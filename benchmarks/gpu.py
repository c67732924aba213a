"""What pretraining the mission's network reaches on a GPU, and how long the mission would take.

    python benchmarks/gpu.py

Pretrains in bfloat16 with one batch size after the other; then, with the best one, compiled or as
it is, the images kept on the device or sent from the host in every step, and with half the width of
the MLP. The same GPU multiplies two large matrices for comparison. The last line is JSON: samples
per second, their share of that rate, and the minutes that 5 epochs of ImageNet-1k would take. Ends
with status 1 where a bound is missed, and 2 where there is no GPU; `--device cpu` goes through all
but the compiling at sizes that say nothing about speed.
"""

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from throughput import Done, draw_files

from data.rotation import NUM_ROTATIONS
from training import hardware, loop, prepare_data, pretrain, progress, store
from training.configure import build_settings
from training.errors import OutOfMemoryError
from training.images import open_splits
from training.progress import Progress
from training.runner import run_stage
from training.stages import STAGES
from training.store import StageResult

SHARE_BOUND = 0.40
"""Smallest share of the rate of a large product of matrices that counts as good use of a GPU."""

MINUTES_BOUND = {2.0: 15.0, 4.0: 25.0}
"""Longest time for the mission, in minutes, by MLP ratio."""

MISSION_SAMPLES = 5 * 1_281_167 * NUM_ROTATIONS
"""Samples of 5 epochs of ImageNet-1k."""

EPOCHS = 2
"""The first one warms up, compiles and brings the images to the device; the second is measured."""

BLOCKS = 5
"""Logged parts of an epoch. The first one is beside a checkpoint and does not count."""


@dataclass(frozen=True)
class Sizes:
    """What is computed on a kind of device.

    Attributes:
        batch_sizes: Source images per step that are tried, ascending.
        images: Files to train on and to hold out.
        matrix: Side of the matrices that are multiplied.
        compiled: Whether the compiled network is measured.
        network: Settings that differ from the mission's.
    """

    batch_sizes: tuple[int, ...]
    images: int
    matrix: int
    compiled: bool
    network: tuple[str, ...] = ()


SIZES = {
    "cuda": Sizes((64, 128, 256, 512, 1024), images=16_384, matrix=8192, compiled=True),
    "cpu": Sizes(
        (2, 4),
        images=60,
        matrix=256,
        compiled=False,
        network=(
            "model.image_size=32",
            "model.embed_dim=32",
            "model.depth=1",
            "model.num_heads=2",
        ),
    ),
}


@dataclass(frozen=True)
class Variant:
    """One way to pretrain."""

    batch_size: int
    mlp_ratio: float = 4.0
    compile: bool = False
    data_on_device: bool = True


@dataclass
class Meter:
    """Listens to a pretraining, which reports when a logged loss has waited for the device."""

    first_step: int
    last_step: int
    seconds_per_step: list[float] = field(default_factory=list)
    seconds_to_first_report: float = 0.0
    _since: float = field(default_factory=time.perf_counter)
    _step: int = 0

    def block_ended(self, report: Progress) -> None:
        """Note how long the steps since the last report took, once they count."""
        now = time.perf_counter()
        if self._step == 0:
            self.seconds_to_first_report = now - self._since
        if self._step >= self.first_step:
            self.seconds_per_step.append((now - self._since) / (report.done - self._step))
        if report.done >= self.last_step:
            raise Done
        self._step, self._since = report.done, now


@dataclass
class Bench:
    """Pretrains on the same prepared images again and again."""

    device: Literal["cpu", "cuda"]
    scratch: Path
    sizes: Sizes = field(init=False)
    overrides: list[str] = field(init=False)
    prepared: dict[str, StageResult] = field(init=False)
    train_images: int = field(init=False)
    matrix_rate: float = field(init=False)
    """Floating-point operations per second of a large product of matrices in bfloat16."""

    def __post_init__(self) -> None:
        """Prepare the images and measure the product of matrices."""
        self.sizes = SIZES[self.device]
        self.overrides = [
            f"data.source=folder:{self.scratch / 'images'}",
            "data.val_fraction=0.02",
            "data.test_fraction=0.02",
            "transfer.source=none",
            f"pretrain.epochs={EPOCHS}",
            "pretrain.warmup_epochs=0",
            f"hardware.device={self.device}",
            "hardware.precision=bfloat16",
            "tracking.wandb=disabled",
            *self.sizes.network,
        ]
        settings = build_settings("imagenet", overrides=self.overrides)
        side = settings.model.image_size
        draw_files(self.scratch / "images", self.sizes.images, side, distinct=256)
        request = store.make_request(
            STAGES["prepare_data"], settings, self.scratch / "prepared", {}
        )
        prepared = run_stage(request, prepare_data.compute)
        self.prepared = {"prepare_data": prepared}
        self.train_images = len(open_splits(prepared.directory, settings).train)
        self.matrix_rate = matrix_rate(torch.device(self.device), self.sizes.matrix)

    def measure(self, variant: Variant, number: int) -> dict[str, Any]:
        """Pretrain in one way, in an outputs folder of its own.

        Raises:
            OutOfMemoryError: If a step does not fit.
        """
        _give_memory_back()
        steps = self.train_images // variant.batch_size
        block = max(1, steps // BLOCKS)
        settings = build_settings(
            "imagenet",
            overrides=[
                *self.overrides,
                f"model.mlp_ratio={variant.mlp_ratio}",
                f"pretrain.batch_size={variant.batch_size}",
                f"hardware.compile={str(variant.compile).lower()}",
                f"hardware.data_on_device={str(variant.data_on_device).lower()}",
                f"tracking.log_every_steps={block}",
            ],
        )
        request = store.make_request(
            STAGES["pretrain"], settings, self.scratch / f"outputs-{number}", self.prepared
        )
        meter = Meter(first_step=steps + block, last_step=EPOCHS * steps // block * block)
        try:
            with progress.listening(meter.block_ended):
                run_stage(request, pretrain.compute)
        except Done:
            pass
        samples = settings.pretrain.samples_per_step
        rate = samples / statistics.median(meter.seconds_per_step)
        operations = loop.PASSES_PER_STEP * settings.model.operations_per_image
        return {
            **asdict(variant),
            "samples_per_second": rate,
            "share": rate * operations / self.matrix_rate,
            "minutes": MISSION_SAMPLES / rate / 60,
            "seconds_to_first_report": meter.seconds_to_first_report,
        }


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; the exit status says whether the bounds are kept."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=list(SIZES), default="cuda")
    parser.add_argument(
        "--seconds", type=float, default=420, help="after which no further pretraining begins"
    )
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks/gpu.py needs a CUDA device, and there is none.", file=sys.stderr)
        return 2
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="gpu-") as scratch:
        bench = Bench(options.device, Path(scratch))
        print(f"matrices of {bench.sizes.matrix}: {bench.matrix_rate / 1e12:.3g} TFLOP/s")
        rows = measure_all(bench, until=started + options.seconds)
    found = {
        "hardware": hardware.describe(),
        "torch": torch.__version__,
        "matrix_tflops": bench.matrix_rate / 1e12,
        "rows": rows,
        **summary(rows),
        "wall_seconds": time.perf_counter() - started,
    }
    print(json.dumps(found))
    return 0 if found["kept"] else 1


def measure_all(bench: Bench, *, until: float) -> list[dict[str, Any]]:
    """Return a row for every variant there was time and memory for.

    Args:
        bench: Measures.
        until: Time of `time.perf_counter` after which none begins.
    """
    rows: list[dict[str, Any]] = []

    def measure(variant: Variant) -> bool:
        if time.perf_counter() > until:
            print(f"no time left for {variant}")
            return False
        try:
            row = bench.measure(variant, len(rows))
        except OutOfMemoryError:
            print(f"no memory for {variant}")
            return False
        rows.append(row)
        print(
            f"{variant}: {row['samples_per_second']:.4g} samples/s, share {row['share']:.3f}, "
            f"mission {row['minutes']:.3g} min, first report after "
            f"{row['seconds_to_first_report']:.0f} s",
            flush=True,
        )
        return True

    for batch_size in bench.sizes.batch_sizes:
        if not measure(Variant(batch_size)):
            break
    if not rows:
        return rows
    best = Variant(max(rows, key=lambda row: float(row["samples_per_second"]))["batch_size"])
    compiled = [True] if bench.sizes.compiled else []
    for variant in (
        *(replace(best, compile=value) for value in compiled),
        *(replace(best, mlp_ratio=2.0, compile=value) for value in (*compiled, False)),
        *(replace(best, compile=value, data_on_device=False) for value in (*compiled, False)),
    ):
        measure(variant)
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the best figures by MLP ratio and whether the bounds are kept.

    Args:
        rows: As `Bench.measure` returns them.

    Returns:
        `share_<ratio>` and `minutes_<ratio>` of the fastest row of each ratio that was measured,
        and `kept`, which needs all of them.
    """
    found: dict[str, Any] = {}
    kept = []
    for ratio, bound in MINUTES_BOUND.items():
        of_ratio = [row for row in rows if row["mlp_ratio"] == ratio]
        kept.append(bool(of_ratio))
        if of_ratio:
            best = max(of_ratio, key=lambda row: float(row["samples_per_second"]))
            found[f"share_{ratio:g}"] = best["share"]
            found[f"minutes_{ratio:g}"] = best["minutes"]
            kept += [best["share"] >= SHARE_BOUND, best["minutes"] <= bound]
    return {**found, "kept": all(kept)}


def matrix_rate(device: torch.device, side: int, products: int = 50) -> float:
    """Return the floating-point operations per second of products of bfloat16 matrices."""
    left, right = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    times = []
    for _ in range(5):  # the first one warms up
        _wait(device)
        started = time.perf_counter()
        for _ in range(products):
            left @ right
        _wait(device)
        times.append(time.perf_counter() - started)
    return 2 * side**3 * products / statistics.median(times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _give_memory_back() -> None:
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
