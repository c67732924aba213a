"""What W&B is told, by a real process and wandb itself, to a stand-in for the service."""

import base64
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.training.standin_wandb import StandInWandb, standin_wandb
from training import attempts, store, tracking, wandb_process
from training.configure import validate
from training.metrics_file import METRICS, MetricsFile, read_metrics
from training.runner import StageContext, StageOutcome, run_stage
from training.settings import merge
from training.stages import STAGES, plan
from training.stopping import Stopped, StopRequest
from training.store import StageRequest, StageResult

KEY = "5ec2e7" + "0123456789abcdef" * 2 + "ab"
"""A key that is planted, and looked for."""

HURRIED = """
import sys
from training import tracking
tracking.RETRY_SECONDS, tracking.INIT_SECONDS, tracking.READ_EVERY_SECONDS = 0.5, 2.0, 0.2
tracking.REQUEST_SECONDS = 1.0
sys.exit(tracking.main(*sys.argv[1:4], "14"))
"""
"""The process with a shorter patience."""

ENDS_WITHIN_SECONDS = 60


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pytest.MonkeyPatch]:
    """Nothing of the user's own is read or written, and the process has less patience."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_CONFIG_DIR", str(tmp_path_factory.mktemp("wandb-config")))
        # Wandb collects for 15 s, and waits for 2 s or more before it tries again.
        patch.setenv("WANDB__FILE_STREAM_TRANSMIT_INTERVAL", "1")
        patch.setenv("WANDB__FILE_STREAM_RETRY_WAIT_MIN_SECONDS", "0.3")
        patch.setenv("WANDB__FILE_STREAM_RETRY_WAIT_MAX_SECONDS", "0.5")
        patch.setattr(wandb_process, "COMMAND", (sys.executable, "-c", HURRIED))
        yield patch


@pytest.fixture
def wandb(
    environment: pytest.MonkeyPatch, monkeypatch: pytest.MonkeyPatch
) -> Iterator[StandInWandb]:
    with standin_wandb() as standin:
        monkeypatch.setenv("WANDB_BASE_URL", standin.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        yield standin
        wait_for_tellers()


def tellers() -> list[psutil.Process]:
    """Processes that tell W&B about stages of these tests, and wandb's own."""
    found = psutil.Process().children(recursive=True)
    ours = ("tracking", "wandb-core")
    return [process for process in found if any(name in cmdline(process) for name in ours)]


