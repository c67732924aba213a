import errno
import io
import os
import signal
import subprocess
import sys
import time
import weakref
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import threadpoolctl
import torch
from numpy.typing import NDArray
from PIL import Image

from data import prepare as module
from data.claims import Claims
from data.decode import decode_square
from data.decoding_pool import DecodingPool, decoding_pool
from data.disk_space import estimate_bytes
from data.manifest import Manifest
from data.prepare import Helper, prepare
from data.prepared import PreparedData, verify
from data.records import DatasetError, Record, Source, Split
from data.shards import read_shard

MakeSource = Callable[..., Any]
MakeNoise = Callable[..., list[NDArray[np.uint8]]]


def run(source: Source, directory: Path, **options: Any) -> Manifest:
    options = {"side": 5, "report": lambda done, total: None, "workers": 2, **options}
    return prepare(source, directory, **options)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD_IMAGES", 4)


@pytest.fixture
def source(list_source: MakeSource, noise_images: MakeNoise) -> Any:
    """11 train and 3 test images, 7 x 9 px, labels 0, 1, 2, 0, ..."""
    return list_source(
        noise_images(11, 7, 9),
        noise_images(3, 7, 9, seed=1),
        labels={"train": [i % 3 for i in range(11)], "test": [2, 1, 0]},
        class_names=["a", "b", "c"],
    )


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("*.npy")}


def test_every_image_arrives_in_order_with_its_label(
    source: Any, tmp_path: Path, noise_images: MakeNoise
) -> None:
    manifest = run(source, tmp_path)
    assert manifest.counts == {"train": 11, "test": 3}
    assert [entry.images for entry in manifest.shards["train"]] == [4, 4, 3]
    prepared = PreparedData.open(tmp_path)
    expected = [decode_square(Image.fromarray(image), 5) for image in noise_images(11, 7, 9)]
    assert np.array_equal(prepared.train.gather(np.arange(11)), np.stack(expected))
    assert prepared.train.labels is not None
    assert prepared.train.labels.tolist() == [i % 3 for i in range(11)]
    assert prepared.test is not None
    assert prepared.test.labels is not None
    assert prepared.test.labels.tolist() == [2, 1, 0]
    assert prepared.class_names == ["a", "b", "c"]
    assert prepared.fingerprint == manifest.fingerprint


def test_progress_counts_every_image_once(source: Any, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    run(source, tmp_path, report=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 14) for done in range(15)]


def test_a_preparation_that_was_cut_off_goes_on_after_its_last_whole_shard(
    source: Any, tmp_path: Path
) -> None:
    whole = run(source, tmp_path / "whole")

    def stop_in_the_third_shard(done: int, total: int) -> None:
        if done == 10:
            raise KeyboardInterrupt

    cut = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        run(source, cut, report=stop_in_the_third_shard)
    assert verify(cut, full=True) is not None
    kept = {path.name: path.stat().st_mtime_ns for path in cut.glob("*.npy")}
    assert sorted(kept) == ["train-00000.npy", "train-00001.npy"]

    source.read.clear()
    seen: list[int] = []
    manifest = run(source, cut, report=lambda done, total: seen.append(done))
    assert source.read[0] == ("train", 8), "what was kept is not read again"
    assert seen == list(range(8, 15))
    assert {name: (cut / name).stat().st_mtime_ns for name in kept} == kept
    assert contents(cut) == contents(tmp_path / "whole")
    assert manifest.fingerprint == whole.fingerprint
    assert not list(cut.glob("*.tmp"))


def test_a_hole_is_filled_without_reading_what_lies_around_it(source: Any, tmp_path: Path) -> None:
    whole = run(source, tmp_path)
    (tmp_path / "train-00001.npy").unlink()
    source.read.clear()
    again = run(source, tmp_path)
    assert source.read == [("train", number) for number in range(4, 8)]
    assert again.fingerprint == whole.fingerprint
    assert verify(tmp_path, full=True) is None


