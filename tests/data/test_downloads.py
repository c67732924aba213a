"""Remote sources, from their names to the images, against a stand-in for the Hub."""

import hashlib
import io
import itertools
import json
import logging
import shutil
import tarfile
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import Imagenette

from data import catalogue, downloads, listing, specs
from data.downloaded_source import Scratch
from data.patience import DownloadError, Patience
from data.prepare import prepare
from data.prepared import PreparedData
from data.records import DatasetError
from data.sources import open_source
from tests.data.standin_hub import Fault, StandInHub

PATIENCE = Patience(
    attempts=4, first_wait=0.01, longest_wait=0.02, longest_asked=0.1, stall_seconds=1.0
)
Parquet = Callable[..., bytes]


@pytest.fixture
def parquet() -> Parquet:
    """Make a Parquet file of images whose red is given, as the Hub's data sets have them."""

    def make(
        reds: range,
        *,
        names: list[str] | None = None,
        words: bool = False,
        column: str = "image",
        labels: bool = True,
    ) -> bytes:
        names = names or ["cat", "dog"]
        pictures = []
        for red in reds:
            file = io.BytesIO()
            Image.new("RGB", (6, 6), (red, 0, 0)).save(file, "PNG")
            pictures.append({"bytes": file.getvalue(), "path": f"{red}.png"})
        content: dict[str, list[object]] = {column: list(pictures)}
        features: dict[str, object] = {column: datasets.Image()}
        if labels:
            content["label"] = [names[r % len(names)] if words else r % len(names) for r in reds]
            features["label"] = (
                datasets.Value("string") if words else datasets.ClassLabel(names=names)
            )
        file = io.BytesIO()
        datasets.Dataset.from_dict(content, features=datasets.Features(features)).to_parquet(file)
        return file.getvalue()

    return make


def get(spec: str, directory: Path) -> catalogue.Catalogue:
    (found,) = downloads.download(
        [spec], directory, report=lambda done, total: None, patience=PATIENCE
    )
    return found


def reds(spec: str, directory: Path, split: str = "train", start: int = 0) -> list[int]:
    scratch = Scratch(directory=directory.parent / "scratch", patience=PATIENCE)
    source = open_source(spec, downloads=directory, scratch=scratch)
    found = []
    for record in source.records("train" if split == "train" else "test", start):
        assert isinstance(record.image, bytes)
        with Image.open(io.BytesIO(record.image)) as picture:
            pixel = picture.getpixel((0, 0))
        assert isinstance(pixel, tuple)
        assert record.label == pixel[0] % 2
        found.append(pixel[0])
    return found


@pytest.fixture
def main_branch(hub: StandInHub, parquet: Parquet) -> StandInHub:
    """`a/b` with two training files and a test file, and `a/configs` with a card."""
    files = {
        "data/train-00000-of-00002.parquet": parquet(range(5)),
        "data/train-00001-of-00002.parquet": parquet(range(5, 8)),
        "data/test-00000-of-00001.parquet": parquet(range(8, 10)),
    }
    hub.add("a/b", {"README.md": b"---\n---\n", **files}, revisions=("main", "v1"))
    card = (
        "---\nconfigs:\n- config_name: big\n  data_files:\n  - split: train\n"
        "    path: big/*.parquet\n- config_name: small\n  data_files:\n  - split: train\n"
        "    path: small/*.parquet\n---\n"
    )
    hub.add(
        "a/configs",
        {
            "README.md": card.encode(),
            "big/x.parquet": parquet(range(4)),
            "small/x.parquet": parquet(range(4, 6)),
        },
    )
    return hub


def test_a_data_set_on_the_hub_is_downloaded_with_its_splits_and_classes(
    main_branch: StandInHub, tmp_path: Path
) -> None:
    found = get("hub:a/b", tmp_path / "d")
    assert found.counts == {"train": 8, "test": 2}
    assert found.class_names == ["cat", "dog"]
    assert found.origin == "a/b@" + "c" * 40
    assert reds("hub:a/b", tmp_path / "d") == list(range(8))
    assert reds("hub:a/b", tmp_path / "d", start=6) == [6, 7]
    assert reds("hub:a/b", tmp_path / "d", "test") == [8, 9]
    assert catalogue.verify(tmp_path / "d") is None


