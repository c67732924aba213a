"""What happens by itself when a process of a run is killed or cancelled, and what a user types."""

import shlex
import sys
import time
from typing import TYPE_CHECKING

from flows.service import AUTO_RESUME
from tests.e2e.marks import END_TO_END, LONG

if TYPE_CHECKING:  # the tests are no package that could be imported from
    from tests.e2e.conftest import Prefect

pytestmark = END_TO_END


def test_a_killed_stage_is_retried_by_the_task_and_resumes(prefect: "Prefect", seed: int) -> None:
    run = prefect.deployment_run("pretrain/drawn", overrides=[f"seed={seed}", LONG])
    prefect.wait_for_training(after=30).kill()
    prefect.wait_until(
        lambda: "Resumed from step" in prefect.task_states(run).get("pretrain", ""), 60
    )
    assert prefect.wait_for_state(run, "Completed", "Failed").state_name == "Completed"
    assert prefect.result_of(seed)["status"] == "resumed"


def test_a_killed_flow_run_is_crashed_resumed_by_itself_and_its_orphans_are_closed(
    prefect: "Prefect", seed: int
) -> None:
    run = prefect.deployment_run(
        "pretrain/drawn", overrides=[f"seed={seed}", LONG], tags=[AUTO_RESUME]
    )
    stage = prefect.wait_for_training(after=30)
    killed = time.monotonic()
    prefect.engine_of(stage).kill()
    prefect.wait_until(lambda: prefect.flow_run(run).run_count > 1, 120)
    assert time.monotonic() - killed < 120
    stage.wait(30)
    assert prefect.wait_for_state(run, "Completed", "Failed").state_name == "Completed"
    assert prefect.flow_run(run).run_count == 2, "though the worker reports some deaths twice"
    trainings = [task for task in prefect.task_runs(run) if task.name == "pretrain"]
    oldest, *later = sorted(trainings, key=lambda task: task.created or 0)
    assert oldest.state_name == "Crashed", "the orphan is closed"
    assert "Completed" in {task.state_name for task in later}
    assert prefect.result_of(seed)["status"] == "resumed"


def test_after_a_crash_a_new_run_and_the_command_line_go_on_at_the_same_step(
    prefect: "Prefect", seed: int
) -> None:
    crashed = prefect.deployment_run("pretrain/drawn", overrides=[f"seed={seed}", LONG])
    prefect.engine_of(prefect.wait_for_training(after=30)).kill()
    prefect.wait_for_state(crashed, "Crashed")
    prefect.wait_until(lambda: prefect.stage_process() is None, 30)
    prefect.wait_until(lambda: prefect.saved_step(seed) > 0, 30)
    saved = prefect.saved_step(seed)

    again = prefect.deployment_run("pretrain/drawn", overrides=[f"seed={seed}", LONG])
    prefect.wait_until(lambda: f"pretrain resumes from step {saved}." in prefect.logs(again), 120)
    stage = prefect.wait_for_training(after=30)
    prefect.engine_of(stage).kill()
    prefect.wait_for_state(again, "Crashed")
    prefect.wait_until(lambda: prefect.stage_process() is None, 30)
    # The worker's hook writes it, some seconds after the death.
    prefect.wait_until(lambda: prefect.saved_step(seed) > saved, 30)
    facts, later = prefect.run_json(seed), prefect.saved_step(seed)

    command = shlex.split(facts["resume"])
    assert command[0] == "rotvit"
    typed = prefect.run(sys.executable, "-m", "flows.cli", *command[1:])
    assert typed.returncode == 0, typed.stderr
    assert f"pretrain resumes from step {later}." in typed.stderr
    assert prefect.result_of(seed)["status"] == "resumed"


def test_a_cancelled_run_saves_says_how_to_resume_and_retries_from_there(
    prefect: "Prefect", seed: int
) -> None:
    run = prefect.deployment_run("pretrain/drawn", overrides=[f"seed={seed}", LONG])
    stage = prefect.wait_for_training(after=30)
    assert prefect.prefect("flow-run", "cancel", str(run)).returncode == 0
    stage.wait(30)
    prefect.wait_for_state(run, "Cancelled", seconds=60)
    assert prefect.task_states(run)["pretrain"] in {"Crashed", "Cancelled"}
    facts, saved = prefect.run_json(seed), prefect.saved_step(seed)
    assert facts["state"] == "cancelled"
    assert saved
    assert facts["resume"] in str(prefect.how_to_resume(run).data)

    time.sleep(10)  # for a moment longer the worker ends whatever it started for a cancelled run
    retried = prefect.prefect("flow-run", "retry", str(run))
    assert retried.returncode == 0, retried.stderr
    assert prefect.wait_for_state(run, "Completed", "Failed").state_name == "Completed"
    assert f"pretrain resumes from step {saved}." in prefect.logs(run)
    assert prefect.result_of(seed)["status"] == "resumed"
