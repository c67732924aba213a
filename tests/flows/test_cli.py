import json
import logging
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from flows import terminal_run
from flows.cli import main
from training import attempts, stage_files, store
from training.configure import build_settings
from training.lock import locked
from training.settings import ConfigError, Settings
from training.stages import STAGES, plan
from training.store import StageResult

ROTVIT = [sys.executable, "-m", "flows.cli"]

STAGE_COMMANDS = [
    *("download", "prepare-data", "pretrain", "features", "linear-probe", "frozen-tokens"),
    *("finetune-1", "finetune-2", "finetune-all", "from-scratch", "feature-analysis"),
    *("label-efficiency", "report"),
]


class FlowStub:
    """Stands where the flow is started; keeps what it was given."""

    def __init__(self) -> None:
        self.calls: list[tuple[Settings, Path, str | None, list[str]]] = []
        self.act: Callable[[], None] = lambda: None

    def __call__(
        self, settings: Settings, outputs: Path, until: str | None, refresh: list[str]
    ) -> dict[str, Any]:
        self.calls.append((settings, outputs, until, list(refresh)))
        self.act()
        stage = {"directory": "/x", "status": "computed", "wall_seconds": 2.0}
        return {"run": "the-run", "stages": {"pretrain": {**stage, "rotation_accuracy": 0.875}}}


@pytest.fixture
def flow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FlowStub:
    stub = FlowStub()
    monkeypatch.setattr(terminal_run, "start_flow", stub)
    monkeypatch.chdir(tmp_path)
    return stub


Capture = pytest.CaptureFixture[str]


def test_help_is_there_within_half_a_second() -> None:
    spent = []
    for _ in range(3):
        began = os.times()
        subprocess.run([*ROTVIT, "--help"], check=True, capture_output=True)
        ended = os.times()
        # Processor time, which a busy machine does not stretch.
        spent.append(
            ended.children_user
            + ended.children_system
            - began.children_user
            - began.children_system
        )
    assert min(spent) < 0.5


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from flows.cli import main; main(['--help']); "
        "print([name for name in ('torch', 'prefect', 'transformers', 'datasets', 'matplotlib', "
        "'pydantic', 'rich') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "[]"


def test_help_lists_every_command(capsys: Capture) -> None:
    assert main([]) == 0
    without = capsys.readouterr().out
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == without
    commands = re.findall(r"^  ([a-z][a-z0-9-]+)  ", without, flags=re.MULTILINE)
    own = ["predict", "upright", "export", "publish"]
    others = ["status", "presets", "config", "canary", "push-shards"]
    assert commands == ["run", *STAGE_COMMANDS, *others, *own]


@pytest.mark.parametrize(
    "command", ["run", *STAGE_COMMANDS, "status", "canary", "push-shards", "config"]
)
def test_every_command_has_help_and_the_common_options(command: str, capsys: Capture) -> None:
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    options = {"--preset", "--config", "--set", "--seed", "--seeds"}
    if command != "config":
        options |= {"--outputs"}
    assert options <= set(re.findall(r"--[a-z]+", text))
    assert ("--until" in text) == ("--refresh" in text) == (command == "run")