def test_afterwards_nothing_is_asked_for_any_more(main_branch: StandInHub, tmp_path: Path) -> None:
    get("hub:a/b", tmp_path / "d")
    main_branch.close()
    main_branch.requests.clear()
    get("hub:a/b", tmp_path / "d")
    assert reds("hub:a/b", tmp_path / "d") == list(range(8))
    assert main_branch.requests == []


def test_a_configuration_is_chosen_by_name(main_branch: StandInHub, tmp_path: Path) -> None:
    get("hub:a/configs:small", tmp_path / "d")
    assert reds("hub:a/configs:small", tmp_path / "d") == [4, 5]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("hub:a/configs", r"\(big, small\), none was named. Write hub:a/configs:big"),
        ("hub:a/configs:tiny", r"\(big, small\), 'tiny' is none of them"),
        ("hub:a/nobody", "There must be a data set a/nobody on the Hub.*HF_TOKEN"),
        ("hub:a/b@v9", "a/b must have the revision v9"),
        ("hub:a/text", "must have Parquet files.*try hub:a/text@refs/convert/parquet"),
    ],
)
def test_a_mistake_is_said_once_and_not_tried_again(
    main_branch: StandInHub, tmp_path: Path, spec: str, message: str
) -> None:
    main_branch.add("a/text", {"README.md": b"# nothing here\n"})
    with pytest.raises(DatasetError, match=message):
        get(spec, tmp_path)
    asked = [path for _, path, _, _ in main_branch.requests if "/revision/v9" in path]
    assert len(asked) <= 1


def test_the_layout_of_the_hubs_conversion_is_read(
    hub: StandInHub, parquet: Parquet, tmp_path: Path
) -> None:
    hub.add(
        "a/b",
        {
            "small/train/0000.parquet": parquet(range(3)),
            "small/train/0001.parquet": parquet(range(3, 5)),
            "small/validation/0000.parquet": parquet(range(5, 7)),
            "big/train/0000.parquet": parquet(range(9)),
            "cut/partial-train/0000.parquet": parquet(range(9)),
        },
        revisions=("main", "refs/convert/parquet"),
    )
    branch = "hub:a/b@refs/convert/parquet"
    found = get(f"{branch}:small", tmp_path / "d")
    assert found.counts == {"train": 5, "test": 2}
    assert reds(f"{branch}:small", tmp_path / "d") == list(range(5))
    with pytest.raises(DatasetError, match=r"\(big, cut, small\), none was named"):
        get(branch, tmp_path / "e")
    with pytest.raises(DatasetError, match="converted only a part of cut"):
        get(f"{branch}:cut", tmp_path / "f")


def test_the_official_validation_images_are_the_test_images(
    hub: StandInHub, parquet: Parquet, tmp_path: Path
) -> None:
    hub.add(
        "a/b",
        {
            f"data/{split}-00000-of-00001.parquet": parquet(range(first, first + 2))
            for split, first in (("train", 0), ("validation", 2), ("test", 4))
        },
    )
    get("hub:a/b", tmp_path / "d")
    assert reds("hub:a/b", tmp_path / "d", "test") == [2, 3]