def cmdline(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def wait_for_tellers() -> None:
    deadline = time.monotonic() + ENDS_WITHIN_SECONDS
    while tellers():
        assert time.monotonic() < deadline, "the process beside the stage does not end"
        time.sleep(0.1)


def request_of(
    stage: str, values: Mapping[str, Any], outputs: Path, results: Mapping[str, StageResult]
) -> StageRequest:
    return store.make_request(STAGES[stage], validate(values), outputs, results, "a-run")


@pytest.fixture
def stage(tmp_path: Path, tiny_values: dict[str, Any]) -> Callable[..., StageRequest]:
    """The request of a pretraining whose images nobody needs."""

    def build(wandb: str = "auto") -> StageRequest:
        data = StageResult(
            stage="prepare_data",
            key="k",
            directory=tmp_path,
            status="computed",
            wall_seconds=1,
            digest="d",
            scores={},
        )
        values = merge(tiny_values, {"tracking": {"wandb": wandb}})
        return request_of("pretrain", values, tmp_path / "outputs", {"prepare_data": data})

    return build


def trains(*steps: int, resumed_at: int | None = None) -> Callable[[StageContext], StageOutcome]:
    """A stage's computation that takes these steps, each with a loss that tells it."""

    def compute(context: StageContext) -> StageOutcome:
        end = (context.directory / METRICS).stat().st_size if not steps else resumed_at
        with MetricsFile(context.directory, position=end) as metrics:
            for step in steps:
                metrics.log({"train/loss": 1 / step}, step=step, epoch=step / 2)
        (context.directory / "model").mkdir(exist_ok=True)
        (context.directory / "model" / "weights").write_text("w")
        return StageOutcome(scores={"top1": 0.5, "total": 3}, made=["model"])

    return compute


# What the process does between stage and W&B, without either.


class Recorder:
    """A W&B run that takes down what it is told."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, Any]]] = []

    def log(self, row: dict[str, Any], *, step: int, commit: bool) -> None:
        self.rows.append((step, row))


def test_each_step_is_told_once_and_whole() -> None:
    run = Recorder()
    history = tracking._History(run, told=2)  # type: ignore[arg-type]
    for step, name in [(1, "a"), (2, "a"), (3, "a"), (4, "a"), (4, "b"), (5, "a")]:
        history.add({"step": step, name: 0.5, "nan": None})
    both = {"step": 4, "a": 0.5, "b": 0.5}
    assert run.rows == [(3, {"step": 3, "a": 0.5}), (4, both)]
    for step in (3, 4, 5):  # a file that was cut and written again
        history.add({"step": step, "a": 0.5})
    history.flush()
    assert [step for step, _ in run.rows] == [3, 4, 5]


# Modes in which nothing is started.


def test_without_a_key_nothing_is_started(stage: Callable[..., StageRequest]) -> None:
    result = run_stage(stage("auto"), trains(1, 2))
    assert tellers() == []
    assert not (result.directory / "wandb").exists()


def test_disabled_starts_nothing_with_a_key(
    wandb: StandInWandb, stage: Callable[..., StageRequest]
) -> None:
    run_stage(stage("disabled"), trains(1, 2))
    assert tellers() == []
    assert wandb.requests == 0


# W&B that fails: the stage neither waits nor fails.


@pytest.mark.parametrize("fault", ["refuse", "hang", "cut", "500"])
def test_a_stage_does_not_wait_for_what_does_not_answer(
    wandb: StandInWandb,
    stage: Callable[..., StageRequest],
    monkeypatch: pytest.MonkeyPatch,
    fault: Any,
) -> None:
    monkeypatch.setattr(wandb_process, "WAIT_SECONDS", 0.2)
    if fault == "refuse":
        monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    else:
        wandb.fault = fault
    began = time.monotonic()
    assert run_stage(stage(), trains(1, 2)).status == "computed"
    assert time.monotonic() - began < 2
    for process in tellers():
        process.kill()
    wait_for_tellers()


@pytest.mark.slow
def test_what_happened_while_it_was_away_is_told_when_it_is_back(
    wandb: StandInWandb, stage: Callable[..., StageRequest]
) -> None:
    """Away at the start, there, away in the middle, and there again."""

    def compute(context: StageContext) -> StageOutcome:
        with MetricsFile(context.directory, position=None) as metrics:
            for step in range(1, 5):
                metrics.log({"train/loss": 1 / step}, step=step, epoch=step / 2)
                if step == 1:
                    wait_until(lambda: wandb.requests > 0)
                    wandb.fault = ""
                if step == 2:
                    wait_until(lambda: bool(wandb.runs))
                    wandb.fault = "500"
                if step == 3:
                    wait_for_another_request(wandb)
                    wandb.fault = ""
        return StageOutcome(scores={"top1": 0.5})

    wandb.fault = "hang"
    run_stage(stage(), compute)
    wait_for_tellers()
    run = wandb.run_of("pretrain")
    assert run.steps == [1, 2, 3, 4]
    assert run.summary["top1"] == 0.5
    assert run.exit_code == 0


@pytest.mark.slow
@pytest.mark.parametrize("comes_late", [False, True])
def test_what_it_did_not_take_until_the_end_can_be_told_later(
    wandb: StandInWandb,
    stage: Callable[..., StageRequest],
    caplog: pytest.LogCaptureFixture,
    comes_late: bool,
) -> None:
    """Away from the middle, or from the start, to the end."""
    caplog.set_level("INFO")

    def compute(context: StageContext) -> StageOutcome:
        with MetricsFile(context.directory, position=None) as metrics:
            metrics.log({"train/loss": 1.0}, step=1, epoch=0.5)
            metrics.log({"train/loss": 0.5}, step=2, epoch=1.0)
            if not comes_late:
                wait_until(lambda: bool(wandb.runs) and wandb.run_of("pretrain").steps == [1])
            wandb.fault = "500"
            metrics.log({"train/loss": 0.25}, step=3, epoch=1.5)
        return trains()(context)

    wandb.fault = "500" if comes_late else ""
    directory = run_stage(stage(), compute).directory
    wait_for_tellers()
    assert "does not know all about" in caplog.text
    wandb.fault = ""
    assert wandb_process.main([str(directory)]) == 0
    run = wandb.run_of("pretrain")
    assert run.steps == [1, 2, 3]
    assert run.summary["top1"] == 0.5
    assert run.exit_code == 0
    assert [item.is_committed for item in wandb.artifacts.values()] == [True]
    assert KEY not in caplog.text


def test_a_stage_that_is_not_done_is_not_told_later(
    stage: Callable[..., StageRequest], caplog: pytest.LogCaptureFixture
) -> None:
    request = stage()
    attempts.begin(request)
    assert wandb_process.main([str(request.directory)]) == 2
    assert "must be done" in caplog.text


@pytest.mark.slow
def test_a_stage_whose_process_was_killed_is_told_by_the_next_one(
    wandb: StandInWandb, stage: Callable[..., StageRequest]
) -> None:
    """The process beside it hears it by the end of its pipe, and sends what there is."""
    request = stage()
    attempts.begin(request)
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from training import store; from training.wandb_process import Tracking\n"
        "from training.metrics_file import MetricsFile\n"
        "request = store.read_config(Path(sys.argv[1]))\n"
        "with Tracking(request), MetricsFile(request.directory, position=None) as metrics:\n"
        "    for step in (1, 2, 3): metrics.log({'train/loss': 1.0}, step=step, epoch=1.0)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(request.directory)]).returncode == -9
    position = len((request.directory / "metrics.jsonl").read_bytes().splitlines(True)[0])
    # Straight away: the first process may still be at it.
    run_stage(request, trains(2, 3, 4, resumed_at=position))
    wait_for_tellers()
    run = wandb.run_of("pretrain")
    time.sleep(3)  # the first one is nobody's child any more, and may come second
    assert run.steps == [1, 2, 3, 4]
    assert run.openings in {1, 2}
    assert run.exit_code == 0, "the later attempt says how it ended"


# Offline.


@pytest.mark.slow
def test_offline_and_resumed_is_one_run_after_a_sync(
    wandb: StandInWandb, stage: Callable[..., StageRequest]
) -> None:
    request = stage("offline")

    def stops(context: StageContext) -> StageOutcome:
        trains(1, 2, 3, 4)(context)
        raise Stopped(4, saved_step=2)

    with pytest.raises(Stopped):
        run_stage(request, stops)
    wait_for_tellers()
    lines = (request.directory / "metrics.jsonl").read_bytes().splitlines(True)
    run_stage(request, trains(3, 4, 5, 6, resumed_at=len(lines[0] + lines[1])))
    wait_for_tellers()
    assert wandb.requests == 0
    assert len(list(request.directory.glob("wandb/offline-run-*"))) == 2
    sync(request.directory / "wandb")
    run = wandb.run_of("pretrain")
    assert run.steps == [1, 2, 3, 4, 5, 6]
    assert run.exit_code == 0
    assert [(item.type, item.is_committed) for item in wandb.artifacts.values()] == [
        ("model", True)
    ]


def sync(directory: Path) -> None:
    command = [sys.executable, "-m", "wandb", "sync", str(directory)]
    # It writes logs into the current directory.
    subprocess.run(
        command, check=True, capture_output=True, stdin=subprocess.DEVNULL, cwd=directory.parent
    )


# A whole pipeline.


@pytest.fixture(scope="module")
def pipeline(
    environment: pytest.MonkeyPatch,
    tiny_run: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
    stop_after: Callable[[int], StopRequest],
) -> Iterator[tuple[StandInWandb, dict[str, StageResult]]]:
    """All stages with W&B online, the pretraining stopped and resumed; then all of it cached."""
    values = merge(tiny_run, {"tracking": {"wandb": "online", "wandb_entity": "a-team"}})
    outputs = tmp_path_factory.mktemp("outputs")
    results: dict[str, StageResult] = {}
    with standin_wandb() as standin:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("WANDB_BASE_URL", standin.url)
            patch.setenv("WANDB_API_KEY", KEY)
            for stage in plan(validate(values)):
                request = request_of(stage.name, values, outputs, results)
                module = import_module(f"training.{stage.module or stage.name}")
                if stage.name == "pretrain":
                    with pytest.raises(Stopped):
                        run_stage(request, module.compute, stop_after(8))
                results[stage.name] = run_stage(request, module.compute)
            wait_for_tellers()
        yield standin, results


def wait_for_another_request(wandb: StandInWandb) -> None:
    before = wandb.requests
    wait_until(lambda: wandb.requests > before)


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + ENDS_WITHIN_SECONDS
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


Pipeline = tuple[StandInWandb, dict[str, StageResult]]


@pytest.mark.slow
def test_every_stage_with_scores_is_a_run_of_one_group(pipeline: Pipeline) -> None:
    standin, results = pipeline
    assert standin.unknown == set()
    told = {run.facts["displayName"]: run for run in standin.runs.values()}
    assert set(told) == {name for name in results if not name.startswith(("prepare", "features"))}
    assert {run.facts["groupName"] for run in told.values()} == {"a-run"}
    assert {run.entity for run in told.values()} == {"a-team"}
    assert {name for name, run in told.items() if run.project == "vit-feature-analysis"} == {
        "feature_analysis"
    }
    assert {run.exit_code for run in told.values()} == {0}
    for name, run in told.items():
        plain = {k: v for k, v in results[name].scores.items() if isinstance(v, int | float | str)}
        assert plain.items() <= run.summary.items()
        assert run.config["seed"]["value"] == 0
    probe = results["linear_probe"].scores["readings"]
    told_of_probe = told["linear_probe"].summary
    assert {
        f"readings/{row['name']}": row["top1"] for row in probe
    }.items() <= told_of_probe.items()


@pytest.mark.slow
def test_a_resumed_stage_goes_on_in_its_run_without_a_doubled_step(pipeline: Pipeline) -> None:
    standin, results = pipeline
    run = standin.run_of("pretrain")
    assert run.openings == 2
    merged: dict[int, dict[str, Any]] = {}
    for row in read_metrics(results["pretrain"].directory):
        merged.setdefault(row["step"], {}).update(row)
    assert run.steps == list(merged) == list(range(1, 19))
    for row in run.history:
        expected = merged[row["_step"]]
        assert {name: row[name] for name in expected} == pytest.approx(expected)


@pytest.mark.slow
def test_layers_are_rows_with_the_layer_as_step(pipeline: Pipeline) -> None:
    standin, results = pipeline
    layers = results["feature_analysis"].scores["layers"]
    rows = standin.run_of("feature_analysis").history
    assert [row["_step"] for row in rows] == [row["layer"] for row in layers] == [0, 1, 2]
    for row, layer in zip(rows, layers, strict=True):
        assert row["top1"] == pytest.approx(layer["top1"])
        assert row["random_knn_top1"] == pytest.approx(layer["random_knn_top1"])
        assert row["knn"] == pytest.approx(layer["knn"])
        assert row["effective_rank"] == pytest.approx(layer["effective_rank"])


@pytest.mark.slow
def test_points_of_a_curve_are_rows_with_the_labels_as_step(pipeline: Pipeline) -> None:
    standin, results = pipeline
    points = results["label_efficiency"].scores["points"]
    rows = standin.run_of("label_efficiency").history
    assert [row["_step"] for row in rows] == [row["labels"] for row in points] == [3, 5, 27, 54]
    assert [row["top1"] for row in rows] == pytest.approx([row["top1"] for row in points])


@pytest.mark.slow
def test_models_and_the_report_are_artifacts(pipeline: Pipeline) -> None:
    standin, results = pipeline
    models = {"pretrain", "linear_probe", "finetune_1", "finetune_2", "from_scratch"}
    found = {item.name: item for item in standin.artifacts.values()}
    assert {name: item.type for name, item in found.items()} == {
        **dict.fromkeys(models, "model"),
        "report": "report",
    }
    for name, item in found.items():
        assert item.is_committed
        assert set(item.manifest["contents"]) == set(results[name].files)
        assert set(item.aliases) == {"latest", results[name].key}
    page = (results["report"].directory / "index.html").read_bytes()
    assert page in standin.uploads.values()


@pytest.mark.slow
def test_a_cached_stage_makes_no_run(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    standin, results = pipeline
    before = standin.requests
    request = store.read_config(results["pretrain"].directory)
    assert list(request.directory.glob("wandb/run-*"))
    (request.directory / "wandb" / "run.json").write_text("changed")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", standin.url)
    assert run_stage(request, trains()).status == "cached", "no file of wandb's is part of it"
    assert tellers() == []
    assert standin.requests == before


@pytest.mark.slow
def test_the_key_is_in_no_file(
    pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory
) -> None:
    standin, _ = pipeline
    assert standin.keys == {KEY}, "it was used"
    hidden = [KEY.encode(), base64.b64encode(f"api:{KEY}".encode())]
    files = [path for path in tmp_path_factory.getbasetemp().rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert any(path.name == "debug-internal.log" for path in files)
    assert [path for path in files if any(text in path.read_bytes() for text in hidden)] == []
