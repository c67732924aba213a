"""A run whose pod is taken away, as a spot node's are: it saves, and starts again by itself."""

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import psutil

from flows.service import AUTO_RESUME
from tests.e2e.marks import END_TO_END
from training import stage_files
from training.configure import override, validate
from training.settings import Settings
from training.store import StageResult

if TYPE_CHECKING:  # the tests are no package that could be imported from
    from tests.e2e.conftest import Prefect

pytestmark = END_TO_END

TEMPLATE = Path(__file__).parents[2] / "prefect.kubernetes.json"


def in_a_pod() -> str:
    """What the Kubernetes worker runs: as process 1, with whose end all others are killed.

    Where the kernel lets us; else the same without a process namespace of its own.
    """
    command = f"{sys.executable} -m prefect flow-run execute"
    namespace = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    try:
        allowed = subprocess.run([*namespace, "true"], capture_output=True, check=False)
    except OSError:  # there is no such program
        return command
    return command if allowed.returncode else f"{' '.join(namespace)} {command}"


def last_logged_step(directory: Path) -> int:
    line = (directory / "metrics.jsonl").read_text().splitlines()[-1]
    return int(json.loads(line)["step"])


def said(prefect: "Prefect", run: UUID, line: str) -> bool:
    return line in prefect.logs(run)


def test_a_run_whose_pod_is_taken_away_twice_ends_in_the_bytes_of_one_that_was_not(
    prefect: "Prefect",
    seed: int,
    run_stages: Callable[[Settings, Path, str], dict[str, StageResult]],
    tmp_path: Path,
) -> None:
    overrides = [f"seed={seed}", "pretrain.epochs=150"]
    template = json.loads(TEMPLATE.read_text())["variables"]["properties"]
    grace = template["termination_grace_seconds"]["default"]
    run = prefect.deployment_run(
        "pretrain/drawn",
        overrides=overrides,
        tags=[AUTO_RESUME],  # for where the run hears of it before its supervisor has spoken
        variables={"command": in_a_pod(), "env": template["env"]["default"]},
    )
    lines = 0
    for told in ("process 1", "everybody"):
        stage = prefect.wait_for_training(after=lines + 30)
        directory = Path(stage.cmdline()[stage.cmdline().index("training.pretrain") + 1])
        first = prefect.engine_of(stage).parent()
        assert first is not None
        assert "execute" in first.cmdline()
        pod = [first, *first.children(recursive=True)]
        assert stage in pod
        for process in pod if told == "everybody" else [first]:
            process.terminate()
        _, left = psutil.wait_procs(pod, timeout=grace)
        assert left == [], f"{told} was told {grace} s ago"
        saved, logged = stage_files.newest_step(directory), last_logged_step(directory)
        assert saved is not None
        assert 0 <= saved - logged < 2, "every step that was taken is saved; every second is logged"
        lines = (directory / "metrics.jsonl").read_bytes().count(b"\n")
        resumes = f"pretrain resumes from step {saved}."
        prefect.wait_until(partial(said, prefect, run, resumes), 120)
    ended = prefect.wait_for_state(run, "Completed", "Failed")
    assert ended.state_name == "Completed"
    assert ended.run_count == 3

    settings = override(validate(prefect.values), overrides)
    whole = run_stages(settings, tmp_path / "outputs", "pretrain")["pretrain"]
    interrupted: dict[str, Any] = prefect.result_of(seed)
    assert interrupted["status"] == "resumed"
    assert interrupted["key"] == whole.key
    assert interrupted["digest"] == whole.digest, "scores, and the bytes of the weights"
