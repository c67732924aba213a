"""The canary on a user's own files: silent where nothing leaks, loud where something does."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from data import loaders
from flows.cli import main
from tests.data.standin_hub import StandInHub
from training.canary import Reading, Verdict, check_path
from training.configure import build_settings
from training.settings import ConfigError, Settings

MakeFolder = Callable[..., Path]

SMALL = ["model.image_size=16", "model.patch_size=8", "data.crop_margin=0"]


@pytest.fixture
def folder_of(tmp_path: Path) -> MakeFolder:
    """A folder of flat pictures: what they show does not matter."""

    def make(format: str, size: tuple[int, int], **options: Any) -> Path:
        folder = tmp_path / "photos"
        folder.mkdir()
        for number in range(3):
            Image.new("RGB", size, number).save(folder / f"{number}.{format}", **options)
        return folder

    return make


def check(folder: Path, tmp_path: Path, *overrides: str) -> Verdict:
    settings = build_settings(overrides=[f"data.source=folder:{folder}", *SMALL, *overrides])
    return check_path(settings, images=900, workplace=tmp_path)


def test_photos_that_are_much_larger_than_the_input_are_clean(
    folder_of: MakeFolder, tmp_path: Path
) -> None:
    verdict = check(folder_of("jpg", (96, 72), quality=75), tmp_path)
    assert [reading.chance for reading in verdict.readings] == [0.25, 0.5, 0.25, 0.5]
    assert [reading.images for reading in verdict.readings] == [600] * 4
    assert not verdict.leaks, verdict
    assert verdict.in_words().startswith("Clean")
    assert verdict.files == "3 JPEG; 96 px on the long side"
    assert [path.name for path in tmp_path.iterdir()] == ["photos"], "nothing is left behind"


def test_jpeg_files_of_the_size_of_the_input_leak(folder_of: MakeFolder, tmp_path: Path) -> None:
    verdict = check(folder_of("jpg", (16, 16), quality=50), tmp_path)
    assert verdict.leaks
    assert verdict.in_words().startswith("Leaking")
    assert "model.image_size" in verdict.in_words()


def test_squashing_in_the_data_path_leaks(
    folder_of: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of("png", (96, 48))
    assert not check(folder, tmp_path).leaks
    monkeypatch.setattr("data.decode.centre_crop_square", lambda image: image)
    squashed = check(folder, tmp_path)
    assert [reading.leaks for reading in squashed.readings if reading.chance == 0.5] == [True] * 2


@pytest.mark.parametrize(
    ("step", "settings"),
    [
        ("flip", []),
        ("resized_crop", ["pretrain.crop_scale=0.5"]),
        ("jitter_colours", ["pretrain.colour_jitter=0.1"]),
        ("make_grey", ["pretrain.greyscale=0.1"]),
    ],
)
def test_what_happens_to_training_batches_only_is_found(
    folder_of: MakeFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    settings: list[str],
) -> None:
    original = getattr(loaders, step)

    def darken_the_top(*arguments: Any) -> Any:
        images = original(*arguments).clone()
        images[:, :, :2] = images.amin()
        return images

    monkeypatch.setattr(loaders, step, darken_the_top)
    leaks = {
        reading.batches: reading.leaks
        for reading in check(folder_of("png", (40, 40)), tmp_path, *settings).readings
        if reading.chance == 0.25
    }
    assert leaks == {"training": True, "evaluation": False}


def test_a_share_is_held_against_chance_by_its_interval() -> None:
    """By hand: 0.25 of 2,000 is told apart from 0.25 + 3.29 × sqrt(0.25 × 0.75 / 2,000) = 0.282."""
    shares = np.array([0.25, 0.27, 0.29])
    readings = [
        Reading(batches="training", question="the turn", chance=0.25, share=share, images=2000)
        for share in shares
    ]
    assert [reading.leaks for reading in readings] == [False, False, True]
    low, high = readings[0].interval
    assert (low, high) == pytest.approx((0.25 - 0.030, 0.25 + 0.033), abs=0.002)


def test_too_few_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least 150"):
        check_path(build_settings(), images=149, workplace=tmp_path)


@pytest.mark.parametrize(
    ("format", "size", "status", "word"),
    [("png", (48, 32), 0, "Clean"), ("jpg", (16, 16), 1, "Leaking")],
)
def test_the_command_says_it_in_a_sentence_and_by_its_exit_status(
    folder_of: MakeFolder,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    format: str,
    size: tuple[int, int],
    status: int,
    word: str,
) -> None:
    folder = folder_of(format, size, quality=50)
    options = [option for setting in SMALL for option in ("--set", setting)]
    options += ["--images", "600", "--outputs", str(tmp_path / "outputs")]
    found = main(["canary", "--source", f"folder:{folder}", *options])
    printed = capfd.readouterr().out
    assert found == status
    assert printed.splitlines()[-1].startswith(word)
    assert f"folder:{folder}" in printed.replace("\n", "")


def parquet_of(folder: Path) -> bytes:
    content = [{"bytes": path.read_bytes(), "path": path.name} for path in folder.iterdir()]
    features = datasets.Features({"image": datasets.Image()})
    file = io.BytesIO()
    datasets.Dataset.from_dict({"image": content}, features=features).to_parquet(file)
    return file.getvalue()


def test_files_in_parquet_are_copied_in_form_too(folder_of: MakeFolder, tmp_path: Path) -> None:
    file = tmp_path / "train.parquet"
    file.write_bytes(parquet_of(folder_of("jpg", (16, 16), quality=50)))
    settings = build_settings(overrides=[f"data.source=parquet:{file}", *SMALL])
    verdict = check_path(settings, images=600, workplace=tmp_path)
    assert verdict.files == "3 JPEG; 16 px on the long side"
    assert verdict.leaks


def test_a_source_on_the_hub_is_downloaded_first_and_once(
    hub: StandInHub,
    folder_of: MakeFolder,
    tmp_path: Path,
    run_stages: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    content = parquet_of(folder_of("png", (40, 30)))
    hub.add("a/photos", {"data/train-0.parquet": content})

    def run(settings: Settings, outputs: Path, *, until: str) -> None:
        run_stages(settings, outputs, until)  # without Prefect, which takes long to start

    monkeypatch.setattr("flows.data_commands.run_and_show", run)
    options = [option for setting in SMALL for option in ("--set", setting)]
    options += ["--source", "hub:a/photos", "--images", "150", "--outputs", str(tmp_path / "o")]
    asked = []
    for _ in range(2):
        assert main(["canary", *options]) == 0
        assert "3 PNG; 40 px on the long side" in capfd.readouterr().out
        asked.append(len(hub.content_requests()))
    assert asked[0] == asked[1] > 0
    left = {path.name for path in (tmp_path / "o").iterdir()}
    assert left == {"download", "locks"}, "no prepared noise"


def test_smaller_images_of_pretraining_are_what_is_looked_at(
    folder_of: MakeFolder, tmp_path: Path
) -> None:
    """JPEG of the size of the model's input leaks, and not any more at a quarter of that."""
    folder = folder_of("jpg", (64, 64), quality=50)
    sizes = ["model.image_size=64", "model.patch_size=8"]
    assert check(folder, tmp_path, *sizes).leaks
    smaller = check(folder, tmp_path, *sizes, "pretrain.image_size=16")
    shares = [reading.share for reading in smaller.readings]
    assert max(shares[0], shares[2]) < 0.4


def test_a_source_that_is_not_there_is_a_user_s_mistake(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["--source", "folder:nowhere", "--outputs", str(tmp_path)]
    assert main(["canary", *options]) == 2
    assert "must name a folder" in capfd.readouterr().err
