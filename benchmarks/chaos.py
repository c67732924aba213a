"""Interrupt a short pretraining in every way that we know of, and compare its weights.

    python benchmarks/chaos.py --tries 100 --seed 0

Each try starts from nothing, is hit by one to four faults of one kind, each followed by the same
command again, and must end by itself: *survived*. Its weights, metrics file and scores must be
those of an undisturbed run, byte for byte: *identical*. *Steps lost* are those that had been taken
when the fault hit and that the newest sound checkpoint did not hold; checkpoints are made every
`EVERY_STEPS` steps. Everything runs on the CPU with one thread, with dropout, on drawn images.
The last line is JSON. The exit status is 0 if every try survived and was identical.

What is injected here (by `chaos_faults.py`), what a test injects, and what nobody does, by the
usual list of faults:

| fault | where |
|---|---|
| SIGKILL at a random instant, one to four times | here: `kill` |
| SIGKILL while a checkpoint is written (made slow) | here: `kill in a write` |
| SIGKILL before each file operation of a save | tests/training/test_checkpoint.py |
| SIGTERM once: the step is finished and saved | here: `stop` |
| SIGTERM twice within ten seconds | here: `stop twice` |
| SIGINT | tests/training/test_stopping.py; it takes the same way as SIGTERM |
| the parent dies | here: `orphan`; tests/tasks/test_child_process.py |
| at the first step, the last of an epoch, in validation, after the end | test_loop.py there |
| resumed twice and more in a row | here: every kind |
| newest checkpoint cut, flipped, zeroed, edited, a file gone or too many | here: `damage` |
| all checkpoints damaged | tests/training/test_checkpoint.py: an error, not a fresh start |
| no space for a checkpoint or for the model | here: `full disk` (a limit on file sizes) |
| an error on fsync, a folder deleted meanwhile | tests/training/test_checkpoint.py, test_loop.py |
| a folder that is read-only | tests/training/test_preflight.py: refused before the work |
| two processes on one key, one of them killed | here: `two at once` |
| stale locks | here: every SIGKILL leaves one; tests/training/test_lock.py |
| leftover temporary folders, the clock set back | here: `clock` |
| settings, images or network changed under a checkpoint | tests/training/test_loop.py: refused |
| other versions of torch | tests/training/test_checkpoint.py: a warning |
| other number of processes | not yet: training runs in one process |
| nan in loss or gradient, once and for ever | tests/training/test_divergence.py, test_loop.py |
| out of memory in a step | tests/training/test_loop.py |
| memory taken by the kernel's killer | the same as SIGKILL |
| too little shared memory, dead or hung loader workers | none: a thread reads the batches |
| a rank that dies | not yet: training runs in one process |
| preparation killed, a shard flipped | tests/data/test_prepare.py |
| two preparations at once | tests/training/test_prepare_data.py |
| a pickle where a checkpoint should be | tests/training/test_checkpoint.py: never run |
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before NumPy: its threads would make forking unsafe.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

from chaos_attempts import Try, fork, log_of
from chaos_faults import FAULTS

from training import attempts, prepare_data, stage_files, store
from training.configure import validate
from training.runner import run_stage
from training.stages import STAGES
from training.store import StageRequest

EVERY_STEPS = 7
"""Steps between two checkpoints."""

VALUES: dict[str, Any] = {
    "data": {"source": "drawn10", "crop_margin": 0.25},
    "model": {
        "image_size": 16,
        "patch_size": 8,
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 3,
        "dropout": 0.1,
    },
    "pretrain": {"epochs": 3, "batch_size": 75, "warmup_epochs": 1},
    "checkpoint": {"every_steps": EVERY_STEPS},
    "hardware": {"device": "cpu", "threads": 1},
    "tracking": {"log_every_steps": 1, "wandb": "disabled"},
}
"""40 steps an epoch, 120 in all."""


@dataclass
class Row:
    """What came of all tries of one kind."""

    tries: int = 0
    survived: int = 0
    identical: int = 0
    faults: int = 0
    lost: int = 0


def main() -> int:
    """Run the tries and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tries", type=int, default=100, help="pretrainings to disturb")
    parser.add_argument("--seed", type=int, default=0, help="of kinds, instants and places")
    options = parser.parse_args()
    rows = {name: Row() for name in FAULTS}
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chaos-") as scratch:
        prepared = Path(scratch) / "prepared"
        seconds, expected = _undisturbed(prepared)
        for number in range(options.tries):
            name = list(FAULTS)[number % len(FAULTS)]
            source = random.Random(f"{options.seed} {number}")
            with _fresh(prepared) as request:
                run = Try(request, source, seconds)
                survived, identical, faults = _try(run, FAULTS[name], expected)
                if not identical:
                    print(f"Try {number} ({name}) failed; the end of its log:")
                    print("\n".join(log_of(request).read_text().splitlines()[-20:]), flush=True)
            row = rows[name]
            row.tries += 1
            row.survived += survived
            row.identical += identical
            row.faults += faults
            row.lost = max(row.lost, run.lost)
    _print_table(rows, time.monotonic() - started)
    total = {
        field: sum(getattr(row, field) for row in rows.values())
        for field in ("tries", "survived", "identical")
    }
    print(json.dumps({**total, "seed": options.seed}))
    return 0 if total["identical"] == options.tries else 1


