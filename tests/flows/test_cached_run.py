"""A run that has nothing to compute, from the command line."""

import json
import shutil
import webbrowser
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from flows import cli, terminal_run
from training.configure import to_yaml, validate
from training.settings import Settings
from training.store import StageResult

RunStages = Callable[..., dict[str, StageResult]]


@pytest.fixture(scope="module")
def computed(
    run_stages: RunStages, tiny_run: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Outputs in which all stages have been computed."""
    outputs = tmp_path_factory.mktemp("computed")
    run_stages(validate(deepcopy(tiny_run)), outputs, "report")
    return outputs


@pytest.fixture
def arguments(computed: Path, tiny_settings: Settings, tmp_path: Path) -> list[str]:
    """The command line of a run whose stages have all been computed."""
    shutil.copytree(computed, tmp_path / "outputs")
    (tmp_path / "tiny.yaml").write_text(to_yaml(tiny_settings))
    return ["run", "--config", str(tmp_path / "tiny.yaml"), "--outputs", str(tmp_path / "outputs")]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Calls of the function that starts Prefect; they end there."""
    calls: list[Any] = []

    def start_flow(*given: Any) -> dict[str, Any]:
        calls.append(given)
        raise KeyboardInterrupt

    monkeypatch.setattr(terminal_run, "start_flow", start_flow)
    return calls


def test_it_starts_no_server_and_is_recorded(
    arguments: list[str],
    started: list[Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(arguments) == 0
    assert started == []
    (run,) = (tmp_path / "outputs" / "runs").iterdir()
    stages = json.loads((run / "results.json").read_bytes())["stages"]
    assert {stage["status"] for stage in stages.values()} == {"cached"}
    assert len(stages) == 10
    facts = json.loads((run / "run.json").read_bytes())
    assert facts["state"] == "finished"
    assert set(facts["directories"]) == set(stages), "as after a run that computes"
    assert (run / "report" / "index.html").is_file()
    assert capsys.readouterr().out.count("cached") == 10


def test_a_server_of_the_users_own_sees_it(
    arguments: list[str],
    started: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    cli.main(arguments)
    assert len(started) == 1
    monkeypatch.delenv("PREFECT_API_URL")
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    (tmp_path / "profiles.toml").write_text('[profiles.p]\nPREFECT_API_URL = "http://x/api"\n')
    cli.main(arguments)
    assert len(started) == 2


def test_one_stage_that_is_not_cached_is_enough_to_start(
    arguments: list[str], started: list[Any], tmp_path: Path
) -> None:
    (result,) = (tmp_path / "outputs" / "finetune_1").glob("*/result.json")
    result.unlink()
    assert cli.main(arguments) == cli.EXIT_INTERRUPTED
    assert len(started) == 1


def test_a_stage_that_is_to_be_refreshed_is_computed(
    arguments: list[str], started: list[Any]
) -> None:
    cli.main([*arguments, "--refresh", "linear-probe"])
    assert len(started) == 1


def test_the_report_is_opened_in_the_users_browser(
    arguments: list[str], started: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole run's page, then the same from what there is, in a browser that takes notes."""
    opened = tmp_path / "opened"
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" >> {opened}\n')
    browser.chmod(0o755)
    monkeypatch.setattr(webbrowser, "_tryorder", None)  # which it found before
    monkeypatch.setenv("BROWSER", str(browser))
    options = arguments[1:]
    assert cli.main(["report", *options, "--open"]) == 0
    assert cli.main(["report", *options, "--open", "--so-far"]) == 0
    (run,) = (tmp_path / "outputs" / "runs").iterdir()
    page = run / "report" / "index.html"
    assert opened.read_text().splitlines() == [page.as_uri()] * 2
    assert started == []


def test_a_run_without_a_browser_names_the_page(
    arguments: list[str],
    started: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(webbrowser, "_tryorder", [])
    (tmp_path / "outputs" / "finetune_2").rename(tmp_path / "elsewhere")
    assert cli.main(["report", *arguments[1:], "--open", "--so-far"]) == 0
    shown = capsys.readouterr()
    assert "report/index.html" in shown.out
    assert "No browser was found. Open file://" in shown.err
    assert started == []
