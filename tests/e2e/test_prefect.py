"""Runs as users start them, against a real server and worker, and what happens when things fail."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from flows.rotation_vit import MOST_RUNS
from flows.service import AUTO_RESUME, HEARTBEAT_SECONDS, SILENCE_SECONDS

if TYPE_CHECKING:  # the tests are no package that could be imported from
    from tests.e2e.conftest import Prefect

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]

LONG = "pretrain.epochs=300"
"""Some 20 seconds of training."""

STAGES = {
    "prepare_data",
    "pretrain",
    "linear_probe",
    "finetune_1",
    "finetune_2",
    "from_scratch",
    "feature_analysis",
    "report",
}


def run_json(prefect: "Prefect", seed: int) -> dict[str, Any]:
    for path in (prefect.outputs / "runs").glob("*/run.json"):
        facts: dict[str, Any] = json.loads(path.read_bytes())
        if facts["seed"] == seed:
            return facts
    raise AssertionError(f"no run with seed {seed}")


def result_of(prefect: "Prefect", seed: int) -> dict[str, Any]:
    for path in prefect.outputs.glob("pretrain/*/result.json"):
        if f"seed: {seed}\n" in path.with_name("config.yaml").read_text():
            found: dict[str, Any] = json.loads(path.read_bytes())
            return found
    raise AssertionError(f"no pretraining with seed {seed}")


def test_a_deployed_run_tells_its_story_and_the_second_one_is_cached(prefect: "Prefect") -> None:
    run = prefect.deployment_run("rotation-vit/drawn")
    done = prefect.wait_for_state(run, "Completed", "Failed", "Crashed")
    assert done.state_name == "Completed"
    assert re.fullmatch(r"drawn · .+ · seed 0", done.name)
    assert prefect.task_states(run) == dict.fromkeys(STAGES, "Completed")

    artifacts = prefect.artifacts(run)
    progress = {str(item.key): item for item in artifacts if item.type == "progress"}
    trained = next(item for key, item in progress.items() if key.startswith("progress-pretrain"))
    assert trained.data == 100
    assert "18 of 18 steps, epoch 3, loss" in str(trained.description)
    assert "648 samples" in str(trained.description)
    assert any(key.startswith("progress-prepare-data") for key in progress)
    pages = [item for item in artifacts if item.type == "markdown"]
    newest = next(page for page in pages if page.description == "After report")
    for stage in STAGES - {"report"}:
        assert stage.replace("_", "-") in str(newest.data)
    assert "report/index.html" in str(newest.data)
    assert any("data:image/png;base64," in str(page.data) for page in pages)
    (layers,) = (item for item in artifacts if item.type == "table")
    assert [row["name"] for row in json.loads(str(layers.data))] == [
        "embedding",
        "block 1",
        "block 2",
    ]

    again = prefect.deployment_run("rotation-vit/drawn")
    assert prefect.wait_for_state(again, "Completed", "Failed").state_name == "Completed"
    assert prefect.task_states(again) == dict.fromkeys(STAGES, "Cached")


def test_a_killed_stage_is_retried_by_the_task_and_resumes(prefect: "Prefect") -> None:
    run = prefect.deployment_run("pretrain/drawn", overrides=["seed=1", LONG])
    prefect.wait_for_training(after=30).kill()
    prefect.wait_until(
        lambda: "Resumed from step" in prefect.task_states(run).get("pretrain", ""), 60
    )
    assert prefect.wait_for_state(run, "Completed", "Failed").state_name == "Completed"
    assert result_of(prefect, 1)["status"] == "resumed"


def engine_of(stage: psutil.Process) -> psutil.Process:
    """The flow run's process."""
    parent = stage.parent()
    assert parent is not None
    return parent


def test_a_killed_flow_run_is_crashed_resumed_by_itself_and_its_orphans_are_closed(
    prefect: "Prefect",
) -> None:
    run = prefect.deployment_run("pretrain/drawn", overrides=["seed=2", LONG], tags=[AUTO_RESUME])
    stage = prefect.wait_for_training(after=30)
    killed = time.monotonic()
    engine_of(stage).kill()
    prefect.wait_until(lambda: prefect.flow_run(run).run_count > 1, 120)
    assert time.monotonic() - killed < 120
    stage.wait(30)
    assert prefect.wait_for_state(run, "Completed", "Failed").state_name == "Completed"
    # The worker reports some deaths twice (Prefect 3.8.8): then two attempts run, and the lock of
    # the stage makes that harmless.
    assert prefect.flow_run(run).run_count <= MOST_RUNS
    trainings = [task for task in prefect.task_runs(run) if task.name == "pretrain"]
    oldest, *later = sorted(trainings, key=lambda task: task.created or 0)
    assert oldest.state_name == "Crashed", "the orphan is closed"
    assert "Completed" in {task.state_name for task in later}
    assert result_of(prefect, 2)["status"] == "resumed"


