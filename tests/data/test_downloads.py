"""Downloading as a whole: once, resumed, repaired, and from an archive where there is no Hub."""

import hashlib
import io
import json
import logging
import re
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
from PIL import Image
from torchvision.datasets import Imagenette

from data import catalogue, downloads, listing, specs
from data.patience import DownloadError
from data.records import DatasetError
from data.sources import open_source
from tests.data.standin_data import PATIENCE, get, parquet, reds
from tests.data.standin_hub import Fault, StandInHub


def test_afterwards_nothing_is_asked_for_any_more(main_branch: StandInHub, tmp_path: Path) -> None:
    get("hub:a/b", tmp_path / "d")
    main_branch.close()
    main_branch.requests.clear()
    get("hub:a/b", tmp_path / "d")
    assert reds("hub:a/b", tmp_path / "d") == list(range(8))
    assert main_branch.requests == []


def test_a_list_that_the_files_contradict_is_made_again(
    main_branch: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = listing.list_source

    def wrong(*args: Any) -> catalogue.Catalogue:
        found = real(*args)
        files = [replace(found.files[0], rows=4), *found.files[1:]]
        return replace(found, files=files)

    monkeypatch.setattr(downloads, "list_source", wrong)
    with pytest.raises(DownloadError, match=r"must be what was listed, 4 images.*it is 5 images"):
        get("hub:a/b", tmp_path)
    monkeypatch.setattr(downloads, "list_source", real)
    assert get("hub:a/b", tmp_path).counts == {"train": 8, "test": 2}


def test_after_a_stop_it_goes_on_with_the_same_commit(
    main_branch: StandInHub, tmp_path: Path
) -> None:
    came = 0

    def report(done: int, total: int) -> None:
        nonlocal came
        came = done

    with pytest.raises(InterruptedError):
        downloads.download(
            ["hub:a/b"], tmp_path, report=report, patience=PATIENCE, stop=lambda: came > 0
        )
    repository = main_branch.repositories["a/b"]
    repository.revisions = (repository.commit,)
    repository.commit = "d" * 40
    assert get("hub:a/b", tmp_path).origin.endswith("c" * 40)
    assert reds("hub:a/b", tmp_path) == list(range(8))


@pytest.mark.parametrize("damage", ["gone", "cut", "flipped"])
def test_a_damaged_file_is_found_and_only_that_one_is_fetched_again(
    main_branch: StandInHub, tmp_path: Path, damage: str
) -> None:
    found = get("hub:a/b", tmp_path)
    path = catalogue.kept_files(tmp_path, found)[1]
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content[:-5] if damage == "cut" else content[:-1] + b"x")
    assert "train-00001" in (catalogue.verify(tmp_path) or "")
    main_branch.requests.clear()
    get("hub:a/b", tmp_path)
    assert len(main_branch.content_requests()) == 1
    assert path.read_bytes() == content
    assert catalogue.verify(tmp_path) is None


def test_a_copied_download_is_still_sound(main_branch: StandInHub, tmp_path: Path) -> None:
    get("hub:a/b", tmp_path / "d")
    shutil.copytree(tmp_path / "d", tmp_path / "e", copy_function=shutil.copyfile)
    assert catalogue.verify(tmp_path / "e") is None


def test_without_a_publishers_checksum_the_copy_that_came_is_the_one_that_counts(
    tmp_path: Path,
) -> None:
    store = fsspec.filesystem("memory")
    name, spec = "/unsigned/train.parquet", "parquet:memory://unsigned/train.parquet"
    first = parquet(range(4))
    second = first[:100] + bytes([first[100] ^ 1]) + first[101:]  # of an image
    store.pipe({name: first})
    found = get(spec, tmp_path / "d")
    assert get(spec, tmp_path / "d").files == found.files
    (path,) = catalogue.kept_files(tmp_path / "d", found)
    path.write_bytes(second)
    assert "has other bytes than were downloaded" in (catalogue.verify(tmp_path / "d") or "")
    get(spec, tmp_path / "d")
    assert path.read_bytes() == first
    store.pipe({name: second})
    assert downloads.digest([get(spec, tmp_path / "e")]) != downloads.digest([found])


def test_a_disk_that_is_too_small_is_said_before(
    main_branch: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 10

    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage)
    with pytest.raises(DatasetError, match=r"download needs .* GB free"):
        get("hub:a/b", tmp_path)


@pytest.fixture
def imagenette_archive(hub: StandInHub, monkeypatch: pytest.MonkeyPatch) -> specs.KnownDataset:
    """Imagenette as an archive on the stand-in, and not on its Hub."""
    known = specs.KNOWN["imagenette"]
    assert known.archive is not None
    packed = io.BytesIO()
    red = 0
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for part in ("train", "val"):
            for folder in known.archive.classes:
                file = io.BytesIO()
                Image.new("RGB", (6, 6), (red, 0, 0)).save(file, "JPEG")
                info = tarfile.TarInfo(f"imagenette2-320/{part}/{folder}/{red}.JPEG")
                info.size = file.tell()
                archive.addfile(info, io.BytesIO(file.getvalue()))
                red += 1
    content = packed.getvalue()
    hub.add("fast/ai", {"imagenette2-320.tgz": content})
    ours = replace(
        known,
        counts={"train": 10, "test": 10},
        archive=replace(
            known.archive,
            url=f"{hub.url}/plain/fast/ai/-/imagenette2-320.tgz",
            checksum=f"md5:{hashlib.md5(content).hexdigest()}",
        ),
    )
    monkeypatch.setitem(specs.KNOWN, "imagenette", ours)
    return ours


