"""Results must not change unnoticed: cached ones would be mixed with new ones of the same key.

When a change of results is meant, raise the stage's `version` in `training/stages.py`, say in
CHANGELOG.md which results are not comparable, and write the file anew:

    ROTVIT_WRITE_GOLDEN=1 pytest tests/training/test_golden.py
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from training.settings import Settings
from training.stages import STAGES
from training.store import StageResult

GOLDEN = Path(__file__).with_name("golden.json")

TRAINED = ("pretrain", "finetune_1", "finetune_2", "from_scratch")

TOLERANCE = 1e-3
"""Relative. Kernels of other processors differ by some 1e-6 here; a changed formula by more."""


def record(results: dict[str, StageResult]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for stage in TRAINED:
        lines = (results[stage].directory / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        found[stage] = {
            "version": STAGES[stage].version,
            "train/loss": [row["train/loss"] for row in rows if "train/loss" in row],
            "val/loss": [row["val/loss"] for row in rows if "val/loss" in row],
        }
    probe = results["linear_probe"].scores
    found["linear_probe"] = {
        "version": STAGES["linear_probe"].version,
        "scores": [probe["top1"], probe["val_top1"], probe["random_backbone_top1"]],
    }
    layers = results["feature_analysis"].scores["layers"]
    found["feature_analysis"] = {
        "version": STAGES["feature_analysis"].version,
        "scores": [row["top1"] for row in layers] + [row["knn_top1"] for row in layers],
    }
    return found


def test_losses_and_scores_are_those_of_the_recorded_version(
    run_stages: Callable[..., dict[str, StageResult]], tiny_settings: Settings, tmp_path: Path
) -> None:
    results: dict[str, StageResult] = {}
    for stage in ("finetune_2", "finetune_1", "from_scratch", "feature_analysis"):
        results |= run_stages(tiny_settings, tmp_path, stage)
    found = record(results)
    if os.environ.get("ROTVIT_WRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
    golden = json.loads(GOLDEN.read_bytes())
    assert set(found) == set(golden)
    for stage, expected in golden.items():
        assert found[stage]["version"] == expected["version"], f"{stage}: write the file anew"
        for name, values in expected.items():
            assert found[stage][name] == pytest.approx(values, rel=TOLERANCE), (
                f"{stage} gives other results; see the top of this file"
            )