def test_a_shard_of_the_wrong_size_is_written_again(source: Any, tmp_path: Path) -> None:
    whole = run(source, tmp_path)
    path = tmp_path / "train-00002.npy"
    path.write_bytes(path.read_bytes()[:-1])
    assert run(source, tmp_path).fingerprint == whole.fingerprint
    assert verify(tmp_path, full=True) is None


@pytest.mark.parametrize(("finished", "keep_time"), [(True, True), (True, False), (False, False)])
def test_a_damaged_part_is_written_again(
    source: Any, tmp_path: Path, finished: bool, keep_time: bool
) -> None:
    whole = run(source, tmp_path)
    before = contents(tmp_path)
    path = tmp_path / "train-00001.npy"
    status = path.stat()
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    if keep_time:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    if not finished:
        (tmp_path / "manifest.json").unlink()
    source.read.clear()
    assert run(source, tmp_path).fingerprint == whole.fingerprint
    assert source.read == [("train", number) for number in range(4, 8)]
    assert contents(tmp_path) == before
    assert verify(tmp_path, full=True) is None


def test_damaged_labels_are_written_again(source: Any, tmp_path: Path) -> None:
    whole = run(source, tmp_path)
    path = tmp_path / "train-00000.json"
    path.write_text(path.read_text().replace('"labels": [0, 1', '"labels": [1, 1'))
    assert verify(tmp_path, full=False) is not None
    assert run(source, tmp_path).fingerprint == whole.fingerprint
    assert verify(tmp_path, full=False) is None


def test_copies_without_their_times_are_kept_once_their_content_is_checked(
    source: Any, tmp_path: Path
) -> None:
    whole = run(source, tmp_path)
    for path in tmp_path.glob("*.npy"):
        path.touch()
    assert verify(tmp_path, full=False) is not None
    source.read.clear()
    assert run(source, tmp_path).fingerprint == whole.fingerprint
    assert source.read == []
    assert verify(tmp_path, full=False) is None


@pytest.mark.parametrize("change", ["source", "side"])
def test_nothing_is_kept_of_another_source_or_size(
    list_source: MakeSource, noise_images: MakeNoise, tmp_path: Path, change: str
) -> None:
    run(list_source(noise_images(7, 6, 6), name="before"), tmp_path)
    name, side = ("after", 5) if change == "source" else ("before", 3)
    other = list_source(noise_images(7, 6, 6, seed=9), name=name)
    run(other, tmp_path, side=side)
    assert len(other.read) == 7
    expected = decode_square(Image.fromarray(noise_images(7, 6, 6, seed=9)[6]), side)
    assert np.array_equal(PreparedData.open(tmp_path).train.gather(np.array([6]))[0], expected)


def test_unreadable_images_are_set_aside_with_a_reason_and_labels_stay_right(
    list_source: MakeSource, noise_images: MakeNoise, tmp_path: Path
) -> None:
    images: list[Any] = noise_images(9, 6, 6)
    images[1], images[6] = b"", b"<html>"
    labels: list[int | None] = [0, 1, 2, 3, 4, 5, 6, 7, 8]
    source = list_source(images, labels={"train": labels}, class_names=list("abcdefghi"))
    manifest = run(source, tmp_path, max_skipped=0.25)
    assert [skipped.name for skipped in manifest.skipped] == ["train/1", "train/6"]
    assert "empty" in manifest.skipped[0].reason
    assert "not an image" in manifest.skipped[1].reason
    train = PreparedData.open(tmp_path).train
    assert train.labels is not None
    assert train.labels.tolist() == [0, 2, 3, 4, 5, 7, 8]
    expected = decode_square(Image.fromarray(images[7]), 5)
    assert np.array_equal(train.gather(np.array([5]))[0], expected)
    assert verify(tmp_path, full=True) is None
    assert run(source, tmp_path, max_skipped=0.25) == manifest, "kept parts remember"