def test_imagenette_is_taken_from_its_archive_when_the_hub_has_none(
    imagenette_archive: specs.KnownDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        found = get("imagenette", tmp_path)
    assert "instead" in caplog.text
    assert found.counts == {"train": 10, "test": 10}
    source = open_source("imagenette", downloads=tmp_path)
    names = [(r.name, r.label) for r in source.records("train")]
    assert names[3] == ("train/n03000684/3.JPEG", 3)
    assert [r.label for r in source.records("test", start=8)] == [8, 9]
    assert source.class_names is not None
    assert source.class_names[0] == "tench"
    assert catalogue.verify(tmp_path) is None
    assert list(tmp_path.rglob("*.tgz")) == []


@pytest.fixture
def begun(imagenette_archive: specs.KnownDataset, hub: StandInHub, tmp_path: Path) -> Path:
    """A download of Imagenette from the Hub, stopped in its first file."""
    assert imagenette_archive.archive is not None
    names = list(imagenette_archive.archive.classes.values())
    files = {
        f"320px/{part}/0000.parquet": parquet(range(10), names=names)
        for part in ("train", "validation")
    }
    hub.add("frgfm/imagenette", files, revisions=("main", "refs/convert/parquet"))
    came = 0

    def report(done: int, total: int) -> None:
        nonlocal came
        came = done

    directory = tmp_path / "begun"
    with pytest.raises(InterruptedError):
        downloads.download(
            ["imagenette"], directory, report=report, patience=PATIENCE, stop=lambda: came > 0
        )
    assert list(directory.rglob("*.part"))
    return directory


@pytest.mark.parametrize("fault", [Fault("status", 503, times=4), Fault("status", 404)], ids=str)
def test_imagenette_is_taken_from_its_archive_when_the_hub_fails_in_the_middle(
    begun: Path, hub: StandInHub, tmp_path: Path, caplog: pytest.LogCaptureFixture, fault: Fault
) -> None:
    hub.faults.append(replace(fault))
    seen: list[tuple[int, int]] = []
    (found,) = downloads.download(
        ["imagenette"], begun, report=lambda *counts: seen.append(counts), patience=PATIENCE
    )
    assert re.search(r"Taking imagenette from .*imagenette2-320\.tgz instead", caplog.text)
    assert seen[-1] == (found.size, found.size)
    assert list(begun.rglob("*.parquet*")) == []
    source = open_source("imagenette", downloads=begun)
    assert [record.label for record in source.records("train")] == list(range(10))
    del hub.repositories["frgfm/imagenette"]
    from_the_start = get("imagenette", tmp_path / "other")
    assert found == from_the_start == catalogue.read(begun)[0]
    assert get("imagenette", begun) == found, "it stays with the archive"


@pytest.mark.parametrize("before", ["shutil.rmtree", "catalogue.write"])
def test_a_change_to_the_archive_that_is_cut_off_leaves_a_download_that_goes_on(
    begun: Path, hub: StandInHub, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    hub.faults.append(Fault("status", 404))
    with monkeypatch.context() as patch:
        patch.setattr(f"data.downloads.{before}", killed)
        with pytest.raises(KeyboardInterrupt):
            get("imagenette", begun)
    assert get("imagenette", begun).origin.startswith("frgfm/imagenette@")
    assert catalogue.verify(begun) is None


def test_a_full_disk_and_a_finished_download_are_no_reason_to_change_to_the_archive(
    begun: Path, hub: StandInHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise DatasetError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(downloads, "fetch", full)
        with pytest.raises(DatasetError, match="is full"):
            get("imagenette", begun)
    found = get("imagenette", begun)
    assert found.layout == "parquet"
    next(begun.rglob("*.parquet")).unlink()
    hub.faults.append(Fault("status", 503, times=4))
    with pytest.raises(DownloadError, match="attempts in a row failed"):
        get("imagenette", begun)
    assert get("imagenette", begun) == found


def test_images_missing_from_an_unpacked_archive_are_unpacked_again(
    imagenette_archive: specs.KnownDataset, tmp_path: Path
) -> None:
    get("imagenette", tmp_path)
    next(tmp_path.rglob("3.JPEG")).unlink()
    assert "has 19 files" in (catalogue.verify(tmp_path) or "")
    get("imagenette", tmp_path)
    assert catalogue.verify(tmp_path) is None


def test_the_archive_is_the_one_that_torchvision_takes() -> None:
    archive = specs.KNOWN["imagenette"].archive
    assert archive is not None
    url, md5 = Imagenette._ARCHIVES["320px"]
    assert (archive.url, archive.checksum) == (url, f"md5:{md5}")
    names = {wnid: names[0] for wnid, names in Imagenette._WNID_TO_CLASS.items()}
    assert dict(archive.classes) == names


def test_a_catalogue_of_another_format_is_refused(main_branch: StandInHub, tmp_path: Path) -> None:
    get("hub:a/b", tmp_path)
    content = json.loads((tmp_path / "catalogue.json").read_bytes())
    (tmp_path / "catalogue.json").write_text(json.dumps({**content, "format": 9}))
    with pytest.raises(DatasetError, match=r"must be the catalogue of a download.*rotvit download"):
        catalogue.read(tmp_path)
