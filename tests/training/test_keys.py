"""Settings that are read where they are set are part of the key there."""

from pathlib import Path
from typing import Any

import pytest

from training import store
from training.configure import build_settings
from training.stages import STAGES, plan
from training.store import StageResult

ON: dict[str, Any] = {
    "pretrain.crop_scale": 0.3,
    "pretrain.drop_path": 0.1,
    "pretrain.image_size": 16,
    "pretrain.pool": "mean",
    "pretrain.ema": 0.999,
    "pretrain.patch_rotation": 1.0,
    "pretrain.patch_gap": 1.0,
    "pretrain.colour_jitter": 0.4,
    "pretrain.greyscale": 0.2,
    "finetune.crop_scale": 0.3,
    "finetune.drop_path": 0.1,
    "finetune.layer_decay": 0.75,
    "from_scratch.crop_scale": 0.3,
    "from_scratch.drop_path": 0.1,
}
"""A value other than off of every setting that a stage reads where it is set."""


def keys(tmp_path: Path, *overrides: str) -> dict[str, str]:
    settings = build_settings("drawn", overrides=overrides)
    results: dict[str, StageResult] = {}
    found: dict[str, str] = {}
    for stage in plan(settings):
        request = store.make_request(stage, settings, tmp_path, results)
        found[stage.name] = request.key
        results[stage.name] = StageResult(
            stage=stage.name,
            key=request.key,
            directory=request.directory,
            status="cached",
            wall_seconds=0.0,
            digest="",
            scores={},
        )
    return found


@pytest.mark.parametrize(("name", "value"), ON.items())
def test_a_setting_that_is_on_is_part_of_the_key(tmp_path: Path, name: str, value: Any) -> None:
    section = name.partition(".")[0]
    stages = {"finetune": ["finetune_1", "finetune_2"]}.get(section, [section])
    off, on = keys(tmp_path), keys(tmp_path, f"{name}={value}")
    for stage in stages:
        assert on[stage] != off[stage]


def test_every_setting_that_is_read_where_set_is_tried_above() -> None:
    names = {name for stage in STAGES.values() for name in stage.reads_where_set}
    assert names - {"data.leave_out_test_copies"} == set(ON)
