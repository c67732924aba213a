from pathlib import Path

import pytest

from training.settings import ConfigError, TrackingSettings
from training.wandb_key import is_off_for_want_of_a_key, wandb_mode


@pytest.mark.parametrize(
    ("wandb", "with_key", "without"),
    [
        ("auto", "online", "disabled"),
        ("offline", "offline", "offline"),
        ("disabled", "disabled", "disabled"),
    ],
)
def test_a_key_decides_where_it_is_left_open(
    monkeypatch: pytest.MonkeyPatch, wandb: str, with_key: str, without: str
) -> None:
    tracking = TrackingSettings.model_validate({"wandb": wandb})
    assert wandb_mode(tracking) == without
    assert is_off_for_want_of_a_key(tracking) == (wandb == "auto")
    monkeypatch.setenv("WANDB_API_KEY", "k")
    assert wandb_mode(tracking) == with_key
    assert not is_off_for_want_of_a_key(tracking)


def test_online_is_refused_without_a_key() -> None:
    with pytest.raises(ConfigError, match=r"needs a key.*WANDB_API_KEY.*tracking\.wandb_secret"):
        wandb_mode(TrackingSettings(wandb="online"))
    assert wandb_mode(TrackingSettings(wandb="online", wandb_secret="w-and-b")) == "online"


def test_wandbs_own_variable_keeps_auto_from_going_online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode(TrackingSettings()) == "disabled"
    assert wandb_mode(TrackingSettings(wandb="online")) == "online"
    monkeypatch.delenv("WANDB_API_KEY")
    assert not is_off_for_want_of_a_key(TrackingSettings()), "it is what the user wants"


def test_a_key_of_the_servers_machine_is_found_in_netrc(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password k\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert wandb_mode(TrackingSettings()) == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:8080")
    assert wandb_mode(TrackingSettings()) == "disabled"
    (tmp_path / "netrc").write_text("machine 127.0.0.1:8080 login user password k\n")
    assert wandb_mode(TrackingSettings()) == "online"
