"""A tiny run of the scale benchmark, and that it fails when a promise is not kept."""

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("pixel_format", ["raw", "jpeg"])
def test_a_tiny_run_keeps_its_bounds(pixel_format: str) -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/scale.py", "--records", "9000", "--format", pixel_format],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["records"] == 9000
    assert figures["shards"] == 3
    assert figures["same_batches"] is True
    # Times of so few images say little; what is missed must be seen in the exit status.
    assert set(figures["missed"]) <= {"linear"}, done.stdout + done.stderr
    assert done.returncode == (1 if figures["missed"] else 0)


KEPT = {
    "peak_mib_at_a_tenth": 500.0,
    "peak_mib_at_the_end": 510.0,
    "processor_microseconds_first_tenth": 200.0,
    "processor_microseconds_last_tenth": 220.0,
    "go_on_processor_seconds": 0.1,
    "start_processor_seconds_first": 1.0,
    "start_processor_seconds_middle": 1.0,
    "start_processor_seconds_last": 1.0,
    "same_batches": True,
}


@pytest.mark.parametrize(
    ("figure", "value", "missed"),
    [
        ("same_batches", True, []),
        ("same_batches", False, ["exact position"]),
        ("peak_mib_at_the_end", 540.0, ["memory"]),
        ("processor_microseconds_last_tenth", 300.0, ["linear"]),
        ("go_on_processor_seconds", 3.0, ["goes on"]),
        ("start_processor_seconds_last", 2.5, ["loader starts"]),
    ],
)
def test_a_promise_that_is_not_kept_is_named(figure: str, value: Any, missed: list[str]) -> None:
    benchmark = runpy.run_path(str(ROOT / "benchmarks" / "scale.py"))
    assert benchmark["missed_bounds"](KEPT | {figure: value}) == missed