def test_too_many_unreadable_images_stop_the_work_early_and_are_listed(
    list_source: MakeSource, noise_images: MakeNoise, tmp_path: Path
) -> None:
    images: list[Any] = [b"", b"<html>", *noise_images(38, 6, 6)]
    source = list_source(images)
    with pytest.raises(DatasetError, match=r"At most 2\.5% of the 40 images") as error:
        run(source, tmp_path, max_skipped=0.025)
    assert "train/0: the file is empty" in str(error.value)
    assert "train/1: not an image" in str(error.value)
    assert "data.max_skipped" in str(error.value)
    assert len(source.read) < 20


def test_unreadable_images_of_kept_parts_count_too(
    list_source: MakeSource, noise_images: MakeNoise, tmp_path: Path
) -> None:
    images: list[Any] = noise_images(8, 6, 6)
    images[0] = images[7] = b""
    source = list_source(images)
    with pytest.raises(DatasetError, match=r"At most 12\.5% of the 8 images .* 2 are"):
        run(source, tmp_path, max_skipped=0.125)
    source.read.clear()
    with pytest.raises(DatasetError, match=r"At most 12\.5% of the 8 images .* 2 are"):
        run(source, tmp_path, max_skipped=0.125)
    assert source.read[0] == ("train", 4), "the first part was kept"


def test_what_a_cut_off_attempt_left_behind_is_removed(source: Any, tmp_path: Path) -> None:
    leftover = tmp_path / "train-00099.npy.tmp"
    leftover.write_bytes(bytes(1000))
    run(source, tmp_path)
    assert not leftover.exists()


def test_at_most_ten_unreadable_images_are_listed(list_source: MakeSource, tmp_path: Path) -> None:
    source = list_source([b""] * 30)
    with pytest.raises(DatasetError) as error:
        run(source, tmp_path, max_skipped=0.5)
    assert str(error.value).count("the file is empty") == 10


def test_a_disk_that_is_too_small_is_noticed_before_the_work(
    source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**6, 10**6 - 999, 999))
    with pytest.raises(DatasetError, match=r"needs 0\.0 GiB, the disk of .* has 0\.0 GiB free"):
        run(source, tmp_path)
    assert source.read == []


def test_what_is_there_already_needs_no_space(
    source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(source, tmp_path)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(0, 0, 0))
    run(source, tmp_path)


def test_the_estimate_is_close_to_what_is_written(
    list_source: MakeSource, noise_images: MakeNoise, tmp_path: Path
) -> None:
    source = list_source(noise_images(30, 32, 32), noise_images(9, 32, 32))
    run(source, tmp_path, side=32)
    written = sum(path.stat().st_size for path in tmp_path.glob("*.npy"))
    assert estimate_bytes(source, 32) == pytest.approx(written, rel=0.05)


def test_a_disk_that_fills_up_is_an_error_that_says_so(
    source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **options: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, "write_pixels", full)
    with pytest.raises(DatasetError, match=r"is full\. Free some space and run the same command"):
        run(source, tmp_path)


def test_a_source_that_shrinks_meanwhile_is_an_error(source: Any, tmp_path: Path) -> None:
    source.counts = {"train": 11, "test": 3}
    records = source.records
    source.records = lambda split, start=0: (
        record for record in records(split, start) if record.name != "train/9"
    )
    with pytest.raises(DatasetError, match="train-00002 should have 3 images, got 2"):
        run(source, tmp_path)


@pytest.mark.parametrize("label", [None, -1, 3])
def test_a_missing_label_among_labels_is_an_error(
    list_source: MakeSource, noise_images: MakeNoise, tmp_path: Path, label: int | None
) -> None:
    source = list_source(
        noise_images(3, 5, 5), labels={"train": [0, label, 2]}, class_names=["a", "b", "c"]
    )
    with pytest.raises(DatasetError, match=rf"label in 0 to 2, train/1 has {label}"):
        run(source, tmp_path)


