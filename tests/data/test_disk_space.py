"""The sample by which the size of images as JPEG is estimated."""

from pathlib import Path

import pytest

from data import listing
from data.disk_space import SAMPLE
from data.downloaded_source import Scratch
from data.prepare import prepare
from data.records import spread
from data.sources import open_source
from tests.data.standin_data import PATIENCE, get, parquet
from tests.data.standin_hub import StandInHub


@pytest.mark.parametrize("total", [0, 1, 5, 11, 64, 71, 9469])
def test_a_sample_is_spread_evenly_and_takes_no_image_twice(total: int) -> None:
    places = list(spread(total, SAMPLE))
    taken = [start + number for start, length in places for number in range(length)]
    assert len(set(taken)) == len(taken) > min(total, SAMPLE) - 8
    assert all(0 <= number < total for number in taken)
    assert not taken or max(taken) >= total * 7 // 8


def test_of_what_is_not_kept_one_file_is_fetched_once_for_sample_and_preparation(
    hub: StandInHub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Eight files with images that get larger: the sample used to fetch all of them."""
    monkeypatch.setattr(listing, "KEEP_BYTES", 10)
    files = {f"data/train-{n:05d}-of-00008.parquet": parquet(range(n, n + 9)) for n in range(8)}
    hub.add("a/b", files)
    get("hub:a/b", tmp_path / "d")
    scratch = Scratch(directory=tmp_path / "scratch", patience=PATIENCE)
    source = open_source("hub:a/b", downloads=tmp_path / "d", scratch=scratch)
    hub.requests.clear()
    names = [record.name for record in source.sample("train", 4)]
    assert [name.partition(" ")[0] for name in names] == [f"train/{n}" for n in (0, 2, 4, 6)]
    assert len(hub.content_requests()) == 1
    assert [path.name for path in scratch.directory.rglob("*.*")] == [
        "train-00000-of-00008.parquet"
    ]

    caplog.set_level("INFO", logger="data")
    prepare(
        source,
        tmp_path / "p",
        side=4,
        report=lambda done, total: None,
        workers=1,
        pixel_format="jpeg",
    )
    assert len(hub.content_requests()) == 8, "each file once, the first one too"
    left = [path.name for path in scratch.directory.rglob("*.*")]
    assert left == ["train-00007-of-00008.parquet"], "whose last image was the last one wanted"
    assert "by a sample of its first file" in caplog.text


def test_where_test_images_come_from_elsewhere_the_training_images_are_sampled(
    hub: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "KEEP_BYTES", 10)
    files = {f"data/train-{n:05d}-of-00002.parquet": parquet(range(n, n + 9)) for n in range(2)}
    hub.add("a/b", files)
    get("hub:a/b", tmp_path / "d")
    scratch = Scratch(directory=tmp_path / "scratch", patience=PATIENCE)
    source = open_source("hub:a/b", "hub:a/b", downloads=tmp_path / "d", scratch=scratch)
    assert source.sample_place == "its first file"
    hub.requests.clear()
    assert len(list(source.sample("train", 4))) == 4
    assert len(hub.content_requests()) == 1
