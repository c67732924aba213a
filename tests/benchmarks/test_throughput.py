"""A short run of the throughput benchmark."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_drawn_preset_is_compared_with_its_network_alone() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/throughput.py", "--presets", "drawn", "--blocks", "3"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    figures = json.loads(done.stdout.splitlines()[-1])
    rates = figures["samples_per_second_drawn"], figures["network_samples_per_second_drawn"]
    assert min(rates) > 0
    # Two blocks of a second each say little; that the bound decides must be seen all the same.
    assert figures["ratio_lowest_drawn"] <= figures["ratio_drawn"] <= figures["ratio_highest_drawn"]
    assert 0.3 < figures["ratio_drawn"] < 1.5
    assert figures["kept"] == (figures["ratio_drawn"] >= 0.95)
    assert done.returncode == (0 if figures["kept"] else 1)
