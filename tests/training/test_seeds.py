"""Means and standard deviations over seeds, against numpy."""

import numpy as np
import pytest

from training.seeds import MEASURED, Spread, over_seeds
from training.variants import SEEDED

SCORES = [0.812, 0.797, 0.823, 0.801, 0.77]


def probe(top1: float, random: float, labels: int = 500) -> dict[str, float]:
    return {"top1": top1, "random_backbone_top1": random, "labels": labels}


@pytest.mark.parametrize("n", [2, 3, 5])
def test_the_spread_is_the_one_of_numpy(n: int) -> None:
    found = Spread.of(SCORES[:n])
    assert found.n == n
    assert found.mean == pytest.approx(np.mean(SCORES[:n]), rel=1e-12)
    assert found.std == pytest.approx(np.std(SCORES[:n], ddof=1), rel=1e-12)


def test_every_score_of_a_stage_is_taken_over_the_run_and_its_seeds() -> None:
    own = {"linear_probe": probe(0.5, 0.25), "finetune_2": {"top1": 0.75, "labels": 500}}
    others = [
        {"linear_probe": probe(0.625, 0.125), "finetune_2": {"top1": 0.5, "labels": 500}},
        {"linear_probe": probe(0.75, 0.125)},
    ]
    found = over_seeds(own, others)
    assert found["linear_probe"]["top1"] == Spread.of([0.5, 0.625, 0.75])
    assert found["linear_probe"]["random_backbone_top1"] == Spread.of([0.25, 0.125, 0.125])
    assert found["finetune_2"] == {"top1": Spread.of([0.75, 0.5])}, "a seed that is not done yet"


def test_what_was_trained_on_other_labels_is_left_out() -> None:
    own = {"from_scratch": {"top1": 0.5, "labels": 500}}
    fewer = {"from_scratch": {"top1": 0.25, "labels": 30}}
    assert over_seeds(own, [fewer]) == {}
    other = {"from_scratch": {"top1": 0.75, "labels": 500}}
    assert over_seeds(own, [fewer, other])["from_scratch"]["top1"].n == 2


def test_one_seed_has_no_spread() -> None:
    assert over_seeds({"pretrain": {"rotation_accuracy": 0.9}}, []) == {}
    assert over_seeds({}, [{"linear_probe": probe(0.5, 0.2)}]) == {}


def test_what_is_trained_under_every_seed_has_its_spread_reported() -> None:
    assert set(SEEDED) - {"label_efficiency"} <= set(MEASURED)
