"""Whole runs with outputs at an address, on machines that share nothing else."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from data.patience import Patience
from flows import cli
from flows.rotation_vit import rotation_vit
from training import remote_checkpoints, remote_outputs
from training.configure import to_yaml
from training.remote_store import Store
from training.settings import Settings

if TYPE_CHECKING:
    from tests.standin_s3 import StandInS3

Machine = Callable[[str, str], Path]


def statuses(results: dict[str, Any]) -> dict[str, str]:
    return {name: row["status"] for name, row in results["stages"].items()}


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_backend")
def test_a_run_on_one_machine_is_cached_on_another_and_what_was_lost_is_computed(
    machine: Machine,
    tiny_settings: Settings,
    s3: "StandInS3",
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    address = "s3://bucket/runs-of-all"
    machine("a", address)
    first = rotation_vit(tiny_settings, address, until="features")
    assert set(statuses(first).values()) == {"computed"}

    outputs = machine("b", address)
    (tmp_path / "tiny.yaml").write_text(to_yaml(tiny_settings))
    options = ["--config", str(tmp_path / "tiny.yaml"), "--outputs", address]
    assert cli.main(["run", *options, "--until", "features"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("cached") == 3
    assert f"stored   {address}/runs/" in shown
    assert not list(outputs.glob("*/*/*.npy")), "images that nobody needed"
    assert not list(outputs.glob("*/*/model"))

    remote = Store(address)
    (weights,) = (
        name
        for name in remote.sizes("")  # a slow machine stores checkpoints, too
        if re.fullmatch(r"pretrain/[^/]+/model/model\.safetensors", name)
    )
    content = remote.read(weights) or b""
    remote.write(weights, content[:-1] + bytes([content[-1] ^ 1]))
    (result,) = (name for name in remote.sizes("") if re.match(r"features/.*/result", name))
    remote.remove(result)

    machine("c", address)
    last = rotation_vit(tiny_settings, address, until="features")
    assert statuses(last) == {
        "prepare_data": "cached",
        "pretrain": "computed",
        "features": "computed",
    }
    assert "model.safetensors is damaged" in caplog.text


def test_status_on_another_machine_says_where_a_training_is(
    machine: Machine,
    tiny_settings: Settings,
    tmp_path: Path,
    run_stages: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    address = f"file://{tmp_path}/store"
    outputs = machine("a", address)
    from training import store
    from training.stages import STAGES

    results = run_stages(tiny_settings, outputs, "prepare_data")
    request = store.make_request(STAGES["prepare_data"], tiny_settings, outputs, {})
    remote_outputs.compute_once(request, lambda given: results["prepare_data"])
    pretrain = store.make_request(STAGES["pretrain"], tiny_settings, outputs, results)
    folder = f"pretrain/{pretrain.key}/checkpoints/step-00000042"
    Store(address).write(f"{folder}/files.json", b"{}")
    assert remote_checkpoints.newest_step(Store(address), f"pretrain/{pretrain.key}") == 42

    machine("b", address)
    (tmp_path / "tiny.yaml").write_text(to_yaml(tiny_settings))
    options = ["--config", str(tmp_path / "tiny.yaml"), "--outputs", address]
    assert cli.main(["status", *options]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"prepare-data\s+cached", shown)
    assert re.search(r"pretrain\s+partial at step 42\s+resumes there", shown)


@pytest.mark.parametrize("command", ["run", "status", "pretrain"])
def test_missing_credentials_are_one_clear_line(
    command: str,
    s3: "StandInS3",
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("ROTVIT_CACHE", str(tmp_path))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    assert cli.main([command, "--outputs", "s3://bucket/x"]) == cli.EXIT_USER_ERROR
    said = capsys.readouterr().err
    assert "Unable to locate credentials" in said
    assert "AWS_ACCESS_KEY_ID" in said
    assert said.count("\n") == 1
    assert s3.seen == []


@pytest.mark.parametrize("command", ["run", "status"])
def test_a_store_that_is_away_is_one_clear_line_and_no_mistake_of_the_user(
    command: str,
    s3: "StandInS3",
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("ROTVIT_CACHE", str(tmp_path))
    monkeypatch.setattr(remote_outputs, "AT_THE_START", Patience(attempts=1))
    s3.fault = lambda asked: 503
    assert cli.main([command, "--outputs", "s3://bucket/x"]) == cli.EXIT_FAILED
    said = capsys.readouterr().err
    assert "run the same command again; it goes on there" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("place", ["https://host/x", "s3://"])
def test_an_address_that_cannot_be_is_one_clear_line(
    place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", "--outputs", place]) == cli.EXIT_USER_ERROR
    assert "An address for outputs must" in capsys.readouterr().err
