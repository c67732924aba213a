import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from data.records import DatasetError
from models.errors import ModelError
from tests.landscapes import landscape
from training.finished_models import find_model
from training.prediction import Predictor
from training.stage_files import OutputsError
from training.upright import Photo, turn_upright

TURN = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180}


@pytest.fixture(scope="module")
def predictor(landscape_model: Path) -> Predictor:
    return Predictor.load(landscape_model)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Photos that lie in all sorts of ways, and files that are none."""
    root = tmp_path / "photos"
    (root / "trip" / "day 1").mkdir(parents=True)
    sideways = Image.Exif()
    sideways[ExifTags.Base.Orientation] = 6  # shows a stored picture turned 90 degrees clockwise
    landscape(1).save(root / "upright.jpg")
    landscape(2).transpose(TURN[90]).save(root / "trip" / "left.jpg")
    landscape(3).transpose(TURN[90]).save(root / "upright by exif.jpg", exif=sideways)
    landscape(4).save(root / "trip" / "day 1" / "right by exif.JPG", exif=sideways)
    landscape(5).transpose(TURN[180]).save(root / "over.png")
    landscape(6).transpose(TURN[180]).save(root / "over.webp", lossless=True)
    Image.new("RGB", (30, 20), (99, 99, 99)).save(root / "nothing on it.jpg")
    (root / "broken.jpg").write_bytes(b"no picture")
    (root / "notes.txt").write_text("none")
    return root


EXPECTED = {
    "broken.jpg": ("skipped", None, "not an image of the kinds"),
    "nothing on it.jpg": ("skipped", 0, "not sure enough"),
    "over.png": ("turned", 180, ""),
    "over.webp": ("skipped", 180, "WEBP is not turned without loss"),
    "trip/day 1/right by exif.JPG": ("turned", 270, ""),
    "trip/left.jpg": ("turned", 90, ""),
    "upright by exif.jpg": ("upright", 0, ""),
    "upright.jpg": ("upright", 0, ""),
}


def shown(path: Path) -> NDArray[Any]:
    with Image.open(path) as image:
        return np.asarray(ImageOps.exif_transpose(image))


def contents(root: Path) -> dict[str, str]:
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def check_outcomes(photos: list[Photo]) -> None:
    assert [photo.name for photo in photos] == list(EXPECTED)
    for photo in photos:
        outcome, turned, reason = EXPECTED[photo.name]
        assert photo.outcome == outcome, photo
        # With nothing on it, all turns are alike but for rounding.
        assert photo.turned == turned or reason == "not sure enough", photo
        assert photo.reason.startswith(reason)
        assert (photo.probability or 0) > 0.9 or outcome == "skipped"


def test_photos_are_written_the_right_way_up_and_the_folder_is_left_alone(
    predictor: Predictor, folder: Path, tmp_path: Path
) -> None:
    before, out = contents(folder), tmp_path / "new" / "out"
    check_outcomes(turn_upright(predictor, folder, out, min_confidence=0.9))
    assert contents(folder) == before
    after = contents(out)
    assert set(after) == {name for name in EXPECTED if EXPECTED[name][0] != "skipped"}
    for name, (outcome, turned, _) in EXPECTED.items():
        if outcome == "upright":
            assert after[name] == before[name]
        if outcome == "turned":
            back = -(turned or 0) // 90
            np.testing.assert_array_equal(
                shown(out / name), np.rot90(shown(folder / name), back), err_msg=name
            )
            assert (out / name).stat().st_mtime_ns == (folder / name).stat().st_mtime_ns
    assert [path.name for path in out.parent.iterdir()] == ["out"], "nothing is left beside it"


def test_in_place_files_are_replaced_once(predictor: Predictor, folder: Path) -> None:
    (folder / "link.png").symlink_to(folder / "over.png")
    before = contents(folder)
    photos = turn_upright(predictor, folder, None, min_confidence=0.9)
    link = next(photo for photo in photos if photo.name == "link.png")
    assert (link.outcome, link.reason) == ("skipped", "a link")
    photos.remove(link)
    check_outcomes(photos)
    after = contents(folder)
    assert set(after) == set(before), "no file is left behind, none is lost"
    turned = {name for name in EXPECTED if EXPECTED[name][0] == "turned"} | {"link.png"}
    assert {name for name in after if after[name] != before[name]} == turned
    again = turn_upright(predictor, folder, None, min_confidence=0.9)
    assert "turned" not in {photo.outcome for photo in again}
    assert contents(folder) == after


def test_what_cannot_be_turned_without_loss_is_encoded_anew_on_request(
    predictor: Predictor, folder: Path, tmp_path: Path
) -> None:
    photos = turn_upright(predictor, folder, tmp_path / "out", min_confidence=0.9, reencode=True)
    assert {photo.name: photo.outcome for photo in photos}["over.webp"] == "turned"
    expected = np.rot90(shown(folder / "over.webp"), 2)
    np.testing.assert_array_equal(shown(tmp_path / "out" / "over.webp"), expected)


def test_what_is_there_already_is_not_overwritten(
    predictor: Predictor, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "upright.jpg").write_text("mine")
    with pytest.raises(OutputsError, match="out exists already and is left as it is"):
        turn_upright(predictor, folder, out, min_confidence=0.9)
    assert [path.read_text() for path in out.iterdir()] == ["mine"]


def test_a_failure_leaves_no_half_of_a_folder(
    predictor: Predictor, folder: Path, tmp_path: Path
) -> None:
    def fail(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        turn_upright(predictor, folder, tmp_path / "out", min_confidence=0.9, report=fail)
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_other_models_and_empty_folders_are_refused(
    predictor: Predictor, finished_run: Path, folder: Path, tmp_path: Path
) -> None:
    classes = Predictor.load(find_model(str(finished_run), tmp_path))
    with pytest.raises(ModelError, match="by a model of pretrain; this one tells car, house, tree"):
        turn_upright(classes, folder, tmp_path / "out", min_confidence=0.9)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="empty must hold images, found none"):
        turn_upright(predictor, tmp_path / "empty", tmp_path / "out", min_confidence=0.9)
    assert not (tmp_path / "out").exists()
