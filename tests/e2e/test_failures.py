"""What happens by itself when a part of a run is killed, stopped or away, and what a user types."""

import os
import shlex
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING
from uuid import UUID

import psutil
import pytest
from prefect.client.schemas.objects import Artifact

from flows.service import (
    AUTO_RESUME,
    HEARTBEAT_SECONDS,
    MOST_CRASHES,
    RESUME_SECONDS,
    SILENCE_SECONDS,
)

if TYPE_CHECKING:  # the tests are no package that could be imported from
    from tests.e2e.conftest import Prefect

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]

LONG = "pretrain.epochs=300"
"""Some 20 seconds of training."""

ENDLESS = "pretrain.epochs=100000"


@pytest.fixture(autouse=True)
def nothing_is_left(prefect: "Prefect") -> Iterator[None]:
    """A test that fails must not leave a training that holds the slot of all others."""
    yield
    prefect.clear()


def test_a_killed_stage_is_retried_by_the_task_and_resumes(prefect: "Prefect") -> None:
    run = prefect.deployment_run("pretrain/drawn", overrides=["seed=1", LONG])
    prefect.wait_for_training(after=30).kill()
    prefect.wait_until(
        lambda: "Resumed from step" in prefect.task_states(run).get("pretrain", ""), 60
    )
    assert prefect.wait_for_state(run, "Completed", "Failed").state_name == "Completed"
    assert prefect.result_of(1)["status"] == "resumed"


def how_to_resume(prefect: "Prefect", run: UUID) -> Artifact:
    (found,) = (item for item in prefect.artifacts(run) if item.key == "how-to-resume")
    return found


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
    assert prefect.flow_run(run).run_count == 2, "though the worker reports some deaths twice"
    trainings = [task for task in prefect.task_runs(run) if task.name == "pretrain"]
    oldest, *later = sorted(trainings, key=lambda task: task.created or 0)
    assert oldest.state_name == "Crashed", "the orphan is closed"
    assert "Completed" in {task.state_name for task in later}
    assert prefect.result_of(2)["status"] == "resumed"


@pytest.mark.parametrize("when", ["running", "starting"])
def test_a_run_that_crashes_again_and_again_is_left_to_a_person(
    prefect: "Prefect", when: str
) -> None:
    seed = {"running": 8, "starting": 14}[when]
    run = prefect.deployment_run(
        "pretrain/drawn", overrides=[f"seed={seed}", ENDLESS], tags=[AUTO_RESUME]
    )
    killed: set[int] = set()
    deadline = time.monotonic() + 300
    while len(killed) <= MOST_CRASHES and time.monotonic() < deadline:
        for engine in prefect.engines():
            if when == "starting" or prefect.flow_run(run).state_name == "Running":
                killed.add(engine.pid)
                engine.kill()
        time.sleep(0.3)
        if AUTO_RESUME not in prefect.flow_run(run).tags:
            break
    assert any("not started again by itself" in line for line in prefect.logs(run))
    time.sleep(RESUME_SECONDS + 10)  # the last crash may still have had the tag
    for engine in prefect.engines():
        killed.add(engine.pid)
        engine.kill()
    time.sleep(RESUME_SECONDS + 10)
    assert prefect.engines() == []
    assert prefect.flow_run(run).state_name == "Crashed"
    assert MOST_CRASHES <= len(killed) <= MOST_CRASHES + 1


def test_after_a_crash_a_new_run_and_the_command_line_go_on_at_the_same_step(
    prefect: "Prefect",
) -> None:
    crashed = prefect.deployment_run("pretrain/drawn", overrides=["seed=9", LONG])
    engine_of(prefect.wait_for_training(after=30)).kill()
    prefect.wait_for_state(crashed, "Crashed")
    prefect.wait_until(lambda: prefect.stage_process() is None, 30)
    prefect.wait_until(lambda: prefect.saved_step(9) > 0, 30)
    saved = prefect.saved_step(9)

    again = prefect.deployment_run("pretrain/drawn", overrides=["seed=9", LONG])
    prefect.wait_until(lambda: f"pretrain resumes from step {saved}." in prefect.logs(again), 120)
    stage = prefect.wait_for_training(after=30)
    engine_of(stage).kill()
    prefect.wait_for_state(again, "Crashed")
    prefect.wait_until(lambda: prefect.stage_process() is None, 30)
    # The worker's hook writes it, some seconds after the death.
    prefect.wait_until(lambda: prefect.saved_step(9) > saved, 30)
    facts, later = prefect.run_json(9), prefect.saved_step(9)

    command = shlex.split(facts["resume"])
    assert command[0] == "rotvit"
    typed = prefect.run(sys.executable, "-m", "flows.cli", *command[1:])
    assert typed.returncode == 0, typed.stderr
    assert f"pretrain resumes from step {later}." in typed.stderr
    assert prefect.result_of(9)["status"] == "resumed"