def test_a_cancelled_run_saves_says_how_to_resume_and_retries_from_there(
    prefect: "Prefect",
) -> None:
    run = prefect.deployment_run("pretrain/drawn", overrides=["seed=3", LONG])
    stage = prefect.wait_for_training(after=30)
    assert prefect.prefect("flow-run", "cancel", str(run)).returncode == 0
    stage.wait(30)
    prefect.wait_for_state(run, "Cancelled", seconds=60)
    assert prefect.task_states(run)["pretrain"] in {"Crashed", "Cancelled"}
    facts = run_json(prefect, 3)
    assert facts["state"] == "cancelled"
    saved = re.search(r"step-0*(\d+)", facts["last_checkpoint"])
    assert saved is not None
    (how,) = (item for item in prefect.artifacts(run) if item.key == "how-to-resume")
    assert facts["resume"] in str(how.data)

    retried = prefect.prefect("flow-run", "retry", str(run))
    assert retried.returncode == 0, retried.stderr
    assert prefect.wait_for_state(run, "Completed", "Failed").state_name == "Completed"
    assert f"pretrain resumes from step {saved[1]}." in prefect.logs(run)
    assert result_of(prefect, 3)["status"] == "resumed"


def test_two_runs_share_one_pretraining_and_another_seed_waits_for_the_gpu(
    prefect: "Prefect",
) -> None:
    first = prefect.deployment_run("pretrain/drawn", overrides=["seed=4", LONG])
    prefect.wait_for_training()
    second = prefect.deployment_run("pretrain/drawn", overrides=["seed=4", LONG])
    other = prefect.deployment_run("pretrain/drawn", overrides=["seed=5"])
    prefect.wait_until(lambda: prefect.task_states(other).get("pretrain") == "Waiting for GPU", 60)
    for run in (first, second, other):
        assert prefect.wait_for_state(run, "Completed", "Failed").state_name == "Completed"
    assert result_of(prefect, 4)["status"] == "computed", "once, without a break"


def test_a_server_that_is_away_for_a_minute_does_not_disturb_the_training(
    prefect: "Prefect",
) -> None:
    run = prefect.deployment_run("pretrain/drawn", overrides=["seed=6", "pretrain.epochs=1500"])
    stage = prefect.wait_for_training(after=30)
    server = prefect.server
    assert server is not None
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()
    time.sleep(50)  # and it takes some ten to start
    assert stage.is_running(), "it goes on without the server"
    prefect.start_server()
    done = prefect.wait_for_state(run, "Completed", "Failed", "Crashed", seconds=400)
    assert done.state_name == "Completed"
    assert done.run_count == 1, "nobody took it for dead"
    assert result_of(prefect, 6)["status"] == "computed"
    prefect.wait_until(lambda: prefect.gpu_slots_taken() == 0, 90)


def test_a_run_whose_worker_and_process_are_both_gone_is_crashed_within_two_minutes(
    prefect: "Prefect",
) -> None:
    assert SILENCE_SECONDS > 60 + HEARTBEAT_SECONDS, "or a minute's outage would be taken for it"
    run = prefect.deployment_run("pretrain/drawn", overrides=["seed=7", "pretrain.epochs=100000"])
    stage = prefect.wait_for_training()
    engine = engine_of(stage)
    time.sleep(HEARTBEAT_SECONDS)  # the automation starts with the first sign of life
    worker = prefect.worker
    assert worker is not None
    worker.kill()
    worker.wait()
    if engine.is_running():
        engine.kill()
    killed = time.monotonic()
    stage.wait(30)
    prefect.wait_for_state(run, "Crashed", seconds=150)
    assert time.monotonic() - killed < 125
    prefect.start_worker()


def test_wrong_parameters_are_refused_before_any_work(prefect: "Prefect") -> None:
    wrong = json.dumps({"preset": "drawn", "pretrain": {"epochs": 0}})
    refused = prefect.prefect("deployment", "run", "rotation-vit/drawn", "-p", f"settings={wrong}")
    assert refused.returncode == 1
    assert "settings.pretrain.epochs" in refused.stdout + refused.stderr

    run = prefect.deployment_run("rotation-vit/drawn", overrides=["pretrain.epoch=3"])
    failed = prefect.wait_for_state(run, "Failed", "Completed", "Crashed")
    assert failed.state is not None
    assert failed.state.name == "Failed"
    assert "Did you mean pretrain.epochs" in str(failed.state.message)
    assert prefect.task_runs(run) == []


def test_a_server_that_does_not_answer_is_told_in_one_line(tmp_path: Path) -> None:
    started = time.monotonic()
    run = subprocess.run(
        [sys.executable, "-m", "flows.cli", "run", "--outputs", str(tmp_path)],
        env={**os.environ, "PREFECT_API_URL": "http://127.0.0.1:9/api"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2
    (line,) = (line for line in run.stderr.splitlines() if "PREFECT_API_URL" in line)
    assert "http://127.0.0.1:9/api" in line
    assert "run without one" in line
    assert time.monotonic() - started < 20  # most of it imports Prefect