def test_the_fingerprint_tells_every_kind_of_change(
    list_source: MakeSource, noise_images: MakeNoise, tmp_path: Path
) -> None:
    images = noise_images(6, 5, 5)
    changed = [image.copy() for image in images]
    changed[5][4, 4, 2] ^= 1
    labels: dict[Split, list[int]] = {"train": [0, 1, 0, 1, 0, 1]}
    two: dict[str, Any] = {"labels": labels | {"test": [1]}, "class_names": ["a", "b"]}
    flipped = labels | {"test": [0]}
    variants = {
        "original": list_source(images, labels=labels, class_names=["a", "b"]),
        "pixel": list_source(changed, labels=labels, class_names=["a", "b"]),
        "label": list_source(images, labels={"train": [0, 1, 0, 1, 0, 0]}, class_names=["a", "b"]),
        "name": list_source(images, labels=labels, class_names=["a", "c"]),
        "no labels": list_source(images),
        "order": list_source(images[::-1], labels=labels, class_names=["a", "b"]),
        "fewer": list_source(images[:5], labels=labels, class_names=["a", "b"]),
        "test": list_source(images[:5], images[5:], **two),
        "test pixel": list_source(images[:5], changed[5:], **two),
        "test label": list_source(images[:5], images[5:], **two | {"labels": flipped}),
    }
    found = {key: run(s, tmp_path / key).fingerprint for key, s in variants.items()}
    assert len(set(found.values())) == len(found)
    twin = list_source(images, labels=labels, class_names=["a", "b"], name="elsewhere")
    assert run(twin, tmp_path / "twin").fingerprint == found["original"]


def test_memory_does_not_grow_with_the_number_of_images(
    list_source: MakeSource,
    noise_images: MakeNoise,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "SHARD_IMAGES", 4096)
    source = list_source(noise_images(1, 5, 5) * 300)
    most = 0

    def watch(done: int, total: int) -> None:
        nonlocal most
        most = max(most, len(source.read) - done)

    run(source, tmp_path, report=watch, workers=2)
    assert most <= 10


