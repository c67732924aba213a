"""Images stored as JPEG keep the promises that raw ones keep."""

import json
import shutil
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from data import prepare as module
from data.canary import NoiseSource
from data.decode import decode_square
from data.disk_space import estimate_bytes
from data.jpeg_shards import JpegShard, write_jpegs
from data.manifest import FILE_NAME, Fingerprint, Manifest
from data.prepare import prepare
from data.prepared import PreparedData, verify
from data.records import DatasetError, Record, Source
from data.shards import SUFFIXES

SIDE = 12
TRAIN, TEST = 11, 3


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD_IMAGES", 4)


@pytest.fixture
def source() -> Source:
    return NoiseSource(train=TRAIN, test=TEST, long_side_px=40, seed=0)


def run(source: Source, directory: Path, **options: Any) -> Manifest:
    options = {
        "side": SIDE,
        "report": lambda done, total: None,
        "workers": 2,
        "pixel_format": "jpeg",
        **options,
    }
    return prepare(source, directory, **options)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("*.jpegs")}


def expected(source: Source) -> NDArray[np.uint8]:
    return np.stack([decode_square(record.image, SIDE) for record in source.records("train")])


def test_both_formats_give_the_same_images_apart_from_noise(source: Source, tmp_path: Path) -> None:
    jpeg = run(source, tmp_path / "jpeg")
    raw = run(source, tmp_path / "raw", pixel_format="raw")
    assert jpeg.fingerprint != raw.fingerprint
    assert jpeg.made_from != raw.made_from
    assert jpeg.counts == raw.counts
    assert verify(tmp_path / "jpeg", full=True) is None
    order = np.array([9, 0, 4, 4, 3, 10, 5, 8])
    one, other = (PreparedData.open(tmp_path / name).train for name in ("jpeg", "raw"))
    assert len(one) == len(other) == TRAIN
    assert one.side == other.side == SIDE
    difference = np.abs(one.gather(order).astype(int) - other.gather(order))
    assert difference.mean() < 5, "another image differs by 40"
    assert difference.max() < 40
    assert np.array_equal(other.gather(order), expected(source)[order])


def test_threads_and_batches_do_not_change_what_is_read(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(source, tmp_path)
    order = np.random.default_rng(0).integers(0, TRAIN, 50)
    one_by_one = [PreparedData.open(tmp_path).train.gather(order[[row]]) for row in range(50)]
    for processors in (1, 2, 5, 64):
        monkeypatch.setattr("data.prepared.available_processors", lambda count=processors: count)
        train = PreparedData.open(tmp_path).train
        assert np.array_equal(train.gather(order), np.concatenate(one_by_one))
        assert train.gather(order[:0]).shape == (0, SIDE, SIDE, 3)


def test_it_goes_on_after_its_last_whole_shard(source: Source, tmp_path: Path) -> None:
    whole = run(source, tmp_path / "whole")
    cut = tmp_path / "cut"

    def stop(done: int, total: int) -> None:
        if done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source, cut, report=stop)
    kept = {path.name: path.stat().st_mtime_ns for path in cut.glob("*.jpegs")}
    assert sorted(kept) == ["train-00000.jpegs", "train-00001.jpegs"]
    assert run(source, cut).fingerprint == whole.fingerprint
    assert {name: (cut / name).stat().st_mtime_ns for name in kept} == kept
    assert contents(cut) == contents(tmp_path / "whole")
    assert not list(cut.glob("*.tmp"))


@pytest.mark.parametrize("place", [100, -1])
def test_a_flipped_bit_is_found_and_mended(source: Source, tmp_path: Path, place: int) -> None:
    whole = run(source, tmp_path)
    path = tmp_path / "train-00001.jpegs"
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    assert "written to" in str(verify(tmp_path, full=False))
    assert verify(tmp_path, full=True) == "train-00001.jpegs has other pixels"
    assert run(source, tmp_path).fingerprint == whole.fingerprint
    assert verify(tmp_path, full=True) is None


