"""Runs as users start them, against a real server and worker."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.e2e.marks import END_TO_END, LONG

if TYPE_CHECKING:  # the tests are no package that could be imported from
    from tests.e2e.conftest import Prefect

pytestmark = END_TO_END

STAGES = {
    "prepare_data",
    "pretrain",
    "features",
    "linear_probe",
    "finetune_1",
    "finetune_2",
    "from_scratch",
    "feature_analysis",
    "report",
}


def test_a_deployed_run_tells_its_story_and_the_second_one_is_cached(
    prefect: "Prefect", seed: int
) -> None:
    # Other images than any other test has prepared.
    other_images = [f"seed={seed}", f"data.crop_margin={0.5 + seed / 16}"]
    run = prefect.deployment_run("rotation-vit/drawn", overrides=other_images)
    done = prefect.wait_for_state(run, "Completed", "Failed", "Crashed")
    assert done.state_name == "Completed"
    assert re.fullmatch(rf"drawn · .+ · seed {seed}", done.name)
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

    command = prefect.run_json(seed)["command"]
    assert command == ["prefect", "deployment", "run", "rotation-vit/drawn"]

    again = prefect.deployment_run("rotation-vit/drawn", overrides=other_images)
    assert prefect.wait_for_state(again, "Completed", "Failed").state_name == "Completed"
    assert prefect.task_states(again) == dict.fromkeys(STAGES, "Cached")


def test_two_runs_share_one_pretraining_and_another_seed_waits_for_the_gpu(
    prefect: "Prefect", seed: int
) -> None:
    first = prefect.deployment_run("pretrain/drawn", overrides=[f"seed={seed}", LONG])
    prefect.wait_for_training()
    second = prefect.deployment_run("pretrain/drawn", overrides=[f"seed={seed}", LONG])
    other = prefect.deployment_run("pretrain/drawn", overrides=[f"seed={seed + 1000}"])
    prefect.wait_until(lambda: prefect.task_states(other).get("pretrain") == "Waiting for GPU", 60)
    for run in (first, second, other):
        assert prefect.wait_for_state(run, "Completed", "Failed").state_name == "Completed"
    assert prefect.task_states(first)["pretrain"] == "Completed"
    assert prefect.task_states(second)["pretrain"] == "Cached"
    assert prefect.result_of(seed)["status"] == "computed", "once, without a break"


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


@pytest.mark.parametrize("hangs", [False, True], ids=["refuses", "hangs"])
def test_a_server_that_does_not_answer_is_told_in_one_line(tmp_path: Path, hangs: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        # Waiting callers are taken in by the kernel, and nobody ever reads what they say.
        port = silent.getsockname()[1] if hangs else 9
        started = time.monotonic()
        run = subprocess.run(
            [sys.executable, "-m", "flows.cli", "run", "--outputs", str(tmp_path)],
            env={**os.environ, "PREFECT_API_URL": f"http://127.0.0.1:{port}/api"},
            capture_output=True,
            text=True,
            check=False,
        )
    assert run.returncode == 2
    (line,) = (line for line in run.stderr.splitlines() if "PREFECT_API_URL" in line)
    assert f"http://127.0.0.1:{port}/api" in line
    assert "run without one" in line
    assert time.monotonic() - started < 25  # five are the wait; most of it imports Prefect
