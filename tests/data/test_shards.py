from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from data.shards import (
    describe,
    digest_of,
    read_shard,
    write_json,
    write_pixels,
    write_shard_record,
)

Images = list[NDArray[np.uint8]]


@pytest.fixture
def images() -> Images:
    return list(np.random.default_rng(0).integers(0, 256, (7, 3, 3, 3), dtype=np.uint8))


@pytest.mark.parametrize("most", [7, 8, 4096, 10**12])
def test_numpy_reads_what_was_written_even_if_more_was_announced(
    tmp_path: Path, images: Images, most: int
) -> None:
    path = tmp_path / "train-00000.npy"
    assert write_pixels(path, images, side=3, most=most) == 7
    assert np.array_equal(np.load(path), np.stack(images))
    assert path.stat().st_size == np.load(path, mmap_mode="r").offset + 7 * 27


def test_a_shard_that_fails_half_way_leaves_nothing_that_counts(
    tmp_path: Path, images: Images
) -> None:
    def failing() -> Iterator[NDArray[np.uint8]]:
        yield from images[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_pixels(tmp_path / "train-00000.npy", failing(), side=3, most=7)
    assert [path.suffix for path in tmp_path.iterdir()] == [".tmp"]


def test_a_description_comes_back_as_it_was_written(tmp_path: Path, images: Images) -> None:
    path = tmp_path / "test-00002.npy"
    write_pixels(path, images, side=3, most=7)
    shard = describe(path, made_from="abc", images=7, labels=[1, 0] * 3 + [2], skipped=[])
    write_shard_record(tmp_path, shard)
    assert read_shard(tmp_path, "test-00002") == shard


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"skipped": 3}', b"\xff\xfe"])
def test_a_damaged_description_counts_as_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "train-00000.json").write_bytes(content)
    assert read_shard(tmp_path, "train-00000") is None
    assert read_shard(tmp_path, "train-00001") is None


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    write_json(path, {"side": 1})
    with pytest.raises(TypeError):
        write_json(path, {"side": object()})
    assert path.read_text() == '{"side": 1}'


def test_digests_follow_values_and_not_the_order_of_keys() -> None:
    assert digest_of({"a": 1, "b": [2, None]}) == digest_of({"b": [2, None], "a": 1})
    different = [{"a": 1}, {"a": "1"}, {"a": [1]}, {"b": 1}, ["a", 1], None, {}]
    assert len({digest_of(content) for content in different}) == len(different)
