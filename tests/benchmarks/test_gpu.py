"""A tiny run of the GPU benchmark on a processor, and that it fails when a bound is missed."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]

WITHOUT = """
import runpy, sys
sys.modules["prefect"] = sys.modules["wandb"] = None  # importing them fails
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT, "benchmarks/gpu.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'benchmarks'}"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_every_variant_is_measured_without_prefect_and_wandb() -> None:
    done = run("--device", "cpu")
    assert done.stdout, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    rows = figures["rows"]
    kinds = [
        (row["batch_size"], row["mlp_ratio"], row["compile"], row["data_on_device"]) for row in rows
    ]
    best = max(rows[:2], key=lambda row: float(row["samples_per_second"]))["batch_size"]
    assert kinds == [
        (2, 4, False, True),
        (4, 4, False, True),
        (best, 2, False, True),
        (best, 4, False, False),
    ]
    for row in rows:
        assert row["samples_per_second"] > 0
        assert 0 < row["share"] < 1
    assert figures["kept"] is False, "a processor does not pretrain on ImageNet in 25 minutes"
    assert done.returncode == 1


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so_in_one_line() -> None:
    done = run()
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1] == (
        "benchmarks/gpu.py needs a CUDA device, and there is none."
    )


def row(ratio: float, rate: float, share: float, minutes: float) -> dict[str, Any]:
    return {"mlp_ratio": ratio, "samples_per_second": rate, "share": share, "minutes": minutes}


@pytest.mark.parametrize(
    ("rows", "kept"),
    [
        ([row(4, 20, 0.41, 24), row(4, 10, 0.2, 48), row(2, 30, 0.40, 15)], True),
        ([row(4, 20, 0.39, 24), row(2, 30, 0.40, 15)], False),
        ([row(4, 20, 0.41, 26), row(2, 30, 0.40, 15)], False),
        ([row(4, 20, 0.41, 24), row(2, 30, 0.40, 16)], False),
        ([row(4, 20, 0.41, 24)], False),
        ([], False),
    ],
)
def test_the_bounds_hold_for_the_fastest_of_both_ratios(
    rows: list[dict[str, Any]], kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    found = runpy.run_path(str(ROOT / "benchmarks" / "gpu.py"))["summary"](rows)
    assert found["kept"] == kept
    if rows:
        assert found["share_4"] == rows[0]["share"]
