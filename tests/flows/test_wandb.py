"""The key for W&B on its way through a flow run, against Prefect's own temporary server."""

import base64
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect.blocks.system import Secret
from prefect.settings import PREFECT_SERVER_DATABASE_CONNECTION_URL

from flows.rotation_vit import rotation_vit
from tasks.wandb_secret import wandb_key_of_secret
from tests.training.standin_wandb import StandInWandb, standin_wandb
from training.configure import validate
from training.settings import ConfigError, TrackingSettings, merge
from training.wandb_key import HOW_TO_TURN_ON

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("prefect_backend")]

KEY = "c0ffee" + "0123456789abcdef" * 2 + "cd"
"""A key that is planted, and looked for."""

NAME = "key-of-w-and-b"


@pytest.fixture
def secret() -> None:
    Secret(value=KEY).save(NAME, overwrite=True)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandInWandb]:
    with standin_wandb() as standin:
        monkeypatch.setenv("WANDB_BASE_URL", standin.url)
        monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
        yield standin


@pytest.mark.usefixtures("secret")
def test_the_key_of_a_secret_is_used_and_left_nowhere(
    wandb: StandInWandb,
    tiny_values: dict[str, Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    changes = {"tracking": {"wandb": "online", "wandb_secret": NAME}}
    settings = validate(merge(tiny_values, changes))
    rotation_vit(settings, tmp_path / "outputs", until="linear_probe")
    assert wandb.keys == {KEY}
    assert wandb.run_of("pretrain").steps == list(range(1, 19))
    assert wandb.run_of("linear_probe").exit_code == 0
    assert "WANDB_API_KEY" not in os.environ
    hidden = [KEY, base64.b64encode(f"api:{KEY}".encode()).decode()]
    said = caplog.text + "".join(capfd.readouterr())
    assert not any(text in said for text in hidden)
    written = [
        path
        for root in (tmp_path, Path(os.environ["PREFECT_HOME"]), database().parent)
        for path in root.rglob("*")
        if path.is_file()
    ]
    assert any(path.name == "run.json" for path in written)
    assert database() in written
    leaks = [p for p in written if any(text.encode() in p.read_bytes() for text in hidden)]
    assert leaks == []


def test_a_secret_that_is_no_key_is_refused(secret: None) -> None:
    with pytest.raises(ConfigError, match=r"'no-such-block' is none .*WANDB_API_KEY"):
        _enter(TrackingSettings(wandb_secret="no-such-block"))
    Secret(value=["k"]).save("a-list", overwrite=True)
    with pytest.raises(ConfigError, match="'a-list' holds no text"):
        _enter(TrackingSettings(wandb_secret="a-list"))
    _enter(TrackingSettings(wandb="offline", wandb_secret="no-such-block"))


def database() -> Path:
    """Prefect's, which holds the block (encrypted), the parameters and the log."""
    return Path(PREFECT_SERVER_DATABASE_CONNECTION_URL.value().partition("///")[2])


def _enter(tracking: TrackingSettings) -> None:
    with wandb_key_of_secret(tracking):
        pass


def test_without_a_key_one_line_per_run_says_how_to_turn_it_on(
    tiny_values: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = validate(merge(tiny_values, {"tracking": {"wandb": "auto"}}))
    rotation_vit(settings, tmp_path / "outputs", until="pretrain")
    assert caplog.text.count(HOW_TO_TURN_ON) == 1
    assert [line for line in caplog.text.splitlines() if "W&B" in line][1:] == []
