"""Pretraining on a few drawn images: exactness of a resume, and what the stage leaves behind."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from models.export import load_model
from training import pretrain, stage_files, store
from training.configure import build_settings, validate
from training.errors import CheckpointError, DivergedError
from training.network import build_model
from training.runner import StageContext, run_stage
from training.settings import Settings, merge
from training.stage_files import CHECKPOINTS
from training.stages import STAGES
from training.stopping import Stopped, StopRequest
from training.store import StageRequest, StageResult

RunStages = Callable[..., dict[str, StageResult]]
StopAfter = Callable[[int], StopRequest]


@pytest.fixture
def request_of(run_stages: RunStages, tmp_path: Path) -> Callable[..., StageRequest]:
    def build(settings: Settings, outputs: str = "outputs") -> StageRequest:
        results = run_stages(settings, tmp_path / outputs, "prepare_data")
        return store.make_request(STAGES["pretrain"], settings, tmp_path / outputs, results)

    return build


def weights_sha256(request: StageRequest) -> str:
    return stage_files.sha256_of(request.directory / "model" / "model.safetensors")


def metric_lines(request: StageRequest) -> list[dict[str, Any]]:
    lines = (request.directory / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_stopped_anywhere_and_resumed_ends_in_the_same_bytes(
    stop_after: StopAfter, request_of: Callable[..., StageRequest], tiny_settings: Settings
) -> None:
    """54 images in batches of 9 make 6 steps an epoch, 18 in all; dropout is on."""
    whole = request_of(tiny_settings, "whole")
    assert run_stage(whole, pretrain.compute).status == "computed"

    cut = request_of(tiny_settings, "cut")
    stops = 0
    result = None
    while result is None:
        try:
            # Within an epoch, at its end, during an evaluation: wherever the count runs out.
            result = run_stage(cut, pretrain.compute, stop_after(5))
        except (Stopped, InterruptedError):  # the latter from the last look at the test images
            stops += 1
            assert store.inspect(cut).state == "partial"
    assert stops >= 4
    assert result.status == "resumed"
    assert weights_sha256(cut) == weights_sha256(whole)
    assert result.scores == json.loads((whole.directory / "result.json").read_bytes())["scores"]
    assert metric_lines(cut) == metric_lines(whole), "no line lost, none doubled"


def test_the_seed_decides_the_weights(
    request_of: Callable[..., StageRequest], tiny_values: dict[str, Any]
) -> None:
    sums = []
    for outputs, seed in (("a", 0), ("b", 0), ("c", 1)):
        request = request_of(validate(merge(tiny_values, {"seed": seed})), outputs)
        run_stage(request, pretrain.compute)
        sums.append(weights_sha256(request))
    assert sums[0] == sums[1] != sums[2]


@pytest.mark.parametrize("rotations", ["all", "random"])
def test_the_first_loss_is_that_of_guessing_and_the_records_are_complete(
    request_of: Callable[..., StageRequest], tiny_values: dict[str, Any], rotations: str
) -> None:
    settings = validate(merge(tiny_values, {"pretrain": {"rotations": rotations}}))
    request = request_of(settings)
    result = run_stage(request, pretrain.compute)
    lines = metric_lines(request)
    assert lines[0]["train/loss"] == pytest.approx(math.log(4), abs=0.1)
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, 19))
    assert [line["epoch"] for line in lines if "val/rotation_accuracy" in line] == [1, 2, 3]
    assert result.scores["total"] == 4 * 21, "all four turns of the 21 test images"
    assert result.scores["steps"] == 18
    assert 0 <= result.scores["rotation_accuracy"] <= 1
    model = load_model(request.directory / "model")
    assert model.config.id2label == {0: "0", 1: "90", 2: "180", 3: "270"}


def test_the_rate_is_scaled_by_the_samples_of_a_step(
    request_of: Callable[..., StageRequest], tiny_values: dict[str, Any]
) -> None:
    """At the end of the warm-up the rate is base_lr × 36 / 256, or × 9 / 256 at one turn each."""
    for rotations, samples in (("all", 36), ("random", 9)):
        values = {"pretrain": {"rotations": rotations, "base_lr": 1.0e-3}}
        request = request_of(validate(merge(tiny_values, values)), rotations)
        run_stage(request, pretrain.compute)
        rates = [line["train/lr"] for line in metric_lines(request) if "train/lr" in line]
        assert max(rates) == pytest.approx(1.0e-3 * samples / 256)


@pytest.mark.slow
def test_it_learns_which_way_up_things_are(
    request_of: Callable[..., StageRequest], tiny_values: dict[str, Any]
) -> None:
    changes = {
        "model": {"dropout": 0.0, "embed_dim": 24},
        "pretrain": {"epochs": 60, "base_lr": 0.05},
    }
    request = request_of(validate(merge(tiny_values, changes)))
    run_stage(request, pretrain.compute)
    losses = [line["train/loss"] for line in metric_lines(request) if "train/loss" in line]
    assert sum(losses[-6:]) / 6 < 0.65 * math.log(4)


def test_divergence_is_an_error_that_names_step_and_settings(
    request_of: Callable[..., StageRequest], tiny_values: dict[str, Any]
) -> None:
    changes = {"pretrain": {"base_lr": 1e30, "clip_norm": None, "warmup_epochs": 0}}
    request = request_of(validate(merge(tiny_values, changes)))
    with pytest.raises(DivergedError, match=r"at step \d+ of pretrain.*base_lr"):
        run_stage(request, pretrain.compute)
    assert store.inspect(request).state == "missing", "no checkpoint holds weights that are nan"


def test_checkpoints_that_are_all_damaged_end_in_an_error(
    stop_after: StopAfter, request_of: Callable[..., StageRequest], tiny_settings: Settings
) -> None:
    request = request_of(tiny_settings)
    with pytest.raises(Stopped):
        run_stage(request, pretrain.compute, stop_after(8))
    for path in (request.directory / CHECKPOINTS).rglob("model.safetensors"):
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="all under"):
        run_stage(request, pretrain.compute)


def test_a_checkpoint_every_so_many_steps_is_one_to_resume_from(
    request_of: Callable[..., StageRequest],
    tiny_values: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    request = request_of(validate(merge(tiny_values, {"checkpoint": {"every_steps": 4}})))
    seen: list[int] = []
    original = StageContext.progress

    def killed_at_step_11(self: StageContext, done: int, *rest: Any, **named: Any) -> None:
        seen.append(done)
        if done == 11:
            raise KeyboardInterrupt
        original(self, done, *rest, **named)

    monkeypatch.setattr(StageContext, "progress", killed_at_step_11)
    with pytest.raises(KeyboardInterrupt):
        run_stage(request, pretrain.compute)
    assert seen[-1] == 11
    assert store.inspect(request).step == 8


def test_the_random_start_is_the_from_scratch_start(
    request_of: Callable[..., StageRequest], tiny_settings: Settings
) -> None:
    """Both begin with the same backbone, so that only the pretraining tells them apart."""
    request = request_of(tiny_settings)
    context = StageContext(request, StopRequest())
    first = build_model(context)
    second = build_model(context, ("a", "b", "c"))
    for name, weight in first.vit.state_dict().items():
        assert torch.equal(weight, second.vit.state_dict()[name]), name


def test_exported_weights_are_those_of_the_last_step(
    request_of: Callable[..., StageRequest], tiny_settings: Settings
) -> None:
    request = request_of(tiny_settings)
    run_stage(request, pretrain.compute)
    last = request.directory / CHECKPOINTS / "step-00000018-evaluated" / "model.safetensors"
    exported = load_file(request.directory / "model" / "model.safetensors")
    for name, tensor in load_file(last).items():
        assert torch.equal(tensor, exported[name]), name


@pytest.mark.parametrize(
    ("options", "forward_passes"),
    [
        ({}, 4.0),
        ({"rotations": "random"}, 1.0),
        ({"patch_rotation": 0.5}, 5.0),
    ],
)
def test_the_passes_that_training_is_worth_are_counted(
    tiny_values: dict[str, Any], options: dict[str, Any], forward_passes: float
) -> None:
    """A step is worth three forward passes: itself, and twice that backward."""
    settings = validate(merge(tiny_values, {"pretrain": {**options, "epochs": 2}}))
    assert pretrain.passes_of_training(settings, 50) == 2 * 50 * 3 * forward_passes


def test_images_that_are_shown_smaller_are_worth_a_part_of_a_pass() -> None:
    """At half the side there are a quarter of the patches, and attention is a small part."""
    whole, half = (
        pretrain.passes_of_training(build_settings("imagenet", overrides=overrides), 1)
        for overrides in ([], ["pretrain.image_size=80"])
    )
    assert half / whole == pytest.approx(26 / 101, rel=0.05)