def test_a_cancelled_run_saves_says_how_to_resume_and_retries_from_there(
    prefect: "Prefect",
) -> None:
    run = prefect.deployment_run("pretrain/drawn", overrides=["seed=3", LONG])
    stage = prefect.wait_for_training(after=30)
    assert prefect.prefect("flow-run", "cancel", str(run)).returncode == 0
    stage.wait(30)
    prefect.wait_for_state(run, "Cancelled", seconds=60)
    assert prefect.task_states(run)["pretrain"] in {"Crashed", "Cancelled"}
    facts, saved = prefect.run_json(3), prefect.saved_step(3)
    assert facts["state"] == "cancelled"
    assert saved
    assert facts["resume"] in str(how_to_resume(prefect, run).data)

    retried = prefect.prefect("flow-run", "retry", str(run))
    assert retried.returncode == 0, retried.stderr
    assert prefect.wait_for_state(run, "Completed", "Failed").state_name == "Completed"
    assert f"pretrain resumes from step {saved}." in prefect.logs(run)
    assert prefect.result_of(3)["status"] == "resumed"


def test_a_worker_that_is_stopped_stops_its_run_with_its_state_saved(prefect: "Prefect") -> None:
    run = prefect.deployment_run("pretrain/drawn", overrides=["seed=10", ENDLESS])
    stage = prefect.wait_for_training(after=30)
    worker = prefect.worker
    assert worker is not None
    worker.terminate()
    try:
        worker.wait(20)
    except subprocess.TimeoutExpired:  # Prefect's worker misses some; then whoever asked kills it
        worker.kill()
        worker.wait()
    stage.wait(30)
    prefect.start_worker()
    assert prefect.flow_run(run).state_name in {"Crashed", "Running", "AwaitingRetry"}
    prefect.wait_for_state(run, "Crashed", "AwaitingRetry", "Cancelled", seconds=150)
    retried = prefect.prefect("flow-run", "retry", str(run))
    assert retried.returncode == 0, retried.stderr
    prefect.wait_until(
        lambda: "Resumed from step" in prefect.task_states(run).get("pretrain", ""), 120
    )
    assert prefect.prefect("flow-run", "cancel", str(run)).returncode == 0
    prefect.wait_for_state(run, "Cancelled", seconds=60)


def test_a_locked_database_does_not_disturb_the_training(prefect: "Prefect") -> None:
    run = prefect.deployment_run("pretrain/drawn", overrides=["seed=11", "pretrain.epochs=900"])
    stage = prefect.wait_for_training(after=30)
    with closing(sqlite3.connect(prefect.home / "prefect.db", timeout=30)) as database:
        database.execute("BEGIN EXCLUSIVE")
        time.sleep(30)
        assert stage.is_running()
        database.rollback()
    done = prefect.wait_for_state(run, "Completed", "Failed", "Crashed", seconds=300)
    assert done.state_name == "Completed"
    assert done.run_count == 1
    assert prefect.result_of(11)["status"] == "computed"


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
    assert prefect.result_of(6)["status"] == "computed"
    prefect.wait_until(lambda: prefect.gpu_slots_taken() == 0, 90)


def test_a_run_whose_worker_and_process_are_both_gone_is_crashed_within_two_minutes(
    prefect: "Prefect",
) -> None:
    assert SILENCE_SECONDS > 60 + HEARTBEAT_SECONDS, "or a minute's outage would be taken for it"
    run = prefect.deployment_run("pretrain/drawn", overrides=["seed=7", ENDLESS])
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

    # Nobody was there to close its task run and to say how to resume; the next run does.
    assert prefect.task_states(run)["pretrain"] == "Running"
    following = prefect.deployment_run("pretrain/drawn", overrides=["seed=13"])
    assert prefect.wait_for_state(following, "Completed", "Failed").state_name == "Completed"
    assert prefect.task_states(run)["pretrain"] == "Crashed"
    facts = prefect.run_json(7)
    assert facts["state"] == "crashed"
    assert f"{facts['last_checkpoint']}" in str(how_to_resume(prefect, run).data)


def test_a_run_that_died_together_with_the_server_is_crashed_once_that_is_back(
    prefect: "Prefect",
) -> None:
    run = prefect.deployment_run("pretrain/drawn", overrides=["seed=12", ENDLESS])
    stage = prefect.wait_for_training()
    engine = engine_of(stage)
    time.sleep(HEARTBEAT_SECONDS)
    worker, server = prefect.worker, prefect.server
    assert worker is not None
    assert server is not None
    for pid in (server.pid, worker.pid):
        os.killpg(pid, signal.SIGKILL)
    if engine.is_running():
        engine.kill()
    server.wait()
    worker.wait()
    stage.wait(30)

    prefect.start_server()
    prefect.set_up()
    prefect.start_worker()
    prefect.wait_for_state(run, "Crashed", seconds=150)
