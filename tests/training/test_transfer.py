"""The stages after pretraining, on a few drawn images."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from data.loaders import eval_batches
from models.export import load_model, read_prepared_size
from models.resolution import at_image_size
from training import finetune, stage_files, store
from training.configure import validate
from training.evaluation import evaluate
from training.feature_geometry import linear_cka
from training.features import open_features
from training.hardware import Hardware
from training.images import open_labelled
from training.linear_probe import train_probe
from training.network import build_model
from training.readings import readings
from training.runner import StageContext, run_stage
from training.settings import Settings, merge
from training.stage_files import CHECKPOINTS
from training.stages import STAGES
from training.stopping import Stopped, StopRequest
from training.store import StageRequest, StageResult

RunStages = Callable[..., dict[str, StageResult]]

CPU = Hardware(device="cpu", precision="float32", compile=False, threads=1)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_model(directory / "model").state_dict()


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """Names of the parts whose weights differ: `layers.1`, `layernorm`, `classifier`…"""
    names = {name for name, value in before.items() if not torch.equal(value, after[name])}
    return {
        ".".join(name.removeprefix("vit.").split(".")[: 2 if "layers" in name else 1])
        for name in names
    }


def accuracy_on_test(result: StageResult, settings: Settings, prepared: Path) -> float:
    """Score an exported model by itself."""
    images = open_labelled(prepared, settings)
    model = load_model(result.directory / "model")
    batches = eval_batches(
        images.test,
        batch_size=4,
        side=settings.model.image_size,
        device=torch.device("cpu"),
    )
    return evaluate(model, batches, hardware=CPU, stop=StopRequest()).accuracy


@pytest.fixture
def pretrained(
    run_stages: RunStages, tiny_settings: Settings, tmp_path: Path
) -> dict[str, StageResult]:
    return run_stages(tiny_settings, tmp_path / "outputs", "linear_probe")


def test_the_probe_leaves_the_backbone_alone_and_moves_the_head(
    pretrained: dict[str, StageResult],
) -> None:
    before = weights(pretrained["pretrain"].directory)
    after = weights(pretrained["linear_probe"].directory)
    for name, value in before.items():
        if name.startswith("vit."):
            assert torch.equal(value, after[name]), name
    assert after["classifier.weight"].shape == (3, 12)
    assert after["classifier.weight"].abs().sum() > 0


def test_the_exported_probe_scores_what_is_reported(
    pretrained: dict[str, StageResult], tiny_settings: Settings
) -> None:
    prepared = pretrained["prepare_data"].directory
    result = pretrained["linear_probe"]
    found = accuracy_on_test(result, tiny_settings, prepared)
    assert found == pytest.approx(result.scores["top1"])
    assert result.scores["total"] == 21
    assert result.scores["labels"] == 30


@pytest.mark.parametrize(
    ("stage", "trained"),
    [
        ("finetune_1", {"layers.1", "layernorm", "classifier"}),
        ("finetune_2", {"layers.0", "layers.1", "layernorm", "classifier"}),
        ("finetune_all", {"embeddings", "layers.0", "layers.1", "layernorm", "classifier"}),
    ],
)
def test_fine_tuning_moves_the_head_and_the_last_blocks_only(
    run_stages: RunStages,
    tiny_settings: Settings,
    tmp_path: Path,
    stage: str,
    trained: set[str],
) -> None:
    results = run_stages(tiny_settings, tmp_path / "outputs", stage)
    before = weights(results["linear_probe"].directory)
    after = weights(results[stage].directory)
    moved = changed(before, after)
    # Val may find no epoch better than the first, but one epoch always moves all that is trained.
    assert moved == trained


def test_a_backbone_of_smaller_images_is_used_at_the_full_size(
    run_stages: RunStages, tiny_values: dict[str, Any], tmp_path: Path
) -> None:
    settings = validate(merge(tiny_values, {"pretrain": {"image_size": 8}}))
    results = run_stages(settings, tmp_path / "outputs", "feature_analysis")
    results |= run_stages(settings, tmp_path / "outputs", "linear_probe")
    small = load_model(results["pretrain"].directory / "model")
    assert small.config.image_size == 8
    assert read_prepared_size(results["pretrain"].directory / "model") == 10, "20 px at half size"
    probed = load_model(results["linear_probe"].directory / "model")
    assert probed.config.image_size == 16
    expected = at_image_size(small, 16).state_dict()
    for name, weight in probed.state_dict().items():
        assert torch.equal(weight, expected[name]) or name.startswith("classifier"), name
    found = accuracy_on_test(results["linear_probe"], settings, results["prepare_data"].directory)
    assert found == pytest.approx(results["linear_probe"].scores["top1"])


def test_fine_tuning_all_has_a_recipe_of_its_own(
    run_stages: RunStages, tiny_values: dict[str, Any], tmp_path: Path
) -> None:
    changes = {"finetune_all": {"epochs": 2, "batch_size": 10, "layer_decay": 0.5}}
    settings = validate(merge(tiny_values, changes))
    result = run_stages(settings, tmp_path / "outputs", "finetune_all")["finetune_all"]
    assert result.scores["epochs"] == 2
    assert result.scores["steps"] == 2 * (30 // 10)
    request = store.read_config(result.directory)
    assert not [name for name in request.reads if name.startswith("finetune.")]
    assert request.inputs["start"].stage == "linear_probe"


def test_the_exported_fine_tuned_model_is_the_best_epoch_not_the_last(
    run_stages: RunStages, tiny_values: dict[str, Any], tmp_path: Path
) -> None:
    """Checkpoints hold the last weights and the best ones; the two must not be the same object."""
    settings = validate(merge(tiny_values, {"finetune": {"epochs": 12, "base_lr": 0.5}}))
    results = run_stages(settings, tmp_path / "outputs", "finetune_2")
    result = results["finetune_2"]
    lines = [
        json.loads(line) for line in (result.directory / "metrics.jsonl").read_text().splitlines()
    ]
    by_epoch = {line["epoch"]: line["val/top1"] for line in lines if "val/top1" in line}
    best = result.scores["best_epoch"]
    assert best < 12, "pick another rate, or this test shows nothing"
    assert by_epoch[best] == max(by_epoch.values()) == result.scores["val_top1"]
    images = open_labelled(results["prepare_data"].directory, settings)
    model = load_model(result.directory / "model")
    batches = eval_batches(images.val, batch_size=4, side=16, device=torch.device("cpu"))
    found = evaluate(model, batches, hardware=CPU, stop=StopRequest())
    assert found.accuracy == pytest.approx(by_epoch[best])
    best_loss = next(
        line["val/loss"] for line in lines if line["epoch"] == best and "val/loss" in line
    )
    assert found.loss == pytest.approx(best_loss, rel=1e-5), "these are that epoch's weights"


def test_patience_ends_training_early(
    run_stages: RunStages, tiny_values: dict[str, Any], tmp_path: Path
) -> None:
    changes = {"from_scratch": {"epochs": 50, "patience": 2, "base_lr": 1e-9, "warmup_epochs": 0}}
    results = run_stages(validate(merge(tiny_values, changes)), tmp_path / "o", "from_scratch")
    assert results["from_scratch"].scores["epochs"] == 3, "the first is best, two more follow"


@pytest.mark.slow
def test_a_stopped_fine_tuning_resumes_with_its_best_weights(
    run_stages: RunStages, tiny_settings: Settings, tmp_path: Path
) -> None:
    """30 images in batches of 7 make 4 steps an epoch, 12 in all."""

    class StopOnce(StopRequest):
        def __bool__(self) -> bool:
            self.asked = getattr(self, "asked", 0) + 1
            return self.asked > 10

    ends = []
    for outputs, stops in (("whole", False), ("cut", True)):
        results = run_stages(tiny_settings, tmp_path / outputs, "linear_probe")
        request = store.make_request(
            STAGES["finetune_2"], tiny_settings, tmp_path / outputs, results
        )
        if stops:
            with pytest.raises((Stopped, InterruptedError)):
                run_stage(request, finetune.compute, StopOnce())
        result = run_stage(request, finetune.compute)
        assert result.status == ("resumed" if stops else "computed")
        ends.append(
            (result.scores, stage_files.sha256_of(request.directory / "model/model.safetensors"))
        )
        assert not (request.directory / CHECKPOINTS).exists(), "of no use any more"
    assert ends[0] == ends[1]


def test_fine_tuning_may_be_chained(
    run_stages: RunStages, tiny_values: dict[str, Any], tmp_path: Path
) -> None:
    changes = {"finetune": {"start_from": "previous"}}
    settings = validate(merge(tiny_values, changes))
    results = run_stages(settings, tmp_path / "outputs", "finetune_2")
    request = store.read_config(results["finetune_2"].directory)
    assert request.inputs["start"].stage == "finetune_1"
    assert results["finetune_2"].inputs["start"] == results["finetune_1"].digest


def test_from_scratch_trains_everything_and_needs_no_pretraining(
    run_stages: RunStages, tiny_settings: Settings, tmp_path: Path
) -> None:
    results = run_stages(tiny_settings, tmp_path / "outputs", "from_scratch")
    assert set(results) == {"prepare_data", "from_scratch"}
    result = results["from_scratch"]
    context = StageContext(store.read_config(result.directory), StopRequest())
    fresh = build_model(context, ("a", "b", "c")).state_dict()
    moved = changed(fresh, weights(result.directory))
    assert moved == {"embeddings", "layers.0", "layers.1", "layernorm", "classifier"}
    found = accuracy_on_test(result, tiny_settings, results["prepare_data"].directory)
    assert found == pytest.approx(result.scores["top1"])


def test_the_probe_reads_the_backbone_in_other_ways_besides(
    pretrained: dict[str, StageResult], tiny_settings: Settings
) -> None:
    scores = pretrained["linear_probe"].scores
    exported, *others = scores["readings"]
    assert [row["exported"] for row in scores["readings"]] == [True, False, False, False, False]
    for name in ("top1", "correct", "val_top1", "lr", "weight_decay"):
        assert exported[name] == scores[name]
    assert exported["random_top1"] == scores["random_backbone_top1"]
    assert [row["width"] for row in (exported, *others)] == [12, 12, 24, 24, 36]
    # Each is what its own reading of the recorded features gives.
    images = open_labelled(pretrained["prepare_data"].directory, tiny_settings)
    for backbone, key in (("pretrained", "top1"), ("random", "random_top1")):
        features = open_features(pretrained["features"].directory, backbone, images)  # type: ignore[arg-type]
        for reading, row in zip(readings(2), scores["readings"], strict=True):
            assert reading.name == row["name"]
            alone = train_probe(features, tiny_settings, num_classes=3, read=reading.read)
            assert alone.correct / 21 == row[key]
            assert alone.weight.shape == (3, row["width"])


def test_the_analysis_scores_every_layer_and_the_embedding_class_token_is_at_chance(
    run_stages: RunStages, tiny_settings: Settings, tmp_path: Path
) -> None:
    results = run_stages(tiny_settings, tmp_path / "outputs", "feature_analysis")
    scores = results["feature_analysis"].scores
    layers = scores["layers"]
    assert [row["name"] for row in layers] == ["embedding", "block 1", "block 2"]
    for prefix in ("", "random_"):
        # Before attention the class token has seen no pixel: one answer for all 21 images.
        assert layers[0][f"{prefix}cls_top1"] == pytest.approx(1 / 3)
    for row in layers:
        for name in ("top1", "cls_top1", "knn_top1", "random_top1", "random_knn_top1"):
            assert 0 <= row[name] <= 1
            assert (row[name] * 21) == pytest.approx(round(row[name] * 21)), "21 test images"
    images = open_labelled(results["prepare_data"].directory, tiny_settings)
    for backbone, prefix in (("pretrained", ""), ("random", "random_")):
        features = open_features(results["features"].directory, backbone, images)  # type: ignore[arg-type]
        for row, known, asked in zip(layers, features.train.mean, features.test.mean, strict=True):
            witness = KNeighborsClassifier(n_neighbors=3, metric="cosine")
            witness.fit(known.numpy(), features.train.labels.numpy())
            score = witness.score(asked.numpy(), features.test.labels.numpy())
            assert row[f"{prefix}knn"]["3"] == row[f"{prefix}knn_top1"] == pytest.approx(score)
            assert list(row[f"{prefix}knn"]) == ["1", "3"]
            singular = np.linalg.svd(asked.numpy() - asked.numpy().mean(axis=0), compute_uv=False)
            shares = singular / singular.sum()
            rank = np.exp(-(shares * np.log(shares)).sum())
            assert row[f"{prefix}effective_rank"] == pytest.approx(rank, rel=1e-4)
        cka = np.array(scores[f"{prefix}cka"])
        assert cka.shape == (3, 3)
        assert cka == pytest.approx(np.array(linear_cka(features.test.mean)))


def test_more_neighbours_than_labelled_images_are_all_of_them(
    run_stages: RunStages, tiny_values: dict[str, Any], tmp_path: Path
) -> None:
    settings = validate(merge(tiny_values, {"feature_analysis": {"knn_ks": [99, 30, 1]}}))
    scores = run_stages(settings, tmp_path / "outputs", "feature_analysis")["feature_analysis"]
    for row in scores.scores["layers"]:
        assert list(row["knn"]) == ["1", "30", "99"]
        assert row["knn"]["30"] == row["knn"]["99"] == pytest.approx(1 / 3), "30 labelled images"


def test_two_probes_of_the_same_backbone_are_the_same(
    run_stages: RunStages, tiny_settings: Settings, tmp_path: Path
) -> None:
    found = [
        run_stages(tiny_settings, tmp_path / name, "linear_probe")["linear_probe"]
        for name in ("a", "b")
    ]
    assert found[0].digest == found[1].digest


def test_requests_name_what_they_build_on(
    pretrained: dict[str, StageResult], tiny_settings: Settings, tmp_path: Path
) -> None:
    request: StageRequest = store.make_request(
        STAGES["finetune_1"], tiny_settings, tmp_path / "outputs", pretrained
    )
    assert request.inputs["start"].digest == pretrained["linear_probe"].digest
    assert request.inputs["data"].digest == pretrained["prepare_data"].digest
