"""The page of results in Prefect's UI."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tasks.artifacts import layer_rows, results_page

ROW = {"directory": "/out/x", "status": "computed", "wall_seconds": 30.0}

RESULTS: dict[str, Any] = {
    "preset": "drawn",
    "seed": 0,
    "stages": {"from_scratch": {**ROW, "top1": 0.61, "labels": 500}},
    "variants": {"seed 1": {"stages": {"from_scratch": {**ROW, "top1": 0.634, "labels": 500}}}},
    "over_seeds": {
        "pretraining": "own",
        "stages": {"from_scratch": {"top1": {"mean": 0.622, "std": 0.017, "n": 2}}},
    },
}


@pytest.mark.parametrize("variant", ["", "seed 1"])
def test_seeds_are_on_the_page_after_a_stage_of_the_run_or_of_a_variant(
    variant: str, tmp_path: Path
) -> None:
    newest: Any = SimpleNamespace(stage="from_scratch", variant=variant)
    lines = results_page(RESULTS, newest, tmp_path).splitlines()
    assert "| from-scratch | top-1 0.61; 0.622 ± 0.017 over 2 seeds | computed | 30 s |" in lines
    assert "| seed 1 | from-scratch 0.63 | computed | 30 s |" in lines
    assert "±: standard deviation between seeds (each pretrained)" in lines


def test_one_seed_has_no_words_about_several(tmp_path: Path) -> None:
    alone = {name: RESULTS[name] for name in ("preset", "seed", "stages")}
    newest: Any = SimpleNamespace(stage="from_scratch", variant="")
    page = results_page(alone, newest, tmp_path)
    assert "| from-scratch | top-1 0.61 | computed | 30 s |" in page
    assert "seeds" not in page
    assert "±" not in page


def test_a_row_of_the_layers_table_holds_plain_values_only() -> None:
    layer = {"name": "block 1", "top1": 0.123456, "knn": {"1": 0.5, "20": math.nan}, "rank": 7}
    assert layer_rows([layer]) == [
        {"name": "block 1", "top1": 0.1235, "knn_1": 0.5, "knn_20": None, "rank": 7}
    ]
