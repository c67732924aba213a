"""Copies of test images: counted by the preparation, and left out of pretraining where asked."""

import logging
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.drawn import DrawnSource
from data.records import DatasetError
from training import store
from training.configure import validate
from training.images import open_pretraining, open_splits
from training.stages import STAGES, plan
from training.store import StageResult

RunStages = Callable[..., dict[str, StageResult]]
Made = Callable[..., StageResult]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """40 to train on, 6 to test; of these, 2 are among the first, as other files."""
    drawn = [record.image for record in islice(DrawnSource().records("train"), 44)]
    for number, picture in enumerate(drawn):
        assert isinstance(picture, Image.Image)
        split = "train" if number < 40 else "test"
        path = tmp_path / "photos" / split / "abc"[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
        if number in (11, 22):
            again = tmp_path / "photos" / "test" / "a" / f"again-{number}.jpg"
            again.parent.mkdir(parents=True, exist_ok=True)
            picture.resize((99, 99)).save(again, quality=80)
    return tmp_path / "photos"


def values(tiny: dict[str, Any], source: Path, **data: Any) -> dict[str, Any]:
    return {**tiny, "data": {"source": f"folder:{source}", "val_fraction": 0.05, **data}}


def test_copies_are_counted_and_told(
    photos: Path,
    tiny_values: dict[str, Any],
    tmp_path: Path,
    run_stages: RunStages,
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = validate(values(tiny_values, photos))
    with caplog.at_level(logging.INFO):
        scores = run_stages(settings, tmp_path, "prepare_data")["prepare_data"].scores
    assert scores["test_copies_in_train"] == 2
    assert "2 of the 6 test images of folder:" in caplog.text


def test_nothing_is_counted_where_the_test_images_are_taken_out_of_train(
    photos: Path, tiny_values: dict[str, Any], tmp_path: Path, run_stages: RunStages
) -> None:
    settings = validate(values(tiny_values, photos / "train"))
    results = run_stages(settings, tmp_path, "prepare_data")
    assert results["prepare_data"].scores["test_copies_in_train"] is None


def test_copies_are_left_out_only_if_asked(
    photos: Path, tiny_values: dict[str, Any], tmp_path: Path, run_stages: RunStages
) -> None:
    without = validate(values(tiny_values, photos, leave_out_test_copies=True))
    with_them = validate(values(tiny_values, photos))
    prepared = run_stages(without, tmp_path, "prepare_data")["prepare_data"].directory
    splits, none_left_out = open_pretraining(prepared, with_them)
    assert none_left_out == 0
    fewer, left_out = open_pretraining(prepared, without)
    # By name: train/a/0, train/a/12, ...; 11 is in c and 22 in b.
    names = sorted(p.relative_to(photos).as_posix() for p in photos.glob("train/*/*"))
    copied = [names.index("train/c/11.png"), names.index("train/b/22.png")]
    expected = np.setdiff1d(splits.train.indices, copied)
    assert np.array_equal(fewer.train.indices, expected)
    assert left_out == len(splits.train) - len(expected) > 0
    assert np.array_equal(fewer.val.indices, splits.val.indices)


@pytest.mark.slow
def test_copies_of_the_transfer_test_images_are_left_out_too(
    photos: Path, tiny_values: dict[str, Any], tmp_path: Path, run_stages: RunStages
) -> None:
    unlabelled = tmp_path / "unlabelled"
    unlabelled.mkdir()
    for path in photos.glob("train/*/*"):
        shutil.copy(path, unlabelled)
    given = values(tiny_values, unlabelled, leave_out_test_copies=True)
    settings = validate({**given, "transfer": {"source": f"folder:{photos}", "labels": 30}})
    assert "prepare_transfer_data" in [stage.name for stage in plan(settings, "pretrain")]
    scores = run_stages(settings, tmp_path / "out", "pretrain")["pretrain"].scores
    everything = validate({**given, "data": {**given["data"], "leave_out_test_copies": False}})
    assert "prepare_transfer_data" not in [s.name for s in plan(everything, "pretrain")]
    prepared = run_stages(everything, tmp_path / "out", "prepare_data")["prepare_data"].directory
    assert scores["left_out"] >= 1
    assert scores["images"] + scores["left_out"] == len(open_splits(prepared, everything).train)
    page = run_stages(settings, tmp_path / "out", "report")["report"].directory / "index.html"
    assert "2 test images are among those to pretrain on, or look like one; " in page.read_text()


def test_training_on_copies_alone_is_an_error(
    photos: Path, tiny_values: dict[str, Any], tmp_path: Path, run_stages: RunStages
) -> None:
    given = values(
        tiny_values,
        photos / "train",
        test_source=f"folder:{photos}/train",
        leave_out_test_copies=True,
    )
    settings = validate(given)
    prepared = run_stages(settings, tmp_path, "prepare_data")["prepare_data"].directory
    with pytest.raises(DatasetError, match="leave_out_test_copies=false"):
        open_pretraining(prepared, settings)


def test_a_setting_that_is_off_changes_no_key(
    tiny_values: dict[str, Any], tmp_path: Path, made: Made
) -> None:
    data = made("prepare_data", tmp_path)

    def reads(**changes: Any) -> dict[str, Any]:
        given = {
            **tiny_values,
            "data": {**tiny_values["data"], **changes},
            "transfer": {"source": None},
        }
        request = store.make_request(
            STAGES["pretrain"], validate(given), tmp_path, {"prepare_data": data}
        )
        return request.reads

    assert "data.leave_out_test_copies" not in reads()
    assert reads(leave_out_test_copies=True)["data.leave_out_test_copies"] is True
