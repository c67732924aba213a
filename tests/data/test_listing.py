"""What is known of a remote source before its images are fetched."""

import sys
import time
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
from fsspec.registry import _registry

from data.listing import list_source
from data.records import DatasetError
from tests.data.standin_data import PATIENCE, get, parquet, reds
from tests.data.standin_hub import Fault, StandInHub


def test_the_first_error_of_many_files_ends_the_reading_of_all(
    hub: StandInHub, tmp_path: Path
) -> None:
    content = parquet(range(2))
    hub.add("a/b", {f"data/train-{n:05d}-of-00060.parquet": content for n in range(60)})
    hub.faults.append(Fault("status", 403, times=999))
    with pytest.raises(DatasetError, match="the server answered 403"):
        get("hub:a/b", tmp_path)
    assert len(hub.content_requests()) < 30


def test_a_stop_ends_the_listing_while_a_server_is_silent(hub: StandInHub) -> None:
    files = {f"things/{part}/0000.parquet": parquet(range(2)) for part in ("train", "test")}
    hub.add("a/b", files, revisions=("main", "refs/convert/parquet"))
    hub.faults.append(Fault("stall", times=99))
    patience = replace(PATIENCE, stall_seconds=5.0)
    asked = 0.0

    def stop() -> bool:
        nonlocal asked
        if hub.content_requests():
            asked = asked or time.monotonic()
        return asked > 0

    with pytest.raises(InterruptedError, match="the descriptions of 2 files"):
        list_source("hub:a/b@refs/convert/parquet", patience, stop)
    assert time.monotonic() - asked < 1


def test_files_that_do_not_fit_each_other_are_refused(hub: StandInHub, tmp_path: Path) -> None:
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
    hub: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("a/b", {"../train/0000.parquet": parquet(range(2))})
    with pytest.raises(DatasetError, match=r"must have plain names of files.*leads upwards"):
        get("hub:a/b", tmp_path)


def test_one_file_of_a_web_server(hub: StandInHub, tmp_path: Path) -> None:
    hub.add("a/b", {"x.parquet": parquet(range(4))})
    spec = f"parquet:{hub.url}/plain/a/b/-/x.parquet"
    get(spec, tmp_path)
    assert reds(spec, tmp_path) == [0, 1, 2, 3]
    with pytest.raises(DatasetError, match="must have no wildcards"):
        get(f"parquet:{hub.url}/*.parquet", tmp_path / "e")


def test_a_store_that_fsspec_knows(tmp_path: Path) -> None:
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


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_a_store_whose_package_is_missing_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(_registry, scheme, raising=False)
    with pytest.raises(DatasetError, match=rf"needs one more package.*{package}"):
        get(f"parquet:{scheme}://bucket/*.parquet", tmp_path)
