"""The probe's curve over the number of labels, on a few drawn images."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from training import store
from training.configure import validate
from training.features import open_features
from training.images import open_labelled
from training.settings import ConfigError, Settings, merge
from training.stages import STAGES
from training.store import StageResult

RunStages = Callable[..., dict[str, StageResult]]

FRACTIONS = [0.01, 0.02, 0.25, 1.0]
"""Of 54 training images of 3 classes: 3 (one each), 3 again, 14 and 54."""


@pytest.fixture
def settings(tiny_values: dict[str, Any]) -> Settings:
    return validate(merge(tiny_values, {"evaluation": {"label_fractions": FRACTIONS}}))


@pytest.fixture
def results(run_stages: RunStages, settings: Settings, tmp_path: Path) -> dict[str, StageResult]:
    return run_stages(settings, tmp_path / "outputs", "label_efficiency")


def test_every_number_of_labels_has_one_point_with_its_control(
    results: dict[str, StageResult],
) -> None:
    assert set(results) == {"prepare_data", "pretrain", "features", "label_efficiency"}
    scores = results["label_efficiency"].scores
    assert [row["labels"] for row in scores["points"]] == [3, 14, 54]
    assert [row["fraction"] for row in scores["points"]] == [0.01, 0.25, 1.0]
    assert scores["total"] == 21
    for row in scores["points"]:
        for kind in ("", "random_"):
            assert row[f"{kind}top1"] == row[f"{kind}correct"] / 21
            assert row[f"{kind}lr"] in settings_lrs(results)
            assert 0 <= row[f"{kind}val_top1"] <= 1


def settings_lrs(results: dict[str, StageResult]) -> tuple[float, ...]:
    directory = results["label_efficiency"].directory
    return store.read_config(directory).settings.linear_probe.lrs


@pytest.mark.parametrize("labels", [14, None])
def test_a_point_is_what_the_linear_probe_finds_with_as_many_labels(
    run_stages: RunStages, settings: Settings, tmp_path: Path, labels: int | None
) -> None:
    outputs = tmp_path / "outputs"
    found = run_stages(settings, outputs, "label_efficiency")["label_efficiency"].scores
    (point,) = [row for row in found["points"] if row["labels"] == (labels or 54)]
    fewer = validate(merge(settings.model_dump(), {"transfer": {"labels": labels}}))
    probe = run_stages(fewer, outputs, "linear_probe")["linear_probe"].scores
    assert point["random_top1"] == probe["random_backbone_top1"]
    for name in ("top1", "correct", "val_top1", "lr", "weight_decay"):
        assert point[name] == probe[name], name


def test_more_labels_help_as_another_library_finds(
    results: dict[str, StageResult], settings: Settings
) -> None:
    """Logistic regression on the same features; of 21 images a few may be told otherwise."""
    for row in results["label_efficiency"].scores["points"][1:]:
        labelled = validate(merge(settings.model_dump(), {"transfer": {"labels": row["labels"]}}))
        images = open_labelled(results["prepare_data"].directory, labelled)
        features = open_features(results["features"].directory, "pretrained", images)
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
        model.fit(features.train.final_cls[0].numpy(), features.train.labels.numpy())
        theirs = np.sum(
            model.predict(features.test.final_cls[0].numpy()) == features.test.labels.numpy()
        )
        assert abs(row["correct"] - int(theirs)) <= 5


def test_only_the_fractions_and_the_probe_make_its_key(
    results: dict[str, StageResult], settings: Settings, tmp_path: Path
) -> None:
    def key(**changes: Any) -> str:
        changed = validate(merge(settings.model_dump(), changes))
        stage = STAGES["label_efficiency"]
        return store.make_request(stage, changed, tmp_path / "outputs", results).key

    now = results["label_efficiency"].key
    assert key() == key(transfer={"labels": 9}) == key(finetune={"epochs": 9}) == now
    others = {
        key(evaluation={"label_fractions": [0.5, 1.0]}),
        key(linear_probe={"epochs": 9}),
        key(seed=1),
        key(data={"split_seed": 1}),
    }
    assert len(others | {now}) == 5


@pytest.mark.parametrize(
    ("fractions", "words"),
    [
        ([0.5, 0.1], r"must ascend, each a fraction once, got \[0\.5, 0\.1\]\. Try \[0\.1, 0\.5\]"),
        ([0.1, 0.1], r"Try \[0\.1\]"),
        ([0.0, 0.1], "greater than 0"),
        ([1.5], "less than or equal to 1"),
        ([], "at least 1 item"),
    ],
)
def test_fractions_that_make_no_curve_are_refused(
    tiny_values: dict[str, Any], fractions: list[float], words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        validate(merge(tiny_values, {"evaluation": {"label_fractions": fractions}}))
    assert str(error.value).startswith("evaluation.label_fractions")
