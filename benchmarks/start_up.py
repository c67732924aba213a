"""What the workflow costs besides its computations: the command line, a cached run, the flow.

    python benchmarks/start_up.py

The flow's overhead is the time of `rotvit run` less the time of a script that calls the same stages
one after the other in one process, of the `drawn` preset with one epoch of each training (longer
trainings cost both the same). In turn, so that what else the machine does hits both. The last line
is JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from training import hardware

HELP_SECONDS, CACHED_SECONDS, OVERHEAD_SECONDS = 0.5, 12.0, 20.0
"""Bounds."""

ROOT = Path(__file__).parents[1]

SHORT = (
    "pretrain.epochs=1",
    "pretrain.warmup_epochs=0",
    "finetune.epochs=1",
    "finetune.warmup_epochs=0",
    "from_scratch.epochs=1",
    "from_scratch.warmup_epochs=0",
    "tracking.wandb=disabled",
)

DIRECTLY = """
import sys
from importlib import import_module
from pathlib import Path
from training import store
from training.runner import run_stage
from training.configure import build_settings
from training.stages import plan

settings, results = build_settings("drawn", overrides=sys.argv[2:]), {}
for stage in plan(settings):
    request = store.make_request(stage, settings, Path(sys.argv[1]), results)
    module = import_module(f"training.{stage.module_name}")
    results[stage.name] = run_stage(request, module.compute)
"""


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; the exit status says whether the bounds are kept."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=2, help="of a flow and a direct run")
    options = parser.parse_args(arguments)
    rotvit = [sys.executable, "-m", "flows.cli"]
    helps = [_seconds([*rotvit, "--help"]) for _ in range(7)]
    flows, directs, cached = [], [], []
    with tempfile.TemporaryDirectory(prefix="start-up-") as scratch:
        overrides = [option for setting in SHORT for option in ("--set", setting)]
        for number in range(options.pairs):
            outputs = Path(scratch) / f"flow-{number}"
            command = [*rotvit, "run", "--outputs", str(outputs), *overrides]
            flows.append(_seconds(command))
            cached.append(_seconds(command))
            direct = [sys.executable, "-c", DIRECTLY, str(Path(scratch) / f"direct-{number}")]
            directs.append(_seconds([*direct, *SHORT]))
    overheads = [flow - direct for flow, direct in zip(flows, directs, strict=True)]
    figures = {
        "help_seconds": statistics.median(helps),
        "cached_seconds": statistics.median(cached),
        "flow_seconds": statistics.median(flows),
        "direct_seconds": statistics.median(directs),
        "overhead_seconds": statistics.median(overheads),
    }
    for name, value in figures.items():
        print(f"{name:<20}{value:.3g}")
    kept = (
        figures["help_seconds"] <= HELP_SECONDS
        and figures["cached_seconds"] <= CACHED_SECONDS
        and figures["overhead_seconds"] <= OVERHEAD_SECONDS
    )
    print(json.dumps({"hardware": hardware.describe(), **figures, "kept": kept}))
    return 0 if kept else 1


def _seconds(command: list[str]) -> float:
    """Run a command in silence and return how long it took."""
    # As the flow's own processes; see training/hardware.py.
    environment = {**os.environ, "GOMP_SPINCOUNT": "1000"}
    started = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