def test_version_is_printed(capsys: Capture) -> None:
    assert main(["--version"]) == 0
    assert re.fullmatch(r"rotvit \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["stauts"], "No such command 'stauts'. Did you mean 'status'? `rotvit --help` shows"),
        (["xyzzy"], "No such command 'xyzzy'."),
        (["run", "--outptus", "x"], "No such option: --outptus. Did you mean --outputs?"),
        (["pretrain", "--sed", "3"], "No such option: --sed. Did you mean --seed?"),
        (["pretrain", "--until", "report"], "option: --until. `rotvit pretrain --help` shows"),
        (["run", "--seed", "three"], "'--seed'"),
        (["run", "--seed"], "'--seed' requires an argument"),
        (["run", "--seeds", "0"], "evaluation.seeds must be greater than or equal to 1, got 0"),
        (["run", "report"], "report"),
        (["run", "--set", "pretrain.epochs"], "--set takes path.to.setting=value"),
        (["run", "--set", "pretrain.epoch=3"], "Did you mean pretrain.epochs?"),
        (["status", "--preset", "imagnet"], "Did you mean imagenet?"),
        (["config", "--config", "none.yaml"], "none.yaml"),
        (["run", "--until", "pretrian"], "A stage must be one of download, "),
        (["run", "--refresh", "pretrian"], "A stage must be one of download, "),
        (
            ["run", "--until", "pretrain", "--refresh", "report"],
            "What to refresh must be among the stages that run: prepare-data, pretrain; "
            "got 'report'.",
        ),
        (["run", "--set", "data.source=folder:/no/such"], "/no/such"),
        (["status", "--set", "data.source=drawn11"], "Did you mean drawn10?"),
        (["run", "--outputs", "/dev/null/x"], "/dev/null/x"),
        (["run", "--set", "pretrain.batch_size=99999"], "pretrain.batch_size must be at most"),
    ],
)
def test_a_mistake_costs_one_line_and_starts_nothing(
    arguments: list[str], words: str, flow: FlowStub, capsys: Capture
) -> None:
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert words in said.err
    assert flow.calls == []


