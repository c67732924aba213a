"""Training in several processes: the same samples, weights, scores and decisions as in one."""

import itertools
import json
import logging
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
from training import attempts, features, hardware, stage_files, store
from training.configure import build_settings, validate
from training.data_parallel import Team
from training.errors import EXIT_USER_ERROR, OutOfMemoryError
from training.hardware import choose_processes
from training.lock import locked
from training.recipes import PretrainSettings
from training.settings import ConfigError, HardwareSettings, Settings, merge
from training.shard_pushing import push
from training.stage_files import CHECKPOINTS, checkpoint_step, newest_step
from training.stages import STAGES
from training.stopping import EXIT_RESUME, PARENT_STOPS
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

FAILS_TO_SAVE = """
import os
if os.environ.get("RANK") == "1":
    from training import loop
    save = loop._Run._save_here
    def fail(run):
        if run.context.stop:
            raise MemoryError("nothing left to save with")
        save(run)
    loop._Run._save_here = fail
"""
"""As `sitecustomize.py` imported by every interpreter that starts with its folder on the path."""


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
        weights = load_file(request.directory / "model" / "model.safetensors")
        found.append((result.scores, losses(request), weights))
    (scores, curve, weights), (other_scores, other_curve, other_weights) = found
    assert other_scores == scores
    assert other_curve == pytest.approx(curve, abs=1e-5)
    for name, tensor in weights.items():
        if name.endswith("k_proj.bias"):
            continue  # attention does not see it: its gradient is rounding, which AdamW makes large
        torch.testing.assert_close(other_weights[name], tensor, rtol=0, atol=1e-4, msg=name)


