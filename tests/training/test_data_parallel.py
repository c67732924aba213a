"""Training in several processes: the same samples, weights, scores and decisions as in one."""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from data.loaders import Share
from tasks.child_process import StageFailedError, StageStoppedError, run_in_child
from training import attempts, hardware, launching, stage_files, store
from training.configure import build_settings, validate
from training.hardware import choose_processes
from training.lock import locked
from training.recipes import PretrainSettings
from training.settings import ConfigError, HardwareSettings, Settings, merge
from training.stage_files import CHECKPOINTS, checkpoint_step, newest_step
from training.stages import STAGES
from training.stopping import EXIT_RESUME
from training.store import StageRequest, StageResult
from training.variants import variants

RunStages = Callable[..., dict[str, StageResult]]
RequestOf = Callable[..., StageRequest]

ROOT = Path(__file__).parents[2]

STEPS = 56
"""Of the trainings below: 14 epochs of four."""

DIVISIBLE: dict[str, Any] = {
    "model": {"dropout": 0.0},
    "pretrain": {"epochs": 14, "batch_size": 12, "warmup_epochs": 1},
    "finetune": {"batch_size": 8},
    "from_scratch": {"batch_size": 8},
}

LONG: dict[str, Any] = {
    "model": {"dropout": 0.1},
    "pretrain": {"epochs": 4000, "batch_size": 12},
    "tracking": {"log_every_steps": 20},
    "hardware": {"processes": 2},
    "checkpoint": {"every_seconds": 3600},
}


@pytest.fixture
def request_of(run_stages: RunStages, tiny_values: dict[str, Any], tmp_path: Path) -> RequestOf:
    """The request of a stage, with changed settings; the stages before it are there."""

    def build(
        changes: dict[str, Any] | None = None, outputs: str = "outputs", stage: str = "pretrain"
    ) -> StageRequest:
        settings: Settings = validate(merge(merge(tiny_values, DIVISIBLE), changes or {}))
        results: dict[str, StageResult] = {}
        for needed in STAGES[stage].needs(settings).values():
            results |= run_stages(settings, tmp_path / outputs, needed)
        request = store.make_request(STAGES[stage], settings, tmp_path / outputs, results)
        store.write_config(request)
        return request

    return build


