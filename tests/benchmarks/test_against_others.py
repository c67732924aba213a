"""A short run of the comparison with other trainers, and what its processes promise."""

import json
import multiprocessing
import runpy
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

COUNTING = """
import multiprocessing
import threading
import time

def count(path, turns):
    file = open(path, "ab", buffering=0)

    def write():
        while True:
            file.write(b"x")
            time.sleep(0.001)

    threading.Thread(target=write, daemon=True).start()
    turns.begin()
    while True:
        time.sleep(0.05)
        turns.step_ended()

def give_up(path, turns):
    with open(path, "w") as file:
        file.write(multiprocessing.get_start_method())
    turns.begin()
"""


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Let the benchmarks import each other, and processes of theirs what a test writes."""
    (tmp_path / "counting.py").write_text(COUNTING, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return ROOT / "benchmarks"


@pytest.mark.slow
def test_pretraining_is_compared_with_a_plain_loop_and_the_trainer() -> None:
    small = ["model.image_size=32", "model.patch_size=8", "model.embed_dim=32", "model.depth=1"]
    small += ["hardware.precision=float32"]  # what auto takes depends on the processor
    done = subprocess.run(
        [
            *(sys.executable, "benchmarks/against_others.py", "--blocks", "4"),
            *("--against", "plain", "trainer"),
            *(argument for setting in small for argument in ("--set", setting)),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["ours"]["precision"] == "float32"
    for name in ("plain", "trainer"):
        assert found[f"ratio_lowest_{name}"] <= found[f"ratio_{name}"]
        # All but the decoding is next to nothing in so small a network, and ours has decoded.
        assert found[f"ratio_{name}"] > 1.2
    missed = [name for name, least in found["bounds"].items() if found[f"ratio_{name}"] < least]
    assert found["missed"] == missed
    assert done.returncode == (1 if missed else 0), done.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("benchmarks")
def test_a_process_stands_still_unless_it_is_its_turn(tmp_path: Path) -> None:
    counting, turns = import_module("counting"), import_module("turns")
    written = tmp_path / "written"
    player = turns.Player("counting", counting.count, str(written), 4)
    try:
        sizes, seconds = [], []
        for _ in range(3):
            seconds.append(player.turn())
            time.sleep(0.1)  # a signal takes a moment
            before = written.stat().st_size
            time.sleep(0.3)
            sizes.append(written.stat().st_size)
            assert sizes[-1] == before
        assert sizes[0] < sizes[1] < sizes[2]
        assert all(0.2 <= value < 0.35 for value in seconds), "a turn is four steps of 0.05 s"
    finally:
        player.end()


@pytest.mark.slow
@pytest.mark.usefixtures("benchmarks")
def test_a_process_starts_workers_as_usual_and_its_end_is_an_error(tmp_path: Path) -> None:
    counting, turns = import_module("counting"), import_module("turns")
    written = tmp_path / "written"
    player = turns.Player("counting", counting.give_up, str(written), 4)
    try:
        with pytest.raises(RuntimeError, match="counting must compute until it is ended"):
            player.turn()
    finally:
        player.end()
    assert written.read_text() == multiprocessing.get_all_start_methods()[0]


def test_ratios_are_medians_of_rounds_without_the_first(benchmarks: Path) -> None:
    others: dict[str, Any] = runpy.run_path(str(benchmarks / "against_others.py"))
    case = others["Case"](images_per_step=8, block=2, blocks=4)
    found = others["figures"](
        case,
        {"ours": [9, 1.0, 2.0, 1.0], "plain": [9, 2.0, 6.0, 4.0], "trainer": [9, 1.0, 1.0, 0.5]},
        prepare_seconds=30.0,
    )
    assert found["first_block_seconds_plain"] == 9
    assert found["samples_per_second_ours"] == 64
    assert found["samples_per_second_plain"] == 16
    assert (found["ratio_lowest_plain"], found["ratio_plain"], found["ratio_highest_plain"]) == (
        *(2, 3, 4),
    )
    # 100 images: an epoch of theirs is 400 samples at 16 a second, of ours at 64.
    assert case.images == 100
    assert found["paid_after_epochs_plain"] == pytest.approx(30 / (25 - 6.25))
    assert found["ratio_trainer"] == 0.5
    assert found["paid_after_epochs_trainer"] is None
