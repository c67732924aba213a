import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data import prepare as module
from data.manifest import FILE_NAME
from data.prepared import PreparedData, PreparedSplit, verify
from data.records import DatasetError

MakePrepared = Callable[..., PreparedData]


@pytest.fixture
def directory(make_prepared: MakePrepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Prepared images in shards of 4: 4 + 4 + 2 for training and 3 for testing."""
    monkeypatch.setattr(module, "SHARD_IMAGES", 4)
    make_prepared(10, 3)
    return tmp_path / "prepared"


def test_images_are_gathered_across_shards_in_the_order_asked_for() -> None:
    rng = np.random.default_rng(0)
    everything = rng.integers(0, 256, (10, 3, 3, 3), dtype=np.uint8)
    split = PreparedSplit([everything[:4], everything[4:5], everything[5:]], None)
    assert len(split) == 10
    assert split.side == 3
    for indices in ([9, 0, 4, 4, 3, 5], [7], list(range(10)), []):
        got = split.gather(np.array(indices, dtype=np.int64))
        assert got.dtype == np.uint8
        assert np.array_equal(got, everything[indices])


@pytest.mark.parametrize("indices", [[-1], [0, 10]])
def test_numbers_out_of_range_are_refused(indices: list[int]) -> None:
    split = PreparedSplit([np.zeros((10, 1, 1, 3), dtype=np.uint8)], None)
    with pytest.raises(IndexError, match="numbered 0 to 9"):
        split.gather(np.array(indices))


def test_pixels_stay_on_disk_until_they_are_asked_for(directory: Path) -> None:
    train = PreparedData.open(directory).train
    assert all(isinstance(shard, np.memmap) for shard in train._shards)


def test_a_directory_that_was_not_touched_is_sound(directory: Path) -> None:
    assert verify(directory, full=False) is None
    assert verify(directory, full=True) is None


def test_a_directory_without_a_manifest_is_not_finished(directory: Path) -> None:
    (directory / FILE_NAME).unlink()
    assert "manifest.json" in str(verify(directory, full=False))
    with pytest.raises(DatasetError, match=r"no manifest\.json\. Run the prepare-data stage"):
        PreparedData.open(directory)


@pytest.mark.parametrize(
    "content", ["", "{}", "[]", '{"shards": 3}', '{"shards": {"train": [{}]}}']
)
def test_a_damaged_manifest_is_told_apart(directory: Path, content: str) -> None:
    (directory / FILE_NAME).write_text(content)
    assert "reading it failed" in str(verify(directory, full=False))
    with pytest.raises(DatasetError, match=r"Delete it and run the prepare-data stage"):
        PreparedData.open(directory)


def test_a_manifest_of_another_format_is_refused(directory: Path) -> None:
    path = directory / FILE_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    assert "must have format" in str(verify(directory, full=False))


@pytest.mark.parametrize("name", ["train-00001.npy", "train-00001.json"])
def test_a_missing_file_is_named(directory: Path, name: str) -> None:
    (directory / name).unlink()
    assert verify(directory, full=False) == f"{name} is missing"
    with pytest.raises(DatasetError, match="must be a whole shard"):
        PreparedData.open(directory)


@pytest.mark.parametrize("length", [0, 100, -1])
def test_a_shard_cut_short_is_named(directory: Path, length: int) -> None:
    path = directory / "test-00000.npy"
    path.write_bytes(path.read_bytes()[:length])
    assert "test-00000.npy has" in str(verify(directory, full=False))
    with pytest.raises(DatasetError, match=r"test-00000\.npy must be a whole shard"):
        PreparedData.open(directory)


def test_one_flipped_bit_is_found_by_the_full_check_even_with_the_old_time(
    directory: Path,
) -> None:
    path = directory / "train-00002.npy"
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert "written to" in str(verify(directory, full=False))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert verify(directory, full=False) is None
    assert verify(directory, full=True) == "train-00002.npy has other pixels"


def test_changed_labels_are_found(directory: Path) -> None:
    path = directory / "train-00000.json"
    content = json.loads(path.read_text())
    content["labels"][0] = 2
    path.write_text(json.dumps(content))
    assert verify(directory, full=False) == "train-00000.json has changed"


@pytest.mark.parametrize(
    ("key", "value"),
    [("fingerprint", "0" * 64), ("class_names", ["x", "y", "z"]), ("side", 6)],
)
def test_an_edited_manifest_is_found(directory: Path, key: str, value: object) -> None:
    path = directory / FILE_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    assert "was edited" in str(verify(directory, full=False))


def test_shards_in_another_order_are_found(directory: Path) -> None:
    path = directory / FILE_NAME
    content = json.loads(path.read_text())
    content["shards"]["train"].reverse()
    path.write_text(json.dumps(content))
    assert "was edited" in str(verify(directory, full=False))
