"""Reading what was downloaded, or what is fetched as it is read."""

import itertools
import threading
from pathlib import Path

import numpy as np
import pytest

from data import listing
from data.downloaded_source import Scratch
from data.prepare import prepare
from data.prepared import PreparedData
from data.sources import open_source
from tests.data.standin_data import PATIENCE, get, parquet, reds
from tests.data.standin_hub import Fault, StandInHub


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


def test_words_are_classes_in_alphabetical_order(hub: StandInHub, tmp_path: Path) -> None:
    hub.add("a/b", {"x.parquet": parquet(range(4), words=True, names=["cat", "dog"])})
    assert get("hub:a/b", tmp_path).class_names == ["cat", "dog"]
    assert reds("hub:a/b", tmp_path) == [0, 1, 2, 3]


def test_images_without_labels_are_fine(hub: StandInHub, tmp_path: Path) -> None:
    hub.add("a/b", {"x.parquet": parquet(range(4), labels=False, column="photo")})
    found = get("hub:a/b", tmp_path)
    assert found.class_names is None
    source = open_source("hub:a/b", downloads=tmp_path)
    assert [record.label for record in source.records("train")] == [None] * 4