@pytest.mark.slow
def test_processes_that_divide_the_images_find_the_same_features(
    request_of: RequestOf, tmp_path: Path
) -> None:
    """More of them than there are batches, too."""
    found = []
    for count in (1, 2, 3):
        request = request_of(outputs=f"in-{count}", stage="features")
        codes, said = forked(request, count)
        assert codes == [0] * count, said
        assert store.inspect(request).state == "cached"
        files = sorted((request.directory / features.FOLDER).iterdir())
        found.append({path.name: np.load(path) for path in files})
    assert len(found[0]) == 6
    for name, rows in found[0].items():
        assert np.abs(rows).max(axis=(0, 2)).min() > 0, "every image has its features"
        for others in found[1:]:
            np.testing.assert_allclose(others[name], rows, rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_the_features_by_hand_start_the_processes_that_are_asked_for(request_of: RequestOf) -> None:
    request = request_of({"hardware": {"processes": 2}}, stage="features")
    done = subprocess.run(
        [sys.executable, "-P", "-m", "training.features", str(request.directory)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "divided among 2 processes" in done.stdout
    decided = json.loads((request.directory / "hardware.json").read_bytes())
    assert decided["processes"] == 2
    assert store.inspect(request).state == "cached"


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
def test_all_leave_an_evaluation_in_which_one_is_told_to_stop(request_of: RequestOf) -> None:
    request = request_of()
    codes, said = forked(request, 2, at=[[1, 8, "stop in evaluation"]])
    assert codes == [EXIT_RESUME] * 2, said
    names = sorted(path.name for path in (request.directory / CHECKPOINTS).iterdir())
    assert names[-1] == "step-00000008", "not evaluated"
    assert forked(request, 2)[0] == [0, 0]
    rows = (request.directory / "metrics.jsonl").read_text().splitlines()
    assert sum("val/loss" in row for row in rows) == STEPS // 4, "each epoch once"


@pytest.mark.slow
@pytest.mark.parametrize(("what", "saved"), [("before an epoch", 9), ("in evaluation", 8)])
def test_all_save_when_one_is_told_to_stop_while_it_reads_from_an_address(
    request_of: RequestOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, saved: int
) -> None:
    monkeypatch.setenv("ROTVIT_SHARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ROTVIT_SHARD_CACHE_GIB", "0")
    request = request_of()
    push(
        request.settings,
        request.outputs,
        str(tmp_path / "there"),
        delete_pixels=True,
        report=lambda done, total: None,
    )
    codes, said = forked(request, 2, at=[[1, 8, f"stop {what}"]])
    assert codes == [EXIT_RESUME] * 2, said
    assert store.inspect(request).step == saved


@pytest.mark.slow
@pytest.mark.parametrize("what", ["spoil", "infinite loss"])
def test_a_step_that_one_process_cannot_use_is_skipped_by_all(
    request_of: RequestOf, what: str
) -> None:
    request = request_of({"pretrain": {"epochs": 2}})
    codes, said = forked(request, 2, at=[[1, 3, what]])
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
    # They need not lose touch, which here takes longer than the test may.
    codes, said = forked(request, 2, lost_after=600, at=[[failing, 4, "fail to save"]])
    assert codes[failing] == 2, said  # out of memory, which is explained
    assert codes[1 - failing] == 1
    assert "Another process of this training has failed." in said


@pytest.mark.slow
@pytest.mark.parametrize(("what", "lost"), [("die", 0), ("die", 1), ("hang", 1)])
def test_the_others_end_when_one_is_lost(request_of: RequestOf, what: str, lost: int) -> None:
    request = request_of({"checkpoint": {"every_steps": 5}})
    codes, said = forked(request, 2, lost_after=2, at=[[lost, 12, what]])
    assert codes[lost] == -signal.SIGKILL
    assert codes[1 - lost] == 1, said
    assert "One of the 2 processes of this training has ended, or has not answered" in said
    assert "typically caused" not in said, "gloo's guesses"
    assert ".cc:" not in said, "the path of gloo's source"
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
        assert process.stdout is not None
        while "Waiting for another run" not in process.stdout.readline():
            assert process.poll() is None
        time.sleep(5)
        assert process.poll() is None
        assert not (request.directory / "metrics.jsonl").exists()
    said, _ = process.communicate(timeout=60)
    assert said.splitlines()[-1] == "[0, 0]"


def members() -> list[psutil.Process]:
    """The processes of this one's stage that train; not their launcher."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has just ended
            if "training.pretrain" in process.cmdline() and "RANK" in process.environ():
                found.append(process)
    return sorted(found, key=lambda process: int(process.environ()["RANK"]))


def wait_until_it_trains(request: StageRequest, *, saved: bool = False) -> None:
    path = request.directory / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (path.is_file() and path.stat().st_size):
        assert time.monotonic() < deadline, "it does not train"
        time.sleep(0.05)
    while saved and newest_step(request.directory) is None:
        time.sleep(0.05)


def meanwhile(act: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=act)
    thread.start()
    return thread


def gone(processes: list[psutil.Process], seconds: float) -> bool:
    return not psutil.wait_procs(processes, timeout=seconds)[1]


@pytest.mark.slow
def test_a_killed_process_ends_all_and_a_retry_goes_on_in_another_number(
    request_of: RequestOf, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    changes = merge(LONG, {"checkpoint": {"every_steps": 5}})
    request = request_of(changes)
    seen: list[psutil.Process] = []

    def kill() -> None:
        wait_until_it_trains(request, saved=True)
        seen.extend(members())
        seen[1].kill()

    killer = meanwhile(kill)
    with pytest.raises(StageFailedError, match=r"Process 1 of 2 was ended by SIGKILL \(the k"):
        run_in_child(request)
    killer.join()
    assert gone(seen, 10)
    reached = newest_step(request.directory)
    assert reached is not None

    alone = request_of(merge(changes, {"hardware": {"processes": "auto"}}))
    assert alone.directory == request.directory

    def stop() -> None:
        resumed = request.directory / "resumes.json"
        while not resumed.is_file():
            time.sleep(0.05)
        for process in psutil.Process().children(recursive=True):
            if "training.pretrain" in process.cmdline():
                process.terminate()

    stopper = meanwhile(stop)
    with pytest.raises(StageStoppedError):
        run_in_child(alone)
    stopper.join()
    (_,) = [each for each in caplog.messages if "Started in 2 process" in each]
    further = newest_step(request.directory)
    assert further is not None
    assert further >= reached


@pytest.mark.slow
@pytest.mark.parametrize(
    "told", ["one", "one that insists", "launcher", "everybody", "by its parent"]
)
def test_all_save_and_end_whoever_is_told_to_stop(request_of: RequestOf, told: str) -> None:
    request = request_of(LONG)
    seen: list[psutil.Process] = []

    def stop() -> None:
        wait_until_it_trains(request)
        seen.extend(members())
        launcher = seen[1].parent()
        assert launcher is not None
        if told == "by its parent":
            launcher.send_signal(PARENT_STOPS)
            return
        if told == "one that insists":
            while not gone(seen[1:], 0.01):
                seen[1].terminate()
            return
        # A batch system tells everybody; those that train hear it twice, then.
        for process in {"one": seen[1:], "launcher": [launcher]}.get(told, [*seen, launcher]):
            process.terminate()

    stopper = meanwhile(stop)
    with pytest.raises(StageStoppedError, match="goes on from what it has saved"):
        run_in_child(request)
    stopper.join()
    assert gone(seen, 10)
    assert store.inspect(request).state == "partial"
    assert len(list((request.directory / CHECKPOINTS).iterdir())) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_all_save_and_end_when_their_task_is_stopped_or_killed(
    request_of: RequestOf, number: signal.Signals
) -> None:
    request = request_of(LONG)
    code = (
        "import sys; from pathlib import Path; from training.store import read_config;"
        "from tasks.child_process import run_in_child;"
        "run_in_child(read_config(Path(sys.argv[1])))"
    )
    task = subprocess.Popen(
        [sys.executable, "-c", code, str(request.directory)], stderr=subprocess.DEVNULL
    )
    wait_until_it_trains(request)
    seen = members()
    assert len(seen) == 2
    task.send_signal(number)
    task.wait(timeout=40)
    assert gone(seen, 30)
    assert store.inspect(request).state == "partial"


@pytest.mark.slow
def test_processes_that_hang_end_with_the_launcher_of_a_task_that_has_waited_long_enough(
    request_of: RequestOf,
) -> None:
    """They are in sessions of their own, which a kill of the launcher's group does not reach."""
    request = request_of(LONG)
    code = (
        "import sys; from pathlib import Path; from training.store import read_config;"
        "from tasks import child_process; child_process.GRACE_SECONDS = 2;"
        "child_process.run_in_child(read_config(Path(sys.argv[1])))"
    )
    task = subprocess.Popen(
        [sys.executable, "-c", code, str(request.directory)], stderr=subprocess.DEVNULL
    )
    wait_until_it_trains(request)
    seen = members()
    try:
        seen[1].send_signal(signal.SIGSTOP)  # the other one waits for it, in the middle of a step
        task.send_signal(signal.SIGINT)
        task.wait(timeout=20)
        assert gone(seen, 5)
    finally:
        for process in seen:
            with suppress(psutil.NoSuchProcess):
                process.kill()


@pytest.mark.slow
def test_an_error_while_saving_is_said_although_the_launcher_was_told_to_stop(
    request_of: RequestOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's launcher does not say then how the processes have ended."""
    request = request_of(LONG)
    (tmp_path / "sitecustomize.py").write_text(FAILS_TO_SAVE)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")

    def stop() -> None:
        wait_until_it_trains(request)
        launcher = members()[0].parent()
        assert launcher is not None
        launcher.terminate()

    stopper = meanwhile(stop)
    with pytest.raises(OutOfMemoryError, match="accumulation_steps"):
        run_in_child(request)
    stopper.join()


@pytest.mark.slow
def test_a_stage_by_hand_starts_its_processes_and_ends_with_their_status(
    request_of: RequestOf,
) -> None:
    request = request_of(
        merge(LONG, {"pretrain": {"base_lr": 1e30, "clip_norm": None, "warmup_epochs": 0}})
    )
    done = subprocess.run(
        [sys.executable, "-P", "-m", "training.pretrain", str(request.directory)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == EXIT_USER_ERROR, done.stderr
    assert "Lower pretrain.base_lr" in done.stdout


@pytest.mark.slow
def test_two_nodes_find_each_other_and_train_together(request_of: RequestOf) -> None:
    """Two launchers with a common address, as on two machines that share their outputs."""
    request = request_of({"pretrain": {"epochs": 2}})
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "ours"),
        *("--local-addr", "127.0.0.1", "--no-python"),
        *(sys.executable, "-P", "-m", "training.pretrain", str(request.directory)),
    ]
    nodes = [
        subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for _ in range(2)
    ]
    said = [node.communicate(timeout=120)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(said)
    result = store.inspect(request).result
    assert result is not None
    assert result.scores["total"] == 4 * 21
    decided = json.loads((request.directory / "hardware.json").read_bytes())
    assert decided["processes"] == 2
    assert sum("pretrain is computed" in text for text in said) == 1


@pytest.mark.parametrize(("batch", "parts", "possible"), [(12, 1, 6), (12, 3, 4), (7, 1, 7)])
def test_as_many_gpus_are_used_as_divide_a_step(
    monkeypatch: pytest.MonkeyPatch, batch: int, parts: int, possible: int
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 7)
    recipe = PretrainSettings(batch_size=batch, accumulation_steps=parts)
    assert choose_processes(HardwareSettings(device="cuda"), recipe) == possible
    assert choose_processes(HardwareSettings(device="cuda"), None) == 7, "no steps, no condition"
    assert choose_processes(HardwareSettings(device="cpu"), recipe) == 1
    assert choose_processes(HardwareSettings(device="cpu", processes=5), None) == 5
    with pytest.raises(ConfigError, match=r"must divide a step's images .*, 5 do not\. Start"):
        choose_processes(HardwareSettings(device="cpu", processes=5), recipe)
    with pytest.raises(ConfigError, match=r"a GPU of its own, hardware\.processes=8 .* the 7 of"):
        choose_processes(HardwareSettings(device="cuda", processes=8), None)


def test_processes_that_do_not_divide_the_batches_are_refused_before_anything_is_computed() -> None:
    with pytest.raises(ConfigError, match=r"divide pretrain\.batch_size \(32\).*processes=2\."):
        build_settings("drawn", overrides=["hardware.processes=3"])
    both = ["hardware.processes=4", "finetune.accumulation_steps=16"]
    with pytest.raises(ConfigError, match=r"finetune\.accumulation_steps \(32 / 16\).*=2\."):
        build_settings("drawn", overrides=both)
    whole = build_settings("drawn", overrides=["finetune_all.batch_size=30"])
    assert whole.hardware.processes == "auto"


def test_few_labels_are_trained_on_in_one_process() -> None:
    """Their batches are as small as there are labels, which no number of processes divides."""
    overrides = ["hardware.processes=4", "evaluation.trained_curves=true"]
    settings = build_settings("drawn", overrides=overrides)
    data = StageResult(
        stage="prepare_data",
        key="",
        directory=Path(),
        status="cached",
        wall_seconds=0,
        digest="",
        scores={"counts": {"train": 3334, "test": 1000}, "classes": ["a"] * 10},
    )
    found = {variant.name: variant for variant in variants(settings, {"prepare_data": data})}
    assert found["30 labels"].settings.hardware.processes == 1
    assert found["1500 labels"].settings.hardware.processes == 4


def test_the_decision_of_another_number_of_processes_holds_but_for_their_threads(
    tmp_path: Path,
) -> None:
    before = torch.get_num_threads()
    try:
        wanted = HardwareSettings(device="cpu", precision="bfloat16", threads=2)
        first = hardware.decide_once(tmp_path, wanted, processes=2)
        later = HardwareSettings(device="cpu", precision="float32", threads=1)
        alone = hardware.decide_once(tmp_path, later)
        assert (alone.precision, alone.threads, alone.processes) == ("bfloat16", 1, 1)
        assert hardware.decide_once(tmp_path, later, processes=2) == first
    finally:
        hardware.use_threads(before)


def test_dropout_draws_other_numbers_in_each_process_and_the_same_as_ever_in_one() -> None:
    places = [Team().place, *(Team(index, 2).place for index in range(2)), Team(0, 4).place]
    assert places[0] == ()
    assert len(set(places)) == 4


def test_the_parts_of_what_is_divided_are_all_of_it_once() -> None:
    numbers = np.arange(23)
    for count in (1, 2, 5, 30):
        parts = [Share(index, count).of_all(numbers) for index in range(count)]
        assert np.concatenate(parts).tolist() == numbers.tolist()
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert Share(1, 4).of_batch(np.arange(8)).tolist() == [2, 3]
    with pytest.raises(ValueError, match="no 4 equal parts"):
        Share(0, 4).of_batch(np.arange(7))