@pytest.mark.parametrize("token", [None, "hf_stranger"])
def test_terms_that_are_not_accepted_are_said_with_page_and_variable(
    hub: StandInHub,
    parquet: Parquet,
    tmp_path: Path,
    token: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub.add(
        "ILSVRC/imagenet-1k",
        {"data/train-00000-of-00001.parquet": parquet(range(2))},
        gated_for="hf_mine",
    )
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    page = f"{hub.url}/datasets/ILSVRC/imagenet-1k"
    lacks = "has not, or the token" if token else "there is no token"
    with pytest.raises(DatasetError, match=f"{lacks}.*Open {page}.*HF_TOKEN"):
        get("imagenet-1k", tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    assert get("imagenet-1k", tmp_path).counts == {"train": 2}


def test_terms_of_any_other_data_set_are_said_the_same_way(
    main_branch: StandInHub, tmp_path: Path
) -> None:
    main_branch.repositories["a/b"].gated_for = "hf_mine"
    with pytest.raises(DatasetError, match=r"a/b is given only to those.*there is no token"):
        get("hub:a/b", tmp_path)


def test_the_first_error_of_many_files_ends_the_reading_of_all(
    hub: StandInHub, parquet: Parquet, tmp_path: Path
) -> None:
    content = parquet(range(2))
    hub.add("a/b", {f"data/train-{n:05d}-of-00060.parquet": content for n in range(60)})
    hub.faults.append(Fault("status", 403, times=999))
    with pytest.raises(DatasetError, match="the server answered 403"):
        get("hub:a/b", tmp_path)
    assert len(hub.content_requests()) < 30


def test_what_is_too_large_to_keep_is_fetched_file_by_file_and_deleted(
    main_branch: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "KEEP_BYTES", 10)
    found = get("hub:a/b", tmp_path / "d")
    assert not found.kept
    assert not (tmp_path / "d" / "files").exists()
    scratch = Scratch(directory=tmp_path / "scratch", patience=PATIENCE)
    source = open_source("hub:a/b", downloads=tmp_path / "d", scratch=scratch)
    most = 0
    for _ in source.records("train"):
        most = max(most, len(list(scratch.directory.rglob("*.parquet"))))
    assert 1 <= most <= 2
    assert list(scratch.directory.rglob("*.parquet")) == []


def test_a_resume_fetches_only_the_files_that_it_reads(
    main_branch: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "KEEP_BYTES", 10)
    get("hub:a/b", tmp_path / "d")
    main_branch.requests.clear()
    assert reds("hub:a/b", tmp_path / "d", start=6) == [6, 7]
    assert len(main_branch.content_requests()) == 1


def test_reading_that_ends_early_leaves_no_thread_behind(
    main_branch: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "KEEP_BYTES", 10)
    get("hub:a/b", tmp_path / "d")
    scratch = Scratch(directory=tmp_path / "scratch", patience=PATIENCE)
    records = open_source("hub:a/b", downloads=tmp_path / "d", scratch=scratch).records("train")
    assert len(list(itertools.islice(records, 2))) == 2
    records.close()  # type: ignore[attr-defined]
    assert not [t for t in threading.enumerate() if t.name.startswith("fetch")]


def test_preparing_from_files_that_are_not_kept_gives_the_same_images(
    main_branch: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prints = []
    for name, keep in (("kept", 10**9), ("passing", 10)):
        monkeypatch.setattr(listing, "KEEP_BYTES", keep)
        get("hub:a/b", tmp_path / name)
        main_branch.faults.append(Fault("cut", 700))
        scratch = Scratch(directory=tmp_path / "scratch", patience=PATIENCE)
        source = open_source("hub:a/b", downloads=tmp_path / name, scratch=scratch)
        done = prepare(
            source, tmp_path / f"{name}-p", side=4, report=lambda done, total: None, workers=1
        )
        prints.append(done.fingerprint)
        main_branch.faults.clear()
    assert prints[0] == prints[1]
    labels = PreparedData.open(tmp_path / "kept-p").train.labels
    assert labels is not None
    np.testing.assert_array_equal(labels, [0, 1] * 4)


def test_a_hub_that_fails_for_a_while_is_waited_for(
    main_branch: StandInHub, tmp_path: Path
) -> None:
    main_branch.api_faults += [Fault("status", 429, {"Retry-After": "0"}), Fault("status", 503)]
    main_branch.faults += [Fault("status", 500), Fault("cut", 9), Fault("flip")]
    get("hub:a/b", tmp_path / "d")
    assert reds("hub:a/b", tmp_path / "d") == list(range(8))


def test_a_card_that_cannot_be_fetched_is_not_taken_for_none(
    main_branch: StandInHub, tmp_path: Path
) -> None:
    main_branch.card_faults.append(Fault("status", 503, times=3))
    get("hub:a/configs:small", tmp_path)
    assert reds("hub:a/configs:small", tmp_path) == [4, 5]


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


def test_a_hub_that_is_down_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="list of files of a/b must be downloaded, 4 attempts"):
        get("hub:a/b", tmp_path)


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


def test_words_are_classes_in_alphabetical_order(
    hub: StandInHub, parquet: Parquet, tmp_path: Path
) -> None:
    hub.add("a/b", {"x.parquet": parquet(range(4), words=True, names=["cat", "dog"])})
    assert get("hub:a/b", tmp_path).class_names == ["cat", "dog"]
    assert reds("hub:a/b", tmp_path) == [0, 1, 2, 3]


def test_images_without_labels_are_fine(hub: StandInHub, parquet: Parquet, tmp_path: Path) -> None:
    hub.add("a/b", {"x.parquet": parquet(range(4), labels=False, column="photo")})
    found = get("hub:a/b", tmp_path)
    assert found.class_names is None
    source = open_source("hub:a/b", downloads=tmp_path)
    assert [record.label for record in source.records("train")] == [None] * 4


def test_files_that_do_not_fit_each_other_are_refused(
    hub: StandInHub, parquet: Parquet, tmp_path: Path
) -> None:
    hub.add(
        "a/b",
        {
            "data/train-00000-of-00001.parquet": parquet(range(2)),
            "data/test-00000-of-00001.parquet": parquet(range(2), names=["dog", "cat"]),
        },
    )
    with pytest.raises(DatasetError, match=r"same columns and classes in all files.*test-00000"):
        get("hub:a/b", tmp_path)


def test_what_is_no_table_is_refused(hub: StandInHub, tmp_path: Path) -> None:
    hub.add("a/b", {"x.parquet": b"<html>" * 100})
    with pytest.raises(DatasetError, match=r"x\.parquet must be a Parquet file"):
        get("hub:a/b", tmp_path)


def test_a_name_from_the_hub_that_leads_elsewhere_is_refused(
    hub: StandInHub, parquet: Parquet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("a/b", {"../train/0000.parquet": parquet(range(2))})
    with pytest.raises(DatasetError, match=r"must have plain names of files.*leads upwards"):
        get("hub:a/b", tmp_path)


def test_one_file_of_a_web_server(hub: StandInHub, parquet: Parquet, tmp_path: Path) -> None:
    hub.add("a/b", {"x.parquet": parquet(range(4))})
    spec = f"parquet:{hub.url}/plain/a/b/-/x.parquet"
    get(spec, tmp_path)
    assert reds(spec, tmp_path) == [0, 1, 2, 3]
    with pytest.raises(DatasetError, match="must have no wildcards"):
        get(f"parquet:{hub.url}/*.parquet", tmp_path / "e")


def test_a_store_that_fsspec_knows(parquet: Parquet, tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    store.pipe(
        {
            "/bucket/train-0.parquet": parquet(range(4)),
            "/bucket/train-1.parquet": parquet(range(4, 6)),
            "/bucket/test-0.parquet": parquet(range(6, 8)),
        }
    )
    spec = "parquet:memory://bucket/*.parquet"
    found = get(spec, tmp_path)
    assert found.counts == {"train": 6, "test": 2}
    assert reds(spec, tmp_path) == list(range(6))
    with pytest.raises(DatasetError, match="none match"):
        get("parquet:memory://bucket/*.pq", tmp_path / "e")


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_store_whose_package_is_missing_is_said(tmp_path: Path, scheme: str) -> None:
    with pytest.raises(DatasetError, match=r"needs one more package.*(s3fs|gcsfs)"):
        get(f"parquet:{scheme}://bucket/*.parquet", tmp_path)


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
