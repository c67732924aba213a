"""What a cache gives is what was put, whoever put it, and its folder never outgrows its limit."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data import shard_cache
from data.records import DatasetError
from data.shard_cache import CacheSpace, ShardCache, digest_of_image

COUNT, SIZE = 40, 30_000
CONTENTS = {number: np.random.default_rng(number).bytes(SIZE - number) for number in range(COUNT)}
ALL = np.arange(COUNT, dtype=np.int64)

Open = Callable[..., ShardCache]


@pytest.fixture
def opened(tmp_path: Path) -> Open:
    """Open a set of 40 images of about 30 kB each: `(limit in bytes, name)`."""

    def open_(limit: int | None = 10**9, name: str = "set") -> ShardCache:
        sizes = np.array([len(content) for content in CONTENTS.values()], dtype=np.int64)
        digests = np.array(
            [digest_of_image(content) for content in CONTENTS.values()], dtype=np.uint64
        )
        return ShardCache(CacheSpace(tmp_path / "cache", limit), name, sizes, digests)

    return open_


def kept(cache: ShardCache) -> list[int]:
    return [number for number in range(COUNT) if cache.get(number) == CONTENTS[number]]


def bytes_on_disk(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def test_what_is_kept_comes_back_to_whoever_opens_it(opened: Open) -> None:
    cache, other = opened(), opened()
    cache.put({number: CONTENTS[number] for number in (7, 3, 39)})
    assert kept(cache) == kept(other) == kept(opened()) == [3, 7, 39]
    assert other.missing(np.array([39, 5, 3, 0])).tolist() == [5, 0]


def test_another_process_finds_it(opened: Open, tmp_path: Path) -> None:
    cache = opened()
    code = (
        "import numpy as np; from tests.data.test_shard_cache import CONTENTS, COUNT;"
        "from data.shard_cache import CacheSpace, ShardCache, digest_of_image; from pathlib import"
        " Path; import sys;"
        "sizes = np.array([len(c) for c in CONTENTS.values()]);"
        "digests = np.array([digest_of_image(c) for c in CONTENTS.values()], dtype=np.uint64);"
        "cache = ShardCache(CacheSpace(Path(sys.argv[1]), 10**9), 'set', sizes, digests);"
        "cache.put({5: CONTENTS[5]})"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "cache")],
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert kept(cache) == [5], "an open cache sees what others add"


@pytest.mark.parametrize("limit", [0, 1, 200_000, 600_000])
def test_the_folder_does_not_outgrow_its_limit(opened: Open, tmp_path: Path, limit: int) -> None:
    cache = opened(limit)
    for number in reversed(range(COUNT)):
        cache.put({number: CONTENTS[number]})
    assert cache.is_full
    count = len(kept(cache))
    assert count >= limit // (SIZE + 2**13) - 1, "space is used"
    assert kept(cache) == list(range(COUNT - count, COUNT)), "what came first, and nothing else"
    # The files of the folder itself, locks and the map, are some blocks.
    assert bytes_on_disk(tmp_path / "cache") <= limit + 2**13


def test_two_that_fill_one_folder_keep_to_its_limit_together(opened: Open, tmp_path: Path) -> None:
    one, other = opened(600_000, "one"), opened(600_000, "other")
    for number in range(COUNT):
        one.put({number: CONTENTS[number]})
        other.put({number: CONTENTS[number]})
    assert 5 <= len(kept(one)) <= 10
    assert 5 <= len(kept(other)) <= 10
    assert bytes_on_disk(tmp_path / "cache") <= 600_000 + 2**13


def test_other_things_in_the_folder_are_left_alone(opened: Open, tmp_path: Path) -> None:
    """A user's own folders beside the sets, also where there is no space."""
    mine = tmp_path / "cache" / "my-photos"
    mine.mkdir(parents=True)
    (mine / "images").write_bytes(bytes(400_000))
    (mine / "album").mkdir()
    empty = tmp_path / "cache" / "empty"
    empty.mkdir()
    one = opened(400_000, "one")
    for number in range(COUNT):  # one by one, so that hardly any space is left
        one.put({number: CONTENTS[number]})
    assert len(kept(one)) > 8, "what is not ours takes nothing of the limit"
    del one
    opened(400_000, "other")
    assert not (tmp_path / "cache" / "one").exists(), "this one had to make room"
    assert sorted(path.name for path in mine.iterdir()) == ["album", "images"]
    assert empty.is_dir()