def test_a_shard_cut_short_is_refused(source: Source, tmp_path: Path) -> None:
    run(source, tmp_path)
    path = tmp_path / "train-00001.jpegs"
    for content in (path.read_bytes()[:-8], path.read_bytes()[:-3], path.read_bytes()[:5], b""):
        path.write_bytes(content)
        assert "train-00001.jpegs has" in str(verify(tmp_path, full=False))
        with pytest.raises(DatasetError, match=r"train-00001\.jpegs must be a whole shard"):
            PreparedData.open(tmp_path)


def test_an_image_that_cannot_be_decoded_is_named(source: Source, tmp_path: Path) -> None:
    run(source, tmp_path)
    path = tmp_path / "train-00001.jpegs"
    content = bytearray(path.read_bytes())
    content[:300] = bytes(300)
    path.write_bytes(content)
    train = PreparedData.open(tmp_path).train
    with pytest.raises(DatasetError, match=r"train-00001\.jpegs must be .* its image 0 cannot be"):
        train.gather(np.arange(TRAIN))


def test_formats_do_not_mix(source: Source, tmp_path: Path) -> None:
    raw, jpeg = tmp_path / "raw", tmp_path / "jpeg"
    run(source, raw, pixel_format="raw")
    run(source, jpeg)
    with pytest.raises(DatasetError, match=r"in one format, jpeg .* 4 raw files such as test-0000"):
        run(source, raw)
    with pytest.raises(DatasetError, match=r"in one format, raw was asked for .* 4 jpeg files"):
        run(source, jpeg, pixel_format="raw")
    shutil.copy(raw / "train-00000.json", jpeg)
    assert verify(jpeg, full=False) == "train-00000.json has changed"
    with pytest.raises(DatasetError, match="does not fit its description"):
        PreparedData.open(jpeg)


def test_the_fingerprint_tells_formats_apart_whatever_the_files() -> None:
    assert len({Fingerprint(SIDE, None, stored).hexdigest() for stored in SUFFIXES}) == 2


def test_the_manifest_says_which_format(source: Source, tmp_path: Path) -> None:
    run(source, tmp_path)
    path = tmp_path / FILE_NAME
    content = json.loads(path.read_text())
    assert content["pixel_format"] == "jpeg"
    path.write_text(json.dumps(content | {"pixel_format": "webp"}))
    assert "images stored as webp" in str(verify(tmp_path, full=False))
    del content["pixel_format"]  # as manifests were before there was a choice
    path.write_text(json.dumps(content))
    assert "npy is missing" in str(verify(tmp_path, full=False))


def test_an_odd_side_is_refused_before_the_work(tmp_path: Path) -> None:
    class Unread(NoiseSource):
        def records(self, split: str, start: int = 0) -> Iterator[Record]:
            raise AssertionError("the source was read")

    with pytest.raises(DatasetError, match="even side, got 13 px"):
        run(Unread(train=3, test=0, long_side_px=20, seed=0), tmp_path, side=13)


def test_the_estimate_is_above_what_is_written_and_not_by_much(
    source: Source, tmp_path: Path
) -> None:
    run(source, tmp_path, side=32)
    written = sum(path.stat().st_size for path in tmp_path.glob("*.jpegs"))
    estimate = estimate_bytes(source, 32, "jpeg")
    assert written < estimate < 1.25 * written
    assert estimate < estimate_bytes(source, 32)


def test_space_is_logged_and_checked_before_the_work(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    caplog.set_level("INFO", logger="data")
    run(source, tmp_path)
    assert "Preparing 14 images as jpeg needs about 0.00 GiB" in caplog.text
    caplog.clear()
    run(source, tmp_path)
    assert "needs about" not in caplog.text, "all of it was there"

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**6, 10**6 - 99, 99))
    (tmp_path / "train-00000.jpegs").unlink()
    with pytest.raises(DatasetError, match="prepare smaller images"):
        run(source, tmp_path)
    with pytest.raises(DatasetError, match=r"set data\.format=jpeg"):
        run(source, tmp_path / "raw", pixel_format="raw")


def test_a_shard_without_images_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "train-00000.jpegs"
    assert write_jpegs(path, []) == 0
    assert len(JpegShard(path, 0, SIDE)) == 0