def test_the_labels_of_one_shard_at_a_time_are_in_memory(
    list_source: MakeSource,
    noise_images: MakeNoise,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = list_source(noise_images(1, 5, 5) * 60, labels={"train": [0] * 60}, class_names=["a"])
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = 0

    class Watched(list[int]):
        """A list that can be watched, one apart from the other."""

        __hash__ = object.__hash__  # type: ignore[assignment]

    def watched(directory: Path, name: str, *rest: Any) -> Any:
        nonlocal most
        shard = read_shard(directory, name, *rest)
        if shard is not None:
            labels = Watched(shard.labels or [])
            alive.add(labels)
            shard = replace(shard, labels=labels)
            most = max(most, len(alive))
        return shard

    run(source, tmp_path)
    for name in ("prepare", "manifest", "prepared"):
        monkeypatch.setattr(f"data.{name}.read_shard", watched)
    run(source, tmp_path)
    assert verify(tmp_path, full=False) is None
    assert 1 <= most <= 3, "of 15 shards; loops hold on to their last"


def test_odd_files_do_not_depend_on_the_users_warning_filters(
    list_source: MakeSource, tmp_path: Path
) -> None:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01")
    assert run(list_source([file.getvalue()]), tmp_path).skipped == []


def test_torch_gets_its_threads_back(source: Any, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        run(source, tmp_path)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_numpy_has_one_thread_while_images_are_decoded(source: Any, tmp_path: Path) -> None:
    seen: list[set[int]] = []

    def blas_threads() -> set[int]:
        pools = threadpoolctl.ThreadpoolController().select(user_api="blas").info()
        return {pool["num_threads"] for pool in pools}

    def report(done: int, total: int) -> None:
        seen.append(blas_threads())

    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        prepare(source, tmp_path, side=5, report=report, workers=2)
        assert seen[-1] == {1}
        assert blas_threads() == {2}


KILLED = """
import sys, time
from pathlib import Path
from data import prepare
from data.drawn import DrawnSource

prepare.SHARD_IMAGES = 16
DrawnSource.counts = {"train": 90, "test": 20}

def report(done, total):
    print(done, flush=True)
    time.sleep(0.01)

prepare.prepare(DrawnSource(), Path(sys.argv[1]), side=16, report=report, workers=2)
"""


@pytest.mark.slow
def test_a_preparation_killed_at_any_moment_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = tmp_path / "killed"
    for lines in (20, 25):  # the second attempt goes on from the first
        with subprocess.Popen(
            [sys.executable, "-c", KILLED, str(killed)], stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            for _ in range(lines):
                process.stdout.readline()
            time.sleep(0.003 * lines)
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
    assert verify(killed, full=True) is not None
    assert len(contents(killed)) >= 2

    from data.drawn import DrawnSource

    monkeypatch.setattr(module, "SHARD_IMAGES", 16)
    monkeypatch.setattr(DrawnSource, "counts", {"train": 90, "test": 20})
    finished = run(DrawnSource(), killed, side=16)
    whole = run(DrawnSource(), tmp_path / "whole", side=16)
    assert finished.fingerprint == whole.fingerprint
    assert contents(killed) == contents(tmp_path / "whole")
    assert verify(killed, full=True) is None


def test_a_record_may_be_a_path(list_source: MakeSource, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    Image.new("RGB", (5, 5), (1, 2, 3)).save(path)
    run(list_source([path]), tmp_path / "out")
    image = PreparedData.open(tmp_path / "out").train.gather(np.array([0]))[0]
    assert image.reshape(-1, 3).tolist() == [[1, 2, 3]] * 25


def test_a_failing_source_is_not_swallowed(source: Any, tmp_path: Path) -> None:
    def records(split: Split, start: int = 0) -> Iterator[Record]:
        raise DatasetError("the disk was pulled out")

    source.records = records
    with pytest.raises(DatasetError, match="pulled out"):
        run(source, tmp_path)


def helper_of(source: Source, directory: Path, **options: Any) -> Helper:
    options = {"side": 5, "report": lambda done, total: None, "workers": 2, **options}
    return Helper(lambda: source, directory, **options)


def at_image(number: int, act: Callable[[], object]) -> Callable[[int, int], None]:
    """Have something happen while the leader has made so many images: it is in a shard then."""

    def report(done: int, total: int) -> None:
        if done == number:
            act()

    return report


@pytest.mark.parametrize("pixel_format", ["raw", "jpeg"])
def test_a_helper_makes_the_shards_that_the_leader_has_not_begun(
    source: Any, tmp_path: Path, pixel_format: str
) -> None:
    options = {"side": 6, "pixel_format": pixel_format}
    whole = run(source, tmp_path / "whole", **options)
    read_alone = sorted(source.read)
    source.read.clear()
    led: list[int] = []
    helped: list[int] = []
    helper = helper_of(
        source, tmp_path / "both", report=lambda done, total: helped.append(done), **options
    )

    def report(done: int, total: int) -> None:
        led.append(done)
        if done == 2:
            helper.help()

    both = run(source, tmp_path / "both", report=report, **options)
    assert replace(both, shards={}) == replace(whole, shards={})
    assert [[entry.sha256 for entry in group] for group in both.shards.values()] == [
        [entry.sha256 for entry in group] for group in whole.shards.values()
    ]
    assert sorted(source.read) == read_alone, "no image is read twice"
    assert helped == [*range(1, 11), 10]
    assert led == [0, 1, 2, 3, 4, 8, 11, 14], "also those of the helper's shards count"
    assert verify(tmp_path / "both", full=True) is None


def test_without_a_leader_there_is_nothing_to_help_with(source: Any, tmp_path: Path) -> None:
    helper_of(source, tmp_path).help()
    assert source.read == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["data.manifest.FORMAT", "data.prepare.SHARD_IMAGES"])
def test_a_helper_that_would_make_other_shards_makes_none(
    source: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
) -> None:
    caplog.set_level("INFO")
    whole = run(source, tmp_path / "whole")
    helped: list[int] = []
    helper = helper_of(source, tmp_path / "led", report=lambda done, total: helped.append(done))

    def help_otherwise() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(name, 3)
            helper.help()
            helper.help()

    led = run(source, tmp_path / "led", report=at_image(2, help_otherwise))
    assert led.fingerprint == whole.fingerprint
    assert helped == []
    assert caplog.text.count("it does not help") == 1


def test_a_helper_of_a_source_that_has_changed_is_an_error_and_writes_nothing(
    list_source: MakeSource, noise_images: MakeNoise, tmp_path: Path
) -> None:
    other = list_source(noise_images(7, 6, 6), name="after")

    def help_with_other() -> None:
        with pytest.raises(DatasetError, match="must not change while it is prepared"):
            helper_of(other, tmp_path).help()

    run(list_source(noise_images(7, 6, 6)), tmp_path, report=at_image(2, help_with_other))
    assert other.read == []
    assert verify(tmp_path, full=True) is None


def test_unreadable_images_of_helpers_count_and_nobody_helps_one_who_fails(
    list_source: MakeSource, noise_images: MakeNoise, tmp_path: Path
) -> None:
    images: list[Any] = noise_images(12, 6, 6)
    images[0] = images[7] = b""
    source = list_source(images)
    helper = helper_of(source, tmp_path, max_skipped=0.1)
    with pytest.raises(DatasetError, match=r"At most 10\.0% of the 12 images .* 2 are"):
        run(source, tmp_path, max_skipped=0.1, report=at_image(2, helper.help))
    source.read.clear()
    helper.help()
    assert source.read == []


@pytest.mark.parametrize(("machine", "workers"), [("this", [5, 2]), ("another", [5, 5])])
def test_processes_of_one_machine_divide_its_processors(
    list_source: MakeSource,
    noise_images: MakeNoise,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    machine: str,
    workers: list[int],
) -> None:
    source = list_source(noise_images(8, 6, 6))
    used: list[int] = []

    def pool(count: int) -> AbstractContextManager[DecodingPool]:
        used.append(count)
        return decoding_pool(count)

    def help_there() -> None:
        with monkeypatch.context() as patch:
            if machine == "another":
                patch.setattr("platform.node", lambda: machine)
            helper_of(source, tmp_path, workers=5).help()

    monkeypatch.setattr(module, "decoding_pool", pool)
    run(source, tmp_path, workers=5, report=at_image(2, help_there))
    assert used == workers


def test_a_preparation_first_waits_for_those_who_helped_one_that_was_killed(
    source: Any, tmp_path: Path
) -> None:
    claims = Claims(tmp_path)
    half_written = tmp_path / "train-00001.npy.tmp"

    def give_up(done: int, total: int) -> None:
        raise InterruptedError

    with claims.claim("train-00001", claims.invite({})):
        half_written.touch()
        with pytest.raises(InterruptedError):
            run(source, tmp_path, report=give_up)
        assert half_written.exists()
    assert source.read == []
    run(source, tmp_path)
    assert not half_written.exists()


def test_a_preparation_that_waits_for_a_helper_in_the_end_can_be_stopped(
    source: Any, tmp_path: Path
) -> None:
    """The helper makes a part again whose record it has not seen, and stands still meanwhile."""
    code = (
        "import json, sys, time; from pathlib import Path; from data.claims import Claims\n"
        "claims = Claims(Path(sys.argv[1]))\n"
        "with claims.claim('train-00000', claims.plan()) as mine:\n"
        "    print(mine, flush=True)\n"
        "    time.sleep(5)"
    )
    helpers: list[subprocess.Popen[str]] = []

    def report(done: int, total: int) -> None:
        claim = tmp_path / "claims" / "train-00000.lock"
        if done == total and not helpers and Claims(tmp_path).plan() is not None:
            os.utime(claim, (time.time() - 300, time.time() - 300))
            command = [sys.executable, "-c", code, str(tmp_path)]
            helpers.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            assert helpers[0].stdout is not None
            assert helpers[0].stdout.readline() == "True\n"
        if helpers and Claims(tmp_path).plan() is None:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run(source, tmp_path, report=report)
    with helpers[0]:
        helpers[0].kill()