def test_a_damaged_image_is_noticed_and_can_be_put_again(
    opened: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = opened()
    cache.put(CONTENTS)
    with (tmp_path / "cache" / "set" / "images").open("r+b") as file:
        file.seek(2 * SIZE)  # within the third image
        byte = file.read(1)[0]
        file.seek(2 * SIZE)
        file.write(bytes([byte ^ 1]))
    assert cache.get(2) is None
    assert "fetched again" in caplog.text
    assert cache.missing(ALL).tolist() == [2]
    cache.put({2: CONTENTS[2]})
    assert kept(cache) == list(range(COUNT))


def test_an_image_is_held_against_its_digest_once(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[bytes | memoryview] = []

    def counted(content: bytes | memoryview) -> int:
        held.append(content)
        return digest_of_image(content)

    monkeypatch.setattr(shard_cache, "digest_of_image", counted)
    for cache in (opened(), opened()):  # what another object has read is not taken on trust
        cache.put(CONTENTS)
        for _epoch in range(3):
            assert kept(cache) == list(range(COUNT))
    assert len(held) == 2 * COUNT


def test_an_image_that_is_marked_and_was_never_written_is_noticed(
    opened: Open, tmp_path: Path
) -> None:
    """What a lost machine may leave behind: the mark reached the disk, the image did not."""
    opened()
    (tmp_path / "cache" / "set" / "have").write_bytes(b"\1" * COUNT)
    cache = opened()
    assert cache.missing(ALL).tolist() == []
    assert kept(cache) == []
    assert cache.missing(ALL).tolist() == ALL.tolist()


@pytest.mark.parametrize("leftover", ["images cut short", "no map", "map of another length"])
def test_a_set_whose_beginning_was_cut_off_is_begun_anew(
    opened: Open, tmp_path: Path, leftover: str
) -> None:
    opened().put(CONTENTS)
    folder = tmp_path / "cache" / "set"
    if leftover == "images cut short":
        os.truncate(folder / "images", 10)
    elif leftover == "no map":
        (folder / "have").unlink()
    else:
        (folder / "have").write_bytes(b"\1" * 7)
    cache = opened()
    assert kept(cache) == []
    cache.put({4: CONTENTS[4]})
    assert kept(cache) == [4]


def test_a_full_disk_ends_the_keeping_and_nothing_else(
    opened: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    cache = opened()
    cache.put({1: CONTENTS[1]})

    def full(handle: int, content: bytes, start: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    cache.put({2: CONTENTS[2]})
    assert cache.is_full
    assert kept(cache) == [1]
    assert "Of the 40 images of a set 1 are kept" in caplog.text
    assert "No space left on device" in caplog.text


def test_for_want_of_space_others_go_the_oldest_first(opened: Open, tmp_path: Path) -> None:
    limit = 3_200_000  # for two sets
    for age, name in enumerate(["old", "new"]):
        cache = opened(limit, name)
        cache.put(CONTENTS)
        assert len(kept(cache)) == COUNT
        del cache
        os.utime(tmp_path / "cache" / name / "have", (age, age))
    opened(limit, "newest").put(CONTENTS)
    assert sorted(path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()) == [
        "new",
        "newest",
    ]


def test_a_set_that_is_open_is_not_removed(opened: Open) -> None:
    used = opened(1_700_000, "used")
    used.put(CONTENTS)
    other = opened(1_700_000, "other")
    other.put(CONTENTS)
    assert kept(used) == list(range(COUNT))
    assert 5 <= len(kept(other)) <= 16


def test_a_limit_that_was_lowered_is_kept_to(opened: Open, tmp_path: Path) -> None:
    opened().put(CONTENTS)
    cache = opened(200_000)
    assert kept(cache) == []
    cache.put(CONTENTS)
    assert 3 <= len(kept(cache)) <= 6
    assert bytes_on_disk(tmp_path / "cache") <= 200_000 + 2**13


def test_without_a_limit_half_of_the_free_disk_is_left(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 600_000

    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage)
    cache = opened(None)
    cache.put(CONTENTS)
    assert 5 <= len(kept(cache)) <= 10


def test_one_at_a_time_fills_a_set(opened: Open) -> None:
    with opened().filling() as first, opened().filling() as second:
        assert (first, second) == (True, False)
    with opened().filling() as again:
        assert again


@pytest.mark.parametrize("size", ["much", "-1", "nan", "inf"])
def test_a_size_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, size: str) -> None:
    monkeypatch.setenv("ROTVIT_SHARD_CACHE_GIB", size)
    with pytest.raises(DatasetError, match="ROTVIT_SHARD_CACHE_GIB must be the size"):
        CacheSpace.of_environment()


def test_the_environment_says_where_and_how_much(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ROTVIT_SHARD_CACHE", str(tmp_path))
    monkeypatch.setenv("ROTVIT_SHARD_CACHE_GIB", "0.5")
    assert CacheSpace.of_environment() == CacheSpace(tmp_path, 2**29)
    monkeypatch.delenv("ROTVIT_SHARD_CACHE_GIB")
    assert CacheSpace.of_environment().limit_bytes is None


def test_a_folder_that_cannot_be_used_is_one_clear_error(opened: Open, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(DatasetError, match="Set ROTVIT_SHARD_CACHE to another one"):
        opened()
