"""A tiny run of the preparation benchmark, and that it fails when a bound is missed."""

import io
import json
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_tiny_run_measures_preparing_and_decoding(tmp_path: Path) -> None:
    images = []
    for grey in (10, 90, 200):
        file = io.BytesIO()
        Image.new("RGB", (64, 48), (grey, grey, grey)).save(file, "JPEG")
        images.append({"bytes": file.getvalue(), "path": f"{grey}.jpg"})
    photos = tmp_path / "photos.parquet"
    pq.write_table(pa.table({"image": images}), photos)
    command = [sys.executable, "benchmarks/prepare.py", "--photos", str(photos)]
    done = subprocess.run(
        [*command, "--turns", "2", "--few", "20", "--many", "40"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert (figures["few"], figures["many"], figures["pixels"]) == (20, 40, 64 * 48)
    assert figures["ratio_lowest"] <= figures["ratio"] <= figures["ratio_highest"]
    assert 0 < figures["prepare_per_core"] < figures["decode_per_core"]
    assert min(figures["peak_mib_few"], figures["peak_mib_many"]) > 50, "torch alone takes more"
    # So few and small images cost less than the stage around them.
    assert "memory" not in figures["missed"], done.stdout + done.stderr
    assert done.returncode == (1 if figures["missed"] else 0)


def test_work_of_a_millisecond_has_a_time() -> None:
    timed = runpy.run_path(str(ROOT / "benchmarks" / "prepare.py"))["timed"]

    def spin() -> None:
        until = time.perf_counter() + 0.001
        while time.perf_counter() < until:
            pass

    assert min(timed(spin).processors for _ in range(20)) > 0


KEPT = {"ratio": 0.5, "peak_mib_few": 400.0, "peak_mib_many": 460.0}


@pytest.mark.parametrize(
    ("figure", "value", "missed"),
    [
        ("ratio", 0.5, []),
        ("ratio", 0.49, ["ratio"]),
        ("peak_mib_many", 461.0, ["memory"]),
    ],
)
def test_a_bound_that_is_missed_is_named(figure: str, value: float, missed: list[str]) -> None:
    benchmark = runpy.run_path(str(ROOT / "benchmarks" / "prepare.py"))
    assert benchmark["missed_bounds"](KEPT | {figure: value}) == missed
