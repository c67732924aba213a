"""A user's mistakes are found before the work starts, and said in one line."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from data.records import DatasetError
from training import preflight
from training.configure import validate
from training.settings import ConfigError, Settings, merge
from training.stage_files import OutputsError


def test_sound_settings_pass(tiny_settings: Settings, tmp_path: Path) -> None:
    preflight.check(tiny_settings, tmp_path / "new" / "outputs")
    assert (tmp_path / "new" / "outputs").is_dir()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"source": "folder:no/such/folder"}}, "no/such/folder"),
        ({"data": {"source": "drawn11"}}, "drawn10"),
        ({"pretrain": {"batch_size": 500}}, r"pretrain\.batch_size must be at most.*54"),
        ({"finetune": {"batch_size": 31}}, r"finetune\.batch_size must be at most.*30"),
        ({"from_scratch": {"batch_size": 31}}, r"from_scratch\.batch_size must be at most.*30"),
        ({"transfer": {"labels": 2}}, r"transfer\.labels must be from 3 .*got 2"),
        ({"transfer": {"labels": 55}}, r"transfer\.labels must be from 3 .* to 54 .*got 55"),
    ],
)
def test_a_source_that_cannot_be_used_is_refused(
    tiny_values: dict[str, Any], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DatasetError, match=message):
        preflight.check(validate(merge(tiny_values, changes)), tmp_path)


@pytest.mark.parametrize(
    ("until", "changes"),
    [
        ("pretrain", {"transfer": {"labels": 2}}),
        ("linear_probe", {"finetune": {"batch_size": 31}}),
        ("prepare_data", {"pretrain": {"batch_size": 500}}),
    ],
)
def test_what_no_stage_of_the_plan_reads_is_not_held_against_it(
    tiny_values: dict[str, Any], tmp_path: Path, until: str, changes: dict[str, Any]
) -> None:
    preflight.check(validate(merge(tiny_values, changes)), tmp_path, until)


def test_frozen_tokens_that_nothing_would_read_are_refused(
    tiny_settings: Settings, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"frozen-tokens are .*; set finetune\.flip=false"):
        preflight.check(tiny_settings, tmp_path, until="frozen-tokens")


def test_an_empty_folder_is_refused(tiny_values: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    changes = {"data": {"source": f"folder:{tmp_path / 'images'}"}}
    with pytest.raises(DatasetError, match="found none for train"):
        preflight.check(validate(merge(tiny_values, changes)), tmp_path)


def test_labels_are_demanded_only_by_the_stages_that_need_them(
    tiny_values: dict[str, Any], tiny_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "images").mkdir()
    for number, path in enumerate(sorted((tiny_folder / "train").rglob("*.png"))):
        shutil.copy(path, tmp_path / "images" / f"{number}.png")
    changes = {"data": {"source": f"folder:{tmp_path / 'images'}"}}
    settings = validate(merge(tiny_values, changes))
    preflight.check(settings, tmp_path / "outputs", until="pretrain")
    with pytest.raises(DatasetError, match=r"has no labels.*transfer\.source"):
        preflight.check(settings, tmp_path / "outputs")


def test_an_outputs_folder_that_cannot_be_written_is_refused(
    tiny_settings: Settings, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputsError, match=r"must be writable.*--outputs"):
        preflight.check(tiny_settings, tmp_path / "file" / "outputs")


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_outputs_without_locks_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(file: object, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(OutputsError, match=f"must be lockable.*{tmp_path}.*--outputs"):
        preflight.check_outputs(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_outputs_folder_is_refused(tiny_settings: Settings, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputsError, match="must be writable"):
        preflight.check(tiny_settings, tmp_path)


def test_wandb_online_without_a_key_is_refused(tiny_values: dict[str, Any], tmp_path: Path) -> None:
    settings = validate(merge(tiny_values, {"tracking": {"wandb": "online"}}))
    with pytest.raises(ConfigError, match="needs a key"):
        preflight.check(settings, tmp_path)