def forked(request: StageRequest, count: int, **options: Any) -> tuple[list[int], str]:
    """Run a stage in so many processes; return their exit statuses and what they said."""
    command = [sys.executable, "-m", "tests.training.forked_team"]
    done = subprocess.run(
        [*command, str(request.directory), str(count), json.dumps(options)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert not done.returncode, done.stderr
    codes: list[int] = json.loads(done.stdout.splitlines()[-1])
    return codes, done.stdout + done.stderr


def newest(request: StageRequest) -> dict[str, Tensor]:
    """The weights, and the optimiser's state, of the newest checkpoint."""
    root = request.directory / CHECKPOINTS
    directory = max(path for path in root.iterdir() if checkpoint_step(path) is not None)
    return {
        f"{group}/{name}": tensor
        for group in ("model", "optimizer", "average")
        if (directory / f"{group}.safetensors").is_file()
        for name, tensor in load_file(directory / f"{group}.safetensors").items()
    }


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == torch.float64 or name.endswith("/step")
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=1e-8, msg=name)


def samples(folder: Path, count: int) -> list[Any]:
    """Epoch and images of every step, those of all processes put together."""
    rows = [(folder / f"{index}.jsonl").read_text().splitlines() for index in range(count)]
    steps = []
    for parts in zip(*(map(json.loads, part) for part in rows), strict=True):
        assert len({(step, epoch) for step, epoch, _ in parts}) == 1
        ids = list(itertools.chain.from_iterable(ids for _, _, ids in parts))
        steps.append([*parts[0][:2], ids])
    return steps


def losses(request: StageRequest) -> list[float]:
    rows = map(json.loads, (request.directory / "metrics.jsonl").read_text().splitlines())
    return [value for row in rows for name, value in row.items() if name.endswith("/loss")]


RECIPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "options": {
        "accumulation_steps": 3,
        "clip_norm": 0.1,
        "ema": 0.9,
        "patch_rotation": 0.5,
        "pool": "mean",
        "rotations": "random",
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_any_number_of_processes_sees_the_same_samples_and_ends_in_the_same_weights(
    request_of: RequestOf, tmp_path: Path, name: str
) -> None:
    changes = {"pretrain": RECIPES[name]}
    found = {}
    for count in (1, 2, 4):
        request = request_of(changes, f"in-{count}")
        record = tmp_path / f"record-{count}"
        record.mkdir()
        codes, said = forked(request, count, float64=True, record=str(record))
        assert codes == [0] * count, said
        result = store.inspect(request).result
        assert result is not None
        assert result.scores["steps"] == STEPS
        assert result.scores["total"] == 4 * 21, "every test image once, in four turns"
        found[count] = (samples(record, count), newest(request), losses(request), result.scores)
    ids, weights, curve, scores = found[1]
    assert len(ids) == STEPS
    for other_ids, other_weights, other_curve, other_scores in (found[2], found[4]):
        assert other_ids == ids
        assert_close(other_weights, weights)
        assert other_curve == pytest.approx(curve, abs=1e-8)
        assert other_scores == scores


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["finetune_1", "finetune_2", "from_scratch"])
def test_the_other_trainings_end_alike_too(request_of: RequestOf, stage: str) -> None:
    """Frozen blocks, kept tokens, the best epoch, and an early end, which all must agree on."""
    changes = {
        "finetune": {"flip": False, "patience": 2, "epochs": 6},
        "from_scratch": {"patience": 2, "epochs": 6},
        "data": {"crop_margin": 0.0},
        "hardware": {"frozen_tokens": "always" if stage == "finetune_2" else "never"},
    }
    found = []
    for count in (1, 2):
        request = request_of(changes, f"in-{count}", stage)
        assert ("tokens" in request.inputs) == (stage == "finetune_2")
        codes, said = forked(request, count)
        assert codes == [0] * count, said
        result = store.inspect(request).result
        assert result is not None
        found.append((result.scores, losses(request)))
        weights = load_file(request.directory / "model" / "model.safetensors")
        found[-1] += (weights,)  # type: ignore[operator]
    (scores, curve, weights), (other_scores, other_curve, other_weights) = found  # type: ignore[misc]
    assert other_scores == scores
    assert other_curve == pytest.approx(curve, abs=1e-5)
    for name, tensor in weights.items():
        torch.testing.assert_close(other_weights[name], tensor, rtol=0, atol=1e-4, msg=name)


@pytest.mark.slow
def test_two_processes_one_and_two_again_end_as_one_that_never_stopped(
    request_of: RequestOf,
) -> None:
    whole, cut = request_of(outputs="whole"), request_of(outputs="cut")
    assert whole.key == cut.key
    assert forked(whole, 1, float64=True)[0] == [0]
    # A request that only one of the processes hears of.
    codes, said = forked(cut, 2, float64=True, at=[[1, 10, "stop"]])
    assert codes == [EXIT_RESUME] * 2, said
    assert newest_step(cut.directory) == 10, "all leave at the same step"
    codes, said = forked(cut, 1, float64=True, at=[[0, 31, "stop"]])
    assert codes == [EXIT_RESUME], said
    assert "saved with processes 2, this is 1" in said
    assert newest_step(cut.directory) == 31
    codes, said = forked(cut, 2, float64=True)
    assert codes == [0, 0], said
    assert_close(newest(cut), newest(whole))
    assert losses(cut) == pytest.approx(losses(whole), abs=1e-8)


@pytest.mark.slow
def test_a_resume_in_as_many_processes_ends_in_the_same_bytes(request_of: RequestOf) -> None:
    """With dropout, whose numbers depend on the process, and where they are not all alike."""
    changes = {"model": {"dropout": 0.2}, "pretrain": {"epochs": 3, "drop_path": 0.2}}
    whole, cut = request_of(changes, "whole"), request_of(changes, "cut")
    assert forked(whole, 2)[0] == [0, 0]
    assert forked(cut, 2, at=[[0, 7, "stop"]])[0] == [EXIT_RESUME] * 2
    assert forked(cut, 2)[0] == [0, 0]
    sums = {
        stage_files.sha256_of(request.directory / "model" / "model.safetensors")
        for request in (whole, cut)
    }
    assert len(sums) == 1


@pytest.mark.slow
def test_a_step_that_one_process_cannot_use_is_skipped_by_all(request_of: RequestOf) -> None:
    request = request_of({"pretrain": {"epochs": 2}})
    codes, said = forked(request, 2, at=[[1, 3, "spoil"]])
    assert codes == [0, 0], said
    result = store.inspect(request).result
    assert result is not None
    assert result.scores["skipped_steps"] == 1
    assert all(torch.isfinite(tensor).all() for tensor in newest(request).values())


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_what_goes_wrong_while_saving_in_one_process_ends_all(
    request_of: RequestOf, failing: int
) -> None:
    request = request_of()
    started = time.monotonic()
    codes, said = forked(request, 2, at=[[failing, 4, "fail to save"]])
    assert codes[failing] == 2, said  # out of memory, which is explained
    assert codes[1 - failing] == 1
    assert "Another process of this training has failed." in said
    assert time.monotonic() - started < 20


@pytest.mark.slow
@pytest.mark.parametrize(("what", "lost"), [("die", 0), ("die", 1), ("hang", 1)])
def test_the_others_end_when_one_is_lost(request_of: RequestOf, what: str, lost: int) -> None:
    request = request_of({"checkpoint": {"every_steps": 5}})
    codes, said = forked(request, 2, lost_after=2, at=[[lost, 12, what]])
    assert codes[lost] == -signal.SIGKILL
    assert codes[1 - lost] == 1, said
    assert "One of the 2 processes of this training has ended, or has not answered" in said
    reached = newest_step(request.directory)
    assert reached is not None
    assert forked(request, 2)[0] == [0, 0]


@pytest.mark.slow
def test_all_wait_while_another_run_computes_the_stage(
    request_of: RequestOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_of({"pretrain": {"epochs": 2}})
    with locked(attempts.lock_path(request), what="test"):
        command = [sys.executable, "-m", "tests.training.forked_team", str(request.directory)]
        process = subprocess.Popen(
            [*command, "2", "{}"], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        time.sleep(12)
        assert process.poll() is None
        assert not (request.directory / "metrics.jsonl").exists()
    said, _ = process.communicate(timeout=60)
    assert "Waiting for another run" in said
    assert said.splitlines()[-1] == "[0, 0]"
