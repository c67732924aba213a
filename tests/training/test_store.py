from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from training import store
from training.configure import override, validate
from training.runner import Compute, StageContext, StageOutcome, run_stage
from training.settings import Settings, merge
from training.stage_files import CHECKPOINTS, OutputsError
from training.stages import STAGES
from training.store import StageRequest, StageResult

Request = Callable[..., StageRequest]
Made = Callable[..., StageResult]


def test_the_key_changes_with_every_setting_that_can_change_the_result(
    request_pretrain: Request,
) -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"seed": 1},
        {"model": {"mlp_ratio": 3}},
        {"pretrain": {"base_lr": 0.5}},
        {"pretrain": {"rotations": "random"}},
        {"data": {"val_fraction": 0.3}},
        {"data": {"split_seed": 9}},
        {"pretrain": {"accumulation_steps": 3}},
        {"pretrain": {"crop_scale": 0.3}},
        {"pretrain": {"crop_scale": 1}},
        {"hardware": {"precision": "bfloat16"}},
        {"hardware": {"compile": True}},
        {"hardware": {"compile": False}},
    ]
    keys = {request_pretrain(change).key for change in changes}
    assert len(keys) == len(changes)
    assert request_pretrain(data_digest="other").key not in keys


def test_the_key_ignores_what_cannot_change_the_result(request_pretrain: Request) -> None:
    unchanged = request_pretrain().key
    for change in (
        {"checkpoint": {"every_seconds": 7}},
        {"checkpoint": {"every_steps": 7, "max_skipped_steps": 7}},
        {"tracking": {"log_every_steps": 3, "wandb": "offline"}},
        {"finetune": {"epochs": 50}},
        {"transfer": {"labels": 12}},
        {"hardware": {"threads": 2, "data_on_device": True}},
        {"pretrain": {"crop_scale": None}},
        {"finetune": {"crop_scale": 0.3}},
    ):
        assert request_pretrain(change).key == unchanged, change


@pytest.mark.parametrize("stage", ["pretrain", "finetune_1", "finetune_2", "from_scratch"])
def test_a_setting_that_came_later_is_no_part_of_a_key_until_it_is_set(
    tiny_settings: Settings, stage: str
) -> None:
    """So that results from before it came are found."""
    section = stage.partition("_1")[0].partition("_2")[0]
    name = f"{section}.crop_scale"
    assert name not in store._values_read(STAGES[stage], tiny_settings)
    changed = override(tiny_settings, [f"{name}=0.5"])
    assert store._values_read(STAGES[stage], changed)[name] == 0.5


def test_a_result_that_verifies_is_cached_and_not_computed_again(
    request_pretrain: Request,
    compute: Compute,
) -> None:
    request = request_pretrain()
    assert store.inspect(request).state == "missing"
    assert run_stage(request, compute).status == "computed"

    def must_not_run(context: StageContext) -> StageOutcome:
        raise AssertionError("computed again")

    again = run_stage(request, must_not_run)
    assert again.status == "cached"
    assert again.scores == {"top1": 0.5}


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda path: path.write_bytes(b"0123456780"), "damaged"),
        (lambda path: path.write_bytes(b"012345678"), "9 bytes instead of 10"),
        (lambda path: path.unlink(), "is gone"),
    ],
)
def test_a_damaged_file_is_computed_again_with_the_reason(
    request_pretrain: Request,
    compute: Compute,
    damage: Callable[[Path], Any],
    why: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    request = request_pretrain()
    run_stage(request, compute)
    damage(request.directory / "model" / "weights")
    verdict = store.inspect(request)
    assert verdict.state == "missing"
    assert f"model/weights {why}" in verdict.why or why in verdict.why
    assert run_stage(request, compute).status == "computed"
    assert "pretrain is computed again: model/weights" in caplog.text
    assert store.inspect(request).state == "cached"


def test_an_unreadable_result_is_not_trusted(request_pretrain: Request, compute: Compute) -> None:
    request = request_pretrain()
    run_stage(request, compute)
    (request.directory / "result.json").write_text("{}")
    assert "result.json cannot be read" in store.inspect(request).why


def test_checkpoints_without_a_result_are_partial_at_the_newest_step(
    request_pretrain: Request,
) -> None:
    request = request_pretrain()
    for name in ("step-00000009", "step-00000012", "step-00000013.damaged", ".tmp-x"):
        (request.directory / CHECKPOINTS / name).mkdir(parents=True)
    verdict = store.inspect(request)
    assert (verdict.state, verdict.step) == ("partial", 12)


def test_a_result_built_on_a_replaced_input_is_missing(
    made: Made, compute: Compute, tmp_path: Path, tiny_settings: Settings
) -> None:
    def features_of(backbone_digest: str) -> StageRequest:
        results = {
            "prepare_data": made("prepare_data", tmp_path),
            "pretrain": made("pretrain", tmp_path, digest=backbone_digest),
        }
        return store.make_request(STAGES["features"], tiny_settings, tmp_path, results)

    first, second = features_of("old"), features_of("new")
    assert first.key == second.key, "a backbone's bytes are checked, not part of the key"
    run_stage(first, compute)
    (first.directory / CHECKPOINTS / "step-00000001").mkdir(parents=True)
    verdict = store.inspect(second)
    assert verdict.state == "missing"
    assert verdict.why == "pretrain was computed again and is not the same"
    run_stage(second, compute)
    assert not (first.directory / CHECKPOINTS).exists(), "nothing resumes from old work"
    assert store.inspect(second).state == "cached"


def test_only_jpeg_enters_the_key_of_prepared_images(
    tiny_settings: Settings, tmp_path: Path
) -> None:
    def prepare_with(**data: Any) -> StageRequest:
        settings = validate(merge(tiny_settings.model_dump(), {"data": data}))
        return store.make_request(STAGES["prepare_data"], settings, tmp_path, {})

    assert set(prepare_with().reads) == {"source", "side"}, "keys from before there was a choice"
    assert prepare_with(format="raw").key == prepare_with().key
    assert prepare_with(format="jpeg").key != prepare_with().key


def test_status_says_which_setting_changed(request_pretrain: Request, compute: Compute) -> None:
    run_stage(request_pretrain(), compute)
    verdict = store.inspect(request_pretrain({"pretrain": {"base_lr": 0.5}}))
    assert verdict.why == "because pretrain.base_lr changed from 0.002 to 0.5"
    verdict = store.inspect(request_pretrain(data_digest="other"))
    assert verdict.why == "because prepare_data is another one"


def test_a_request_comes_back_from_its_directory(request_pretrain: Request) -> None:
    request = request_pretrain()
    store.write_config(request)
    assert store.read_config(request.directory) == request


def test_a_directory_without_a_config_is_explained(tmp_path: Path) -> None:
    with pytest.raises(OutputsError, match=r"must hold a config\.yaml"):
        store.read_config(tmp_path)
