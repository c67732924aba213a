"""What checkpoints cost a training of the mission's network, and how long a resume takes.

    python benchmarks/checkpoint_cost.py

Trains the Vision Transformer of the `imagenet` preset (25.7 M parameters, 160 px) on a few drawn
images, one image in four turns a step. After every `EVERY_STEPS` steps there is a checkpoint; the
half of the interval that follows it, in which it is written beside training, is compared with the
other half, in which there is none, in the same run. Then the run is cut off and resumed in a
process of its own. The last line is JSON.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from data.drawn import draw
from training import hardware, loop, prepare_data, pretrain, progress, stage_files, store
from training.checkpoint import Snapshot
from training.checkpoint_writer import CheckpointWriter
from training.configure import validate
from training.progress import Progress
from training.runner import run_stage
from training.settings import Settings
from training.stages import STAGES
from training.store import StageRequest

EVERY_STEPS = 8
"""Steps between two checkpoints; half of them must take longer than writing one."""

CHECKPOINTS = 6

SHARE, WAIT_SECONDS, RESUME_SECONDS = 0.01, 0.5, 5.0
"""Bounds: of wait and processor time over the default interval, of the longest wait, and of the
time from a resume's command to its first step, without importing torch."""

IMAGES = 60
"""Drawn images in all: 49 for training."""


class CutOff(Exception):
    """Ends a run as a crash would."""


class Meter:
    """Looks at the loop and the writer from outside."""

    def __init__(self) -> None:
        self.step_ends: list[float] = []
        self.waits: list[float] = []
        self.processor: list[float] = []
        self.write_walls: list[float] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record every step, snapshot and write inside the `with` block."""
        save, write = loop._Run._save, CheckpointWriter._write
        submitted: list[float] = []

        def timed_save(run: Any) -> None:
            wall = time.perf_counter()
            save(run)
            self.waits.append(time.perf_counter() - wall)
            # Copying may take all threads: counted as if it took them all of the time.
            submitted.append(self.waits[-1] * torch.get_num_threads())

        def timed_write(writer: CheckpointWriter, snapshot: Snapshot) -> None:
            wall, processor = time.perf_counter(), time.thread_time()
            write(writer, snapshot)
            self.write_walls.append(time.perf_counter() - wall)
            self.processor.append(submitted[-1] + time.thread_time() - processor)

        def step_ended(report: Progress) -> None:
            self.step_ends.append(time.perf_counter())
            if report.done == EVERY_STEPS * CHECKPOINTS + 1:
                raise CutOff

        with (
            patch.object(loop._Run, "_save", timed_save),
            patch.object(CheckpointWriter, "_write", timed_write),
            progress.listening(step_ended),
        ):
            yield

    def halves(self) -> tuple[list[float], list[float]]:
        """Return seconds of the half intervals after a checkpoint, and of those before the next.

        The end of a step is reported before its checkpoint, so the wait is in the first half.
        """
        half = EVERY_STEPS // 2
        ends = self.step_ends
        starts = range(EVERY_STEPS - 1, len(ends) - EVERY_STEPS, EVERY_STEPS)
        with_write = [ends[start + half] - ends[start] for start in starts]
        without = [ends[start + EVERY_STEPS] - ends[start + half] for start in starts]
        return with_write, without


def main() -> int:
    """Measure and print; the exit status says whether the bounds are kept."""
    with tempfile.TemporaryDirectory(prefix="checkpoint-cost-") as scratch:
        request = _request(Path(scratch))
        meter = Meter()
        try:
            with meter.watching():
                run_stage(request, pretrain.compute)
        except CutOff:
            pass
        newest = f"step-{stage_files.newest_step(request.directory):08d}"
        files = (request.directory / stage_files.CHECKPOINTS / newest).iterdir()
        size = sum(path.stat().st_size for path in files)
        with_write, without = meter.halves()
        step = statistics.median(without) / (EVERY_STEPS // 2)
        import_torch, to_first_step = _resume(request, step)
    interval = request.settings.checkpoint.every_seconds
    processor = statistics.median(meter.processor)
    extra = statistics.median(a - b for a, b in zip(with_write, without, strict=True))
    # The first snapshot makes its buffers; it is a cost like the others.
    figures = {
        "hardware": hardware.describe(),
        "checkpoint_megabytes": size / 1e6,
        "checkpoints": len(meter.waits),
        "step_seconds": step,
        "wait_seconds_median": statistics.median(meter.waits),
        "wait_seconds_max": max(meter.waits),
        "processor_seconds": processor,
        "write_wall_seconds": statistics.median(meter.write_walls),
        "extra_wall_seconds": extra,
        "import_torch_seconds": import_torch,
        "resume_seconds_beyond_import": to_first_step - import_torch,
    }
    for name, seconds in (
        ("wait", max(meter.waits)),
        ("processor", processor),
        ("extra_wall", extra),
    ):
        figures[f"{name}_share_of_interval"] = seconds / interval
    for name, value in figures.items():
        print(f"{name:<36}{value:.4g}" if isinstance(value, float) else f"{name:<36}{value}")
    kept = (
        max(max(meter.waits), processor, extra) / interval <= SHARE
        and max(meter.waits) <= WAIT_SECONDS
        and to_first_step - import_torch <= RESUME_SECONDS
    )
    figures["kept"] = kept
    print(json.dumps(figures))
    return 0 if kept else 1


def _request(scratch: Path) -> StageRequest:
    for index in range(IMAGES):
        path = scratch / "images" / f"{index:03d}.png"
        path.parent.mkdir(exist_ok=True)
        draw(index, "train", 160).save(path)
    settings: Settings = validate(
        {
            "preset": "imagenet",
            "data": {"source": f"folder:{scratch / 'images'}"},
            "transfer": {"source": None},
            "pretrain": {"epochs": 2, "batch_size": 1, "warmup_epochs": 0},
            "checkpoint": {"every_steps": EVERY_STEPS},
            "tracking": {"log_every_steps": 1, "wandb": "disabled"},
        }
    )
    outputs = scratch / "outputs"
    prepare = store.make_request(STAGES["prepare_data"], settings, outputs, {})
    results = {"prepare_data": run_stage(prepare, prepare_data.compute)}
    return store.make_request(STAGES["pretrain"], settings, outputs, results)


def _resume(request: StageRequest, step_seconds: float) -> tuple[float, float]:
    """Return the time to import torch, and from a resume's command to the start of its step."""
    imports, resumes = [], []
    for _ in range(3):  # in turn
        started = time.perf_counter()
        subprocess.run([sys.executable, "-P", "-c", "import torch"], check=True)
        imports.append(time.perf_counter() - started)
        started = time.perf_counter()
        command = [sys.executable, "-P", "-m", "training.pretrain", str(request.directory)]
        with subprocess.Popen([*command, "--events"], stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            for line in child.stdout:
                if line.startswith('{"progress"'):
                    break
            resumes.append(time.perf_counter() - started - step_seconds)
            child.kill()
    return statistics.median(imports), statistics.median(resumes)


if __name__ == "__main__":
    sys.exit(main())