def _try(
    run: Try, fault: Callable[[Try], bool], expected: dict[str, Any]
) -> tuple[bool, bool, int]:
    """Inject faults and finish; return whether it survived, whether identical, faults that hit."""
    faults = 0
    wanted = run.random.randint(1, 4)
    try:
        while faults < wanted and not run.is_done():
            faults += fault(run)
            run.count_lost()
        code = run.start().wait()
    except (AssertionError, TimeoutError) as error:
        print(f"{type(error).__name__}: {error}")
        return False, False, faults
    finally:
        _end_children()
    return code == 0, code == 0 and _result(run.request) == expected, faults


def _undisturbed(outputs: Path) -> tuple[float, dict[str, Any]]:
    """Prepare the images in a child and pretrain once; return the time and the result."""

    def prepare() -> int:
        request = store.make_request(STAGES["prepare_data"], validate(VALUES), outputs, {})
        run_stage(request, prepare_data.compute)
        return 0

    assert os.waitpid(fork(prepare), 0)[1] == 0, "the images cannot be prepared"
    with _fresh(outputs) as request:
        started = time.monotonic()
        assert Try(request, random.Random(0), 0).start().wait() == 0, log_of(request).read_text()
        return time.monotonic() - started, _result(request)


@contextmanager
def _fresh(prepared: Path) -> Iterator[StageRequest]:
    """Give the request of a pretraining that nobody has begun; the images are linked."""
    with tempfile.TemporaryDirectory(dir=prepared.parent) as outputs:
        shutil.copytree(prepared, outputs, dirs_exist_ok=True, copy_function=os.link)
        settings = validate(VALUES)
        data = store.inspect(
            store.make_request(STAGES["prepare_data"], settings, Path(outputs), {})
        ).result
        assert data is not None
        results = {"prepare_data": data}
        request = store.make_request(STAGES["pretrain"], settings, Path(outputs), results)
        attempts.begin(request)
        yield request


def _result(request: StageRequest) -> dict[str, Any]:
    """Return what must be identical."""
    result = json.loads((request.directory / "result.json").read_bytes())
    return {
        "weights": stage_files.sha256_of(request.directory / "model" / "model.safetensors"),
        "metrics": stage_files.sha256_of(request.directory / "metrics.jsonl"),
        "scores": result["scores"],
    }


def _end_children() -> None:
    """Leave no process behind that writes to a folder which is about to go."""
    for path in Path("/proc/self/task").glob("*/children"):
        for pid in map(int, path.read_text().split()):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _print_table(rows: dict[str, Row], seconds: float) -> None:
    print(f"Checkpoints every {EVERY_STEPS} of 120 steps; {seconds:.0f} s in all.\n")
    print("| fault | tries | survived | identical | faults that hit | steps lost at most |")
    print("|---|---|---|---|---|---|")
    for name, row in rows.items():
        if row.tries:
            print(
                f"| {name} | {row.tries} | {row.survived} | {row.identical} | {row.faults} "
                f"| {row.lost} |"
            )
    print()


if __name__ == "__main__":
    sys.exit(main())
