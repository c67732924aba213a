"""What a folder may hold besides files, and names that are no text."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data import decode
from data.decode import UndecodableError, decode_square
from data.folder_source import FolderSource
from data.manifest import read
from data.prepare import prepare
from data.records import DatasetError
from data.sources import open_source
from training import prepare_data
from training.configure import build_settings
from training.runner import run_stage
from training.stages import STAGES
from training.store import make_request

NOT_A_FILE = "not a file but a pipe or a device"

ODD_NAMES = {
    b"new\nline.png": r"new\nline.png",
    b"latin-1 \xe9.png": r"latin-1 \xe9.png",
    b"back\\slash.png": r"back\\slash.png",
    b"\xe5\x9b\xbe.png": "图.png",
    b"esc\x1b[31m.png": r"esc\x1b[31m.png",
}
"""Names of files, and how they are told to people."""


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (3, 2), "red").save(path, "PNG")


def prepared(folder: Path, **options: Any) -> dict[str, str]:
    """What is set aside, and why."""
    manifest = prepare(
        FolderSource(str(folder)),
        folder / "prepared",
        **{"side": 5, "report": lambda done, total: None, "workers": 2, **options},
    )
    assert read(folder / "prepared").skipped == manifest.skipped
    return {each.name: each.reason for each in manifest.skipped}


@pytest.mark.timeout(60)
def test_pipes_devices_and_bad_links_are_set_aside(tmp_path: Path) -> None:
    picture(tmp_path / "good.png")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "endless.jpg").symlink_to("/dev/zero")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "gone.jpg").symlink_to("nowhere.jpg")
    found = prepared(tmp_path, max_skipped=0.9)
    assert {name: reason.split(": ", 1)[0] for name, reason in found.items()} == {
        "gone.jpg": "FileNotFoundError",
        "loop.jpg": "OSError",
        "pipe.jpg": NOT_A_FILE,
    }
    assert not any(str(tmp_path) in reason for reason in found.values())
    # The folder leaves out what is linked from elsewhere; other sources name what they like.
    with pytest.raises(UndecodableError, match=NOT_A_FILE):
        decode_square(tmp_path / "endless.jpg", 5)


def test_a_folder_with_the_name_of_an_image_is_a_folder(tmp_path: Path) -> None:
    picture(tmp_path / "holiday.jpg" / "1.png")
    picture(tmp_path / "work" / "2.png")
    assert [r.name for r in FolderSource(str(tmp_path)).records("train")] == [
        "holiday.jpg/1.png",
        "work/2.png",
    ]
    with pytest.raises(UndecodableError, match=r"^IsADirectoryError: Is a directory$"):
        decode_square(tmp_path / "work", 5)


def test_a_file_that_may_not_be_read_is_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, flags: int) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    picture(tmp_path / "secret.png")
    monkeypatch.setattr(decode.os, "open", refuse)  # type: ignore[attr-defined]
    with pytest.raises(UndecodableError) as error:
        decode_square(tmp_path / "secret.png", 5)
    assert str(error.value) == "PermissionError: Permission denied"


def test_a_folder_that_may_not_be_read_is_an_error_and_not_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan = os.scandir

    def refuse(path: Any) -> Iterator[Any]:
        if Path(path).name == "secret":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    for name in ("open/1.png", "public/2.png", "secret/3.png"):
        picture(tmp_path / name)
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DatasetError, match=r"secret must be readable.*Permission denied"):
        FolderSource(str(tmp_path))


def test_a_file_that_is_too_large_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "large.jpg"
    with path.open("wb") as file:
        file.truncate(2**40)  # takes no space on the disk
    with pytest.raises(UndecodableError, match="more than 1 GiB"):
        decode_square(path, 5)


def test_odd_names_are_told_in_one_line_of_text(tmp_path: Path) -> None:
    for number, name in enumerate(ODD_NAMES):
        (tmp_path / os.fsdecode(name)).write_bytes(b"" if number else b"<html>")
    picture(tmp_path / "good.png")
    found = prepared(tmp_path, max_skipped=0.9)
    assert set(found) == set(ODD_NAMES.values())
    assert found[r"new\nline.png"].startswith("not an image")
    assert found["图.png"] == "the file is empty"


@pytest.mark.parametrize("name", list(ODD_NAMES))
def test_odd_names_reach_results_and_errors(tmp_path: Path, name: bytes) -> None:
    for folder in (b"a", name):  # the class has the name, too
        for number in range(3):
            picture(tmp_path / "photos" / os.fsdecode(folder) / f"{number}.png")
    broken = tmp_path / "photos" / "a" / os.fsdecode(name)
    broken.write_bytes(b"")
    settings = build_settings(
        overrides=[
            f"data.source=folder:{tmp_path / 'photos'}",
            "data.max_skipped=0.9",
            "hardware.threads=2",
        ]
    )
    request = make_request(STAGES["prepare_data"], settings, tmp_path / "outputs", {})
    result = run_stage(request, prepare_data.compute)
    assert result.scores["skipped_examples"] == [[f"a/{ODD_NAMES[name]}", "the file is empty"]]
    assert result.scores["classes"] == sorted(["a", ODD_NAMES[name]])
    written = json.loads((request.directory / "result.json").read_text(encoding="utf-8"))
    assert written["scores"] == result.scores

    source = open_source(f"folder:{tmp_path / 'photos'}")
    with pytest.raises(DatasetError) as error:
        prepare(source, tmp_path / "again", side=5, report=lambda done, total: None, workers=2)
    assert f"  a/{ODD_NAMES[name]}: the file is empty" in str(error.value).splitlines()


def test_names_that_look_alike_when_told_stay_two_classes(tmp_path: Path) -> None:
    for folder in (b"\xff", rb"\xff"):
        picture(tmp_path / os.fsdecode(folder) / "1.png")
    source = FolderSource(str(tmp_path))
    assert source.class_names == [r"\\xff", r"\xff"]
    assert sorted(record.label for record in source.records("train") if record.label in (0, 1)) == [
        0,
        1,
    ]


def test_pictures_in_bands_are_the_same_to_the_last_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (301, 301, 3), dtype=np.uint8)
    deep = np.random.default_rng(1).integers(0, 65536, (301, 301), dtype=np.uint16)
    whole = [decode_square(Image.fromarray(each), 37) for each in (noise, deep)]
    monkeypatch.setattr(decode, "_BAND_PIXELS", 301 * 40)
    bands = [decode_square(Image.fromarray(each), 37) for each in (noise, deep)]
    assert np.array_equal(whole, bands)