def test_a_mistake_gives_no_traceback_from_a_shell(tmp_path: Path) -> None:
    found = subprocess.run(
        [*ROTVIT, "run", "--set", "model.image_size=33"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert found.returncode == 2
    assert found.stdout == ""
    assert found.stderr == (
        "model.image_size must be a multiple of model.patch_size, got 33 and 8. "
        "Try model.image_size=32.\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_run_hands_its_options_to_the_flow(flow: FlowStub, tmp_path: Path) -> None:
    arguments = ["run", "--preset", "drawn", "--set", "pretrain.epochs=3", "--set", "model.depth=2"]
    arguments += ["--seed", "7", "--outputs", "some/where", "--until", "finetune-2"]
    arguments += ["--refresh", "linear-probe", "--refresh", "pretrain"]
    assert main(arguments) == 0
    settings = build_settings(overrides=["pretrain.epochs=3", "model.depth=2", "seed=7"])
    outputs = (tmp_path / "some" / "where").resolve()
    assert flow.calls == [(settings, outputs, "finetune-2", ["linear_probe", "pretrain"])]


@pytest.mark.parametrize("command", ["run", "finetune-2"])
def test_seeds_is_short_for_the_setting(command: str, flow: FlowStub) -> None:
    assert main([command, "--seeds", "5", "--set", "evaluation.pretraining=own"]) == 0
    assert main([command, "--set", "evaluation.seeds=5", "--seeds", "3"]) == 0
    (first, second) = (settings.evaluation for settings, *_ in flow.calls)
    assert (first.seeds, first.pretraining, second.seeds) == (5, "own", 3)


def test_without_options_the_default_preset_runs_to_the_end(flow: FlowStub, tmp_path: Path) -> None:
    assert main(["run"]) == 0
    assert flow.calls == [(Settings(), (tmp_path / "outputs").resolve(), None, [])]


@pytest.mark.parametrize("command", STAGE_COMMANDS)
def test_a_stages_command_runs_until_that_stage(command: str, flow: FlowStub) -> None:
    # Or what frozen blocks make of the images would be of no use.
    still = ("--set", "finetune.flip=false", "--set", "data.crop_margin=0")
    assert main([command, "--seed", "3", *still]) == 0
    ((settings, _, until, refresh),) = flow.calls
    assert settings.seed == 3
    assert plan(settings, until)[-1].name == command.replace("-", "_")
    assert refresh == []


def test_a_run_ends_with_a_table_and_what_to_open(
    flow: FlowStub, capsys: Capture, tmp_path: Path
) -> None:
    assert main(["run"]) == 0
    said = capsys.readouterr()
    assert "rotation accuracy 0.88" in said.out or "rotation accuracy 0.87" in said.out
    assert str(tmp_path / "outputs" / "runs" / "the-run" / "results.json") in said.out
    assert said.err == ""


def test_log_lines_of_a_run_are_shown_and_kept_out_of_standard_output(
    flow: FlowStub, capsys: Capture
) -> None:
    flow.act = lambda: logging.getLogger("training.loop").info("epoch 1 of 3")
    assert main(["run"]) == 0
    said = capsys.readouterr()
    assert said.err.endswith(" epoch 1 of 3\n")
    assert "epoch" not in said.out


def raising(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


def test_ctrl_c_says_that_the_same_command_resumes(flow: FlowStub, capsys: Capture) -> None:
    flow.act = raising(KeyboardInterrupt())
    assert main(["run"]) == 130
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "Stopped. The same command resumes.\n"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_to_end_is_obeyed_in_order(
    number: signal.Signals, status: int, flow: FlowStub, capsys: Capture
) -> None:
    before = signal.signal(number, signal.SIG_DFL)  # the tests may run under nohup
    try:
        flow.act = lambda: signal.raise_signal(number)
        assert main(["run"]) == status
        assert capsys.readouterr().err == "Stopped. The same command resumes.\n"
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_under_nohup_a_closed_terminal_does_not_end_the_run(flow: FlowStub) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        flow.act = lambda: signal.raise_signal(signal.SIGHUP)
        assert main(["run"]) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_failure_says_why_where_the_log_is_and_what_to_do(
    flow: FlowStub, capsys: Capture, tmp_path: Path
) -> None:
    flow.act = raising(RuntimeError("CUDA out of memory.\nTried to allocate 7 GiB"))
    assert main(["run"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert re.fullmatch(
        r"The run failed: RuntimeError: CUDA out of memory\. Tried to allocate 7 GiB\. "
        rf"Log: {tmp_path}/outputs/runs/drawn-seed0-[0-9a-f]{{8}}/log\.txt\. "
        r"The same command resumes\.\n",
        said.err,
    )


def test_a_users_mistake_that_shows_late_is_still_a_users_mistake(
    flow: FlowStub, capsys: Capture
) -> None:
    flow.act = raising(ConfigError("transfer.labels must be at most 20,\ngot 30."))
    assert main(["run"]) == 2
    assert capsys.readouterr().err == "transfer.labels must be at most 20, got 30.\n"


def test_presets_are_listed_with_what_they_need(capsys: Capture) -> None:
    assert main(["presets"]) == 0
    text = capsys.readouterr().out
    for name in ("drawn", "imagenette", "photos", "imagenet", "cifar10"):
        assert re.search(rf"^{name} ", text, flags=re.MULTILINE)
    assert "HF_TOKEN" in text


def test_what_config_prints_is_what_config_accepts(capsys: Capture, tmp_path: Path) -> None:
    options = ["--set", "transfer.labels=none", "--seed", "5"]
    assert main(["config", "--preset", "cifar10", "--outputs", "elsewhere", *options]) == 0
    path = tmp_path / "my.yaml"
    path.write_text(capsys.readouterr().out)
    assert main(["config", "--config", str(path)]) == 0
    assert capsys.readouterr().out == path.read_text()
    assert build_settings(config=path) == build_settings("cifar10", overrides=options[1:2], seed=5)


def status_rows(capsys: Capture, *options: str) -> dict[str, str]:
    """What `rotvit status` says, by stage; without the key, which only what is there has."""
    assert main(["status", *options]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    return {stage: re.sub(r" [0-9a-f]{16}$", "", " ".join(rest)) for stage, *rest in lines}


def write_result(
    stage: str, settings: Settings, outputs: Path, results: dict[str, StageResult], **scores: Any
) -> Path:
    """Make a stage cached: write a result that verifies."""
    request = store.make_request(STAGES[stage], settings, outputs, results)
    request.directory.mkdir(parents=True)
    (request.directory / "made.txt").write_text("by this stage")
    result = StageResult(
        stage=stage,
        key=request.key,
        directory=request.directory,
        status="computed",
        wall_seconds=1,
        digest=f"digest of {stage}",
        scores=scores,
        inputs={role: item.digest for role, item in request.inputs.items()},
        files=stage_files.record_files(request.directory, ["made.txt"]),
    )
    (request.directory / "result.json").write_text(result.model_dump_json())
    store.write_config(request)
    results[stage] = result
    return request.directory


def test_status_of_nothing_is_missing_all_the_way(capsys: Capture, tmp_path: Path) -> None:
    rows = status_rows(capsys, "--outputs", str(tmp_path))
    # drawn10 is here, its images are flipped, and all need not be fine-tuned.
    unused = ("download", "frozen-tokens", "finetune-all")
    assert list(rows) == [name for name in STAGE_COMMANDS if name not in unused]
    assert rows["prepare-data"] == "missing not computed yet"
    assert rows["pretrain"] == "missing needs prepare-data"
    assert rows["linear-probe"] == "missing needs pretrain"
    assert rows["report"] == "missing needs prepare-data"
    assert list(tmp_path.iterdir()) == []


def test_status_tells_cached_partial_and_missing_apart(capsys: Capture, tmp_path: Path) -> None:
    settings, results = Settings(), dict[str, StageResult]()
    options = ("--outputs", str(tmp_path))
    write_result("prepare_data", settings, tmp_path, results, counts={"train": 11, "test": 7})
    request = store.make_request(STAGES["pretrain"], settings, tmp_path, results)
    pretrain = request.directory
    with locked(attempts.lock_path(request), what="pretrain"):
        running = f"missing process {os.getpid()} computes it"
        assert status_rows(capsys, *options)["pretrain"] == running
    (pretrain / "checkpoints" / "step-00000123").mkdir(parents=True)
    rows = status_rows(capsys, *options)
    assert rows["prepare-data"] == "cached 11 train, 7 test images"
    assert rows["pretrain"] == "partial at step 123 resumes there"
    with locked(attempts.lock_path(request), what="pretrain"):
        running = f"partial at step 123 process {os.getpid()} computes it"
        assert status_rows(capsys, *options)["pretrain"] == running
    assert rows["from-scratch"] == "missing not computed yet"
    assert rows["linear-probe"] == "missing needs pretrain"

    (pretrain / "checkpoints" / "step-00000123").rmdir()
    (pretrain / "checkpoints").rmdir()
    pretrain.rmdir()
    made = write_result("pretrain", settings, tmp_path, results, rotation_accuracy=0.75)
    assert status_rows(capsys, *options)["pretrain"] == "cached rotation accuracy 0.75"
    assert status_rows(capsys, *options, "--seed", "4")["pretrain"] == (
        "missing because seed changed from 0 to 4"
    )
    (made / "made.txt").write_text("something else!")
    row = status_rows(capsys, *options)["pretrain"]
    assert row.startswith("missing made.txt has 15 bytes instead of 13")
    assert main(["status", *options]) == 0
    assert f" {made.name}\n" in capsys.readouterr().out, "whoever looks for its files finds them"


def test_status_names_the_preparation_of_labelled_images_only_where_it_is_another(
    capsys: Capture, tmp_path: Path, tiny_values: dict[str, Any]
) -> None:
    other = tmp_path / "photos" / "train" / "cat"
    other.mkdir(parents=True)
    folder = Path(tiny_values["data"]["source"].removeprefix("folder:"))
    for path in sorted(folder.glob("train/*/*.png"))[:9]:
        (other / f"{path.parent.name}-{path.name}").write_bytes(path.read_bytes())
    options = ["--outputs", str(tmp_path / "out"), "--set", f"data.source=folder:{folder}"]
    assert "prepare-transfer-data" not in status_rows(capsys, *options)
    apart = status_rows(capsys, *options, "--set", f"transfer.source=folder:{other.parents[1]}")
    assert apart["prepare-transfer-data"] == "missing not computed yet"
    same = status_rows(capsys, *options, "--set", f"transfer.source=folder:{folder}/.")
    assert "prepare-transfer-data" not in same


SCRIPT = '''
"""rotvit run, with another flow: one task that {act}."""
import sys, types

class Flow(types.ModuleType):
    def __getattr__(self, name):
        if name != "rotation_vit":
            raise AttributeError(name)
        # Not before the command line has set Prefect up.
        import json, logging, os, time
        from prefect import flow, task

        @task
        def act():
            logging.getLogger("training.loop").info("the task runs")
            print(json.dumps({{"pid": os.getpid()}}), flush=True)
            {act}

        @flow
        def rotation_vit(settings, outputs, until, refresh):
            act()

        return rotation_vit

sys.modules["flows.rotation_vit"] = Flow("flows.rotation_vit")
from flows.cli import main
sys.exit(main(["run", "--outputs", {outputs!r}]))
'''


@pytest.fixture(scope="module")
def prefect_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home of its own; shared here, since to set up its database takes seconds."""
    return tmp_path_factory.mktemp("prefect")


def alone(prefect_home: Path) -> dict[str, str]:
    """An environment in which Prefect starts a server of its own."""
    inherited = {name: v for name, v in os.environ.items() if not name.startswith("PREFECT_")}
    return {**inherited, "PREFECT_HOME": str(prefect_home)}


def processes_of(prefect_home: Path) -> list[int]:
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # it has ended since, or is another user's
            if f"PREFECT_HOME={prefect_home}".encode() in environment.read_bytes():
                found.append(int(environment.parent.name))
    return found


@pytest.mark.slow
def test_of_a_failing_flow_only_our_lines_reach_the_terminal(
    tmp_path: Path, prefect_home: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(act='raise ValueError("boom")', outputs=str(tmp_path / "out")))
    found = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        env=alone(prefect_home),
        cwd=tmp_path,
        timeout=200,
        check=False,
    )
    assert found.returncode == 1
    lines = [re.sub(r"^\d\d:\d\d:\d\d ", "", line) for line in found.stderr.splitlines()]
    (log,) = (tmp_path / "out" / "runs").glob("*/log.txt")
    assert lines == [
        "Starting Prefect.",
        "the task runs",
        f"The run failed: ValueError: boom. Log: {log}. The same command resumes.",
    ]
    assert list(json.loads(found.stdout)) == ["pid"]
    text = log.read_text()
    assert "Traceback" in text
    assert "INFO training.loop: the task runs" in text
    assert "Finished in state Failed" in text


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks at processes in /proc")
@pytest.mark.parametrize(("how", "status"), [("ctrl-c", 130), ("term", 143)])
def test_a_run_that_is_stopped_ends_soon_and_takes_its_server_along(
    how: str, status: int, tmp_path: Path, prefect_home: Path
) -> None:
    """In a terminal of its own: Ctrl-C goes to every process there, Prefect's server too."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(act="time.sleep(300)", outputs=str(tmp_path / "out")))
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.execve(sys.executable, [sys.executable, str(script)], alone(prefect_home))
    seen = b""
    stopped_at = None
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        if not select.select([terminal], [], [], 1)[0]:
            continue
        try:
            seen += os.read(terminal, 65536)
        except OSError:  # the other end is closed
            break
        if stopped_at is None and b'"pid"' in seen:
            time.sleep(1)
            stopped_at = time.monotonic()
            if how == "ctrl-c":
                os.write(terminal, b"\x03")
            else:
                os.kill(pid, signal.SIGTERM)
    _, code = os.waitpid(pid, 0)
    os.close(terminal)
    assert stopped_at is not None, seen.decode()
    assert time.monotonic() - stopped_at < 30
    assert os.waitstatus_to_exitcode(code) == status
    assert seen.decode().rstrip().endswith("Stopped. The same command resumes.")
    assert b"Traceback" not in seen
    assert processes_of(prefect_home) == []
