"""A real server and a real worker on loopback, set up and deployed as `make ui` does it."""

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
import pytest
from prefect import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    LogFilter,
    LogFilterFlowRunId,
)
from prefect.client.schemas.objects import Artifact, FlowRun, StateType, TaskRun
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelled

from flows import service
from tasks.gpu_slot import SLOT

ROOT = Path(__file__).parents[2]


class Prefect:
    """Server and worker as processes that can be killed, and questions to the server's API."""

    def __init__(self, home: Path, outputs: Path, values: dict[str, Any]) -> None:
        self.home, self.outputs, self.values = home, outputs, values
        with socket.socket() as probe:
            probe.bind((service.HOST, 0))
            self.port: int = probe.getsockname()[1]
        self.environment = {
            **service.environment(home, self.port),
            "PREFECT_WORKER_QUERY_SECONDS": "1",
        }
        self.url = self.environment["PREFECT_API_URL"]
        self.server: subprocess.Popen[bytes] | None = None
        self.worker: subprocess.Popen[bytes] | None = None

    def start_server(self) -> None:
        arguments = ["server", "start", "--host", service.HOST, "--port", str(self.port)]
        self.server = self._start(*arguments)
        self.wait_until(self._answers, 120)

    def start_worker(self) -> None:
        self.worker = self._start("worker", "start", "--pool", service.POOL)

    def _start(self, *arguments: str) -> subprocess.Popen[bytes]:
        with (self.home / f"{arguments[0]}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "prefect", *arguments],
                cwd=ROOT,
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2):
                return True
        except OSError:
            return False

    def prefect(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run Prefect's command line against the server."""
        return self.run(sys.executable, "-m", "prefect", "--no-prompt", *arguments)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=ROOT,
            env={**self.environment, "COLUMNS": "400"},
            capture_output=True,
            text=True,
            check=False,
        )

    def deployment_run(
        self,
        name: str,
        *,
        overrides: Sequence[str] = (),
        tags: Sequence[str] = (),
        variables: Mapping[str, Any] | None = None,
    ) -> UUID:
        """Type `prefect deployment run NAME` with the settings of a tiny run."""
        parameters = {
            "settings": self.values,
            "overrides": list(overrides),
            "outputs": str(self.outputs),
        }
        options = [option for tag in tags for option in ("--tag", tag)]
        for variable, value in (variables or {}).items():
            options += ["--job-variable", f"{variable}={json.dumps(value)}"]
        done = self.prefect("deployment", "run", name, "--params", json.dumps(parameters), *options)
        found = re.search(r"UUID: ([0-9a-f-]{36})", done.stdout)
        assert found, done.stdout + done.stderr
        return UUID(found[1])

    def flow_run(self, run: UUID) -> FlowRun:
        with self._client() as client:
            found: FlowRun = client.read_flow_run(run)
        return found

    def task_runs(self, run: UUID) -> list[TaskRun]:
        with self._client() as client:
            found: list[TaskRun] = client.read_task_runs(
                flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run]))
            )
        return found

    def task_states(self, run: UUID) -> dict[str, str]:
        """State names of the newest task run of each stage."""
        ordered = sorted(self.task_runs(run), key=lambda task: task.created or 0)
        return {task.name: task.state_name or "" for task in ordered}

    def artifacts(self, run: UUID) -> list[Artifact]:
        with self._client() as client:
            found: list[Artifact] = client.read_artifacts(
                artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run]))
            )
        return found

    def how_to_resume(self, run: UUID) -> Artifact:
        (found,) = (item for item in self.artifacts(run) if item.key == "how-to-resume")
        return found

    def gpu_slots_taken(self) -> int:
        """How many trainings hold the GPU slot, as the server counts."""
        with self._client() as client:
            limit = client.read_global_concurrency_limit_by_name(SLOT)
        return int(limit.active_slots)

    def logs(self, run: UUID) -> list[str]:
        """The lines that the UI shows of a flow run, its task runs' included."""
        with self._client() as client:
            lines = client.read_logs(
                LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run])), limit=200
            )
        return [line.message for line in lines]

    @contextmanager
    def _client(self) -> Iterator[Any]:
        with temporary_settings({PREFECT_API_URL: self.url}), get_client(sync_client=True) as made:
            yield made

    def wait_for_state(self, run: UUID, *names: str, seconds: float = 180) -> FlowRun:
        """Wait until a flow run is in a state of one of these names."""
        self.wait_until(lambda: self.flow_run(run).state_name in names, seconds)
        return self.flow_run(run)

    def wait_until(self, happened: Callable[[], Any], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not happened():
            if time.monotonic() > deadline:
                logs = "\n".join(
                    f"{path.name}:\n" + "\n".join(path.read_text().splitlines()[-40:])
                    for path in self.home.glob("*.log")
                )
                raise AssertionError(f"This did not happen within {seconds} s.\n{logs}")
            time.sleep(0.3)

    def stage_process(self, stage: str = "pretrain") -> psutil.Process | None:
        """The process that computes a stage into our outputs, if it runs."""
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if f"training.{stage}" in words and any(str(self.outputs) in word for word in words):
                return process
        return None

    def wait_for_training(self, after: int = 1) -> psutil.Process:
        """Wait until a pretraining has written so many metrics; return its process."""

        def trains() -> bool:
            process = self.stage_process()
            if process is None:
                return False
            directory = Path(process.cmdline()[process.cmdline().index("training.pretrain") + 1])
            metrics = directory / "metrics.jsonl"
            checkpoints = directory / "checkpoints"
            return (
                metrics.is_file()
                and metrics.read_bytes().count(b"\n") >= after
                and any(checkpoints.glob("step-*"))
            )

        self.wait_until(trains, 120)
        process = self.stage_process()
        assert process is not None
        return process

    @staticmethod
    def engine_of(stage: psutil.Process) -> psutil.Process:
        """The flow run's process: it has started the server that the stage is forked from."""
        server = stage.parent()
        assert server is not None
        engine = server.parent()
        assert engine is not None
        return engine

    def engines(self) -> list[psutil.Process]:
        """The processes of flow runs that the worker has started."""
        if self.worker is None:
            return []
        children = psutil.Process(self.worker.pid).children(recursive=True)
        return [child for child in children if "prefect.engine" in _words(child)]

    def run_json(self, seed: int) -> dict[str, Any]:
        """Return the record of the run with that seed."""
        for path in (self.outputs / "runs").glob("*/run.json"):
            facts: dict[str, Any] = json.loads(path.read_bytes())
            if facts["seed"] == seed:
                return facts
        raise AssertionError(f"no run with seed {seed}")

    def saved_step(self, seed: int) -> int:
        """Return the step of the checkpoint that a run's record names; 0 for none."""
        found = re.search(r"step-0*(\d+)", self.run_json(seed).get("last_checkpoint") or "")
        return int(found[1]) if found else 0

    def result_of(self, seed: int) -> dict[str, Any]:
        """Return the result of the pretraining with that seed."""
        for path in self.outputs.glob("pretrain/*/result.json"):
            if f"seed: {seed}\n" in path.with_name("config.yaml").read_text():
                found: dict[str, Any] = json.loads(path.read_bytes())
                return found
        raise AssertionError(f"no pretraining with seed {seed}")

    def clear(self) -> None:
        """End what still runs."""
        unfinished = FlowRunFilterStateType(
            any_=[StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]
        )
        with self._client() as client:
            runs = client.read_flow_runs(
                flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=unfinished))
            )
            for run in runs:
                client.set_flow_run_state(
                    run.id, Cancelled(message="The test is over."), force=True
                )
        for process in self.engines():
            process.kill()
        self.wait_until(lambda: self.stage_process() is None, 60)

    def set_up(self) -> None:
        """Make what the flows need on the server, as `make ui` does at every start."""
        done = self.run(sys.executable, "-m", "flows.service", "--set-up")
        assert done.returncode == 0, done.stderr

    def stop(self) -> None:
        for process in (self.worker, self.server):
            if process is not None and process.poll() is None:
                process.terminate()
        for process in (self.worker, self.server):
            if process is not None:
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()


def _words(process: psutil.Process) -> list[str]:
    try:
        words: list[str] = process.cmdline()
    except psutil.Error:  # it has ended meanwhile
        return []
    return words


_SEEDS = itertools.count(1)


@pytest.fixture
def seed() -> int:
    """A seed that no other test has, nor the same one if it is run again: nothing is cached."""
    return next(_SEEDS)


@pytest.fixture
def prefect(running: Prefect) -> Iterator[Prefect]:
    yield running
    running.clear()  # a test that fails must not leave a training that holds the slot of all others


@pytest.fixture(scope="session")
def running(
    tmp_path_factory: pytest.TempPathFactory, tiny_run: dict[str, Any]
) -> Iterator[Prefect]:
    home = tmp_path_factory.mktemp("prefect")
    values = {
        **tiny_run,
        "checkpoint": {"every_steps": 10},
        "tracking": {"log_every_steps": 2, "wandb": "disabled"},
    }
    started = Prefect(home, tmp_path_factory.mktemp("outputs"), values)
    try:
        started.start_server()
        started.set_up()
        deployed = started.prefect("deploy", "--all")
        assert deployed.returncode == 0, deployed.stdout + deployed.stderr
        started.start_worker()
        yield started
    finally:
        started.stop()
