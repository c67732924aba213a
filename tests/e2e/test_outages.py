"""What happens by itself when server, worker or database are stopped or away."""

import os
import signal
import sqlite3
import subprocess
import time
from contextlib import closing
from typing import TYPE_CHECKING

from flows.service import HEARTBEAT_SECONDS, SILENCE_SECONDS
from tests.e2e.marks import END_TO_END, ENDLESS

if TYPE_CHECKING:  # the tests are no package that could be imported from
    from tests.e2e.conftest import Prefect

pytestmark = END_TO_END


def test_a_worker_that_is_stopped_stops_its_run_with_its_state_saved(
    prefect: "Prefect", seed: int
) -> None:
    run = prefect.deployment_run("pretrain/drawn", overrides=[f"seed={seed}", ENDLESS])
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


def test_a_locked_database_does_not_disturb_the_training(prefect: "Prefect", seed: int) -> None:
    run = prefect.deployment_run(
        "pretrain/drawn", overrides=[f"seed={seed}", "pretrain.epochs=900"]
    )
    stage = prefect.wait_for_training(after=30)
    with closing(sqlite3.connect(prefect.home / "prefect.db", timeout=30)) as database:
        database.execute("BEGIN EXCLUSIVE")
        time.sleep(30)
        assert stage.is_running()
        database.rollback()
    done = prefect.wait_for_state(run, "Completed", "Failed", "Crashed", seconds=300)
    assert done.state_name == "Completed"
    assert done.run_count == 1
    assert prefect.result_of(seed)["status"] == "computed"


def test_a_server_that_is_away_for_a_minute_does_not_disturb_the_training(
    prefect: "Prefect", seed: int
) -> None:
    run = prefect.deployment_run(
        "pretrain/drawn", overrides=[f"seed={seed}", "pretrain.epochs=1500"]
    )
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
    assert prefect.result_of(seed)["status"] == "computed"
    prefect.wait_until(lambda: prefect.gpu_slots_taken() == 0, 90)


def test_a_run_whose_worker_and_process_are_both_gone_is_crashed_within_two_minutes(
    prefect: "Prefect", seed: int
) -> None:
    assert SILENCE_SECONDS > 60 + HEARTBEAT_SECONDS, "or a minute's outage would be taken for it"
    run = prefect.deployment_run("pretrain/drawn", overrides=[f"seed={seed}", ENDLESS])
    stage = prefect.wait_for_training()
    engine = prefect.engine_of(stage)
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
    following = prefect.deployment_run("pretrain/drawn", overrides=[f"seed={seed + 1000}"])
    assert prefect.wait_for_state(following, "Completed", "Failed").state_name == "Completed"
    assert prefect.task_states(run)["pretrain"] == "Crashed"
    facts = prefect.run_json(seed)
    assert facts["state"] == "crashed"
    assert f"{facts['last_checkpoint']}" in str(prefect.how_to_resume(run).data)


def test_a_run_that_died_together_with_the_server_is_crashed_once_that_is_back(
    prefect: "Prefect", seed: int
) -> None:
    run = prefect.deployment_run("pretrain/drawn", overrides=[f"seed={seed}", ENDLESS])
    stage = prefect.wait_for_training()
    engine = prefect.engine_of(stage)
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
