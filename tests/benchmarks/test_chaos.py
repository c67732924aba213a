"""A short version of the chaos benchmark: one try and a few for each kind of fault."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_every_kind_of_fault_is_survived_with_the_same_bytes() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/chaos.py", "--tries", "18", "--seed", "7"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert last == {"tries": 18, "survived": 18, "identical": 18, "seed": 7}
