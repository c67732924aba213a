"""The average of the weights: by hand, and what training does with it."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from models.export import load_model
from training import evaluation, pretrain, store
from training.averaging import WeightAverage
from training.configure import validate
from training.runner import run_stage
from training.settings import merge
from training.stage_files import CHECKPOINTS
from training.stages import STAGES
from training.store import StageRequest, StageResult

RunStages = Callable[..., dict[str, StageResult]]


def network(value: float = 1.0) -> nn.Linear:
    made = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        made.weight.fill_(value)
    return made


def set_weight(made: nn.Linear, value: float) -> None:
    with torch.no_grad():
        made.weight.fill_(value)


def test_the_average_by_hand() -> None:
    """Decay 0.25: at most 1/10 after step 0, 2/11 after step 1; 0.25 itself after step 8."""
    made = network(1.0)
    average = WeightAverage(made, 0.25)
    set_weight(made, 2.0)
    average.update(0)
    expected = 0.1 * 1 + 0.9 * 2
    assert average.tensors()["weight"].tolist() == [pytest.approx([expected] * 2)]
    set_weight(made, 5.0)
    average.update(1)
    expected = 2 / 11 * expected + 9 / 11 * 5
    assert average.tensors()["weight"].tolist() == [pytest.approx([expected] * 2)]
    average.update(8)
    expected = 0.25 * expected + 0.75 * 5
    assert average.tensors()["weight"].tolist() == [pytest.approx([expected] * 2)]


def test_frozen_weights_are_left_out() -> None:
    made = nn.Sequential(network(1.0), network(2.0).requires_grad_(False))
    assert list(WeightAverage(made, 0.9).tensors()) == ["0.weight"]


def test_it_is_in_place_for_a_while_also_when_that_fails() -> None:
    made = network(1.0)
    average = WeightAverage(made, 0.9)
    set_weight(made, 3.0)
    weight = made.weight

    def fail() -> None:
        with average.in_place():
            assert made.weight.tolist() == [[1.0, 1.0]]
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert made.weight is weight, "optimisers hold on to the parameters themselves"
    assert made.weight.tolist() == [[3.0, 3.0]]
    assert average.tensors()["weight"].tolist() == [[1.0, 1.0]]


def test_what_is_restored_is_a_copy() -> None:
    average = WeightAverage(network(1.0), 0.9)
    kept = {"weight": torch.full((1, 2), 7.0)}
    average.restore(kept)
    average.update(3)
    assert kept["weight"].tolist() == [[7.0, 7.0]]
    assert average.tensors()["weight"].tolist() != [[1.0, 1.0]]


@pytest.fixture
def request_of(run_stages: RunStages, tmp_path: Path, tiny_run: dict[str, Any]) -> StageRequest:
    changes = {"pretrain": {"ema": 0.9, "epochs": 2}, "checkpoint": {"every_steps": 1}}
    settings = validate(merge(copy.deepcopy(tiny_run), changes))
    results = run_stages(settings, tmp_path, "prepare_data")
    return store.make_request(STAGES["pretrain"], settings, tmp_path, results)


def test_the_averaged_weights_are_exported_and_both_are_in_the_checkpoint(
    request_of: StageRequest,
) -> None:
    run_stage(request_of, pretrain.compute)
    last = request_of.directory / CHECKPOINTS / "step-00000012-evaluated"
    before = request_of.directory / CHECKPOINTS / "step-00000012"
    live, average = load_file(last / "model.safetensors"), load_file(last / "average.safetensors")
    exported = load_model(request_of.directory / "model").state_dict()
    assert set(average) == set(exported)
    for name, tensor in exported.items():
        assert torch.equal(tensor, average[name]), name
    assert any(not torch.equal(live[name], average[name]) for name in live)
    # The evaluation put the averaged weights in place, and the live ones back.
    assert (before / "model.safetensors").read_bytes() == (last / "model.safetensors").read_bytes()


def test_the_averaged_weights_are_those_that_are_scored(
    request_of: StageRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    original = evaluation.evaluate

    def evaluate(model: Any, *arguments: Any, **named: Any) -> Any:
        seen.append(model.vit.embeddings.cls_token.detach().clone())
        return original(model, *arguments, **named)

    monkeypatch.setattr(pretrain, "evaluate", evaluate)
    run_stage(request_of, pretrain.compute)
    root = request_of.directory / CHECKPOINTS / "step-00000012-evaluated"
    average = load_file(root / "average.safetensors")["vit.embeddings.cls_token"]
    assert torch.equal(seen[1], average), "on val, after the last epoch"
    assert torch.equal(seen[2], average), "on test"
