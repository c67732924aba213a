"""Images at an address are the same in the same order, whatever the cache holds and servers do."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data import prepare as module
from data import remote_pixels
from data.loaders import Batches, Share, eval_batches
from data.manifest import read as read_manifest
from data.patience import DownloadError, Patience
from data.prepare import prepare
from data.prepared import PreparedData
from data.pushed_shards import push, take
from data.records import DatasetError, Source
from data.remote_pixels import RemotePixels
from data.splits import Subset, split
from tests.data.standin_hub import Fault, StandInHub

MakeSource = Callable[..., Source]

ROOT = Path(__file__).parents[2]
SIDE, TRAIN, TEST = 24, 150, 12
CPU = torch.device("cpu")
SET_BYTES = TRAIN * SIDE * SIDE * 3

PATIENCE = Patience(
    attempts=4,
    first_wait=0.01,
    longest_wait=0.02,
    longest_asked=0.1,
    stall_seconds=3.0,
    least_bytes=100,
)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cache of the test's own, and servers that are given up soon."""
    monkeypatch.setattr(remote_pixels, "PATIENCE", PATIENCE)
    monkeypatch.setenv("ROTVIT_SHARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ROTVIT_SHARD_CACHE_GIB", "1")


@pytest.fixture
def local(
    tmp_path: Path,
    list_source: MakeSource,
    noise_images: Callable[..., list[Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """150 + 12 prepared images of 24 px in shards of 40."""
    monkeypatch.setattr(module, "SHARD_IMAGES", 40)
    source = list_source(
        noise_images(TRAIN, SIDE, SIDE),
        noise_images(TEST, SIDE, SIDE, 1),
        labels={"train": [i % 3 for i in range(TRAIN)], "test": [0] * TEST},
        class_names=["a", "b", "c"],
    )
    directory = tmp_path / "prepared"
    prepare(source, directory, side=SIDE, report=lambda done, total: None, workers=1)
    return directory


@pytest.fixture
def served(local: Path, hub: StandInHub, tmp_path: Path) -> Path:
    """The same images without their pixels, which a web server on the loopback has."""
    nothing: Callable[[int, int], None] = lambda done, total: None  # noqa: E731
    there = tmp_path / "there"
    push(local, str(there), report=nothing, patience=PATIENCE)
    hub.add("a/b", {path.name: path.read_bytes() for path in there.iterdir()})
    directory = tmp_path / "served"
    made_from = read_manifest(local).made_from
    take(
        f"{hub.url}/plain/a/b/-", directory, made_from=made_from, report=nothing, patience=PATIENCE
    )
    hub.requests.clear()
    return directory


def pixels_of(opened: PreparedData) -> RemotePixels:
    (pixels,) = opened.train._shards
    assert isinstance(pixels, RemotePixels)
    return pixels


def batches(opened: PreparedData, **options: Any) -> Batches:
    train = split(opened, val_fraction=0.1, test_fraction=0.1, seed=0).train
    return Batches(train, batch_size=8, side=20, flip=True, seed=3, device=CPU, **options)


def stream(made: Batches, epochs: int = 2, start: int = 0) -> list[tuple[list[int], torch.Tensor]]:
    return [
        (batch.ids.tolist(), batch.images)
        for epoch in range(epochs)
        for batch in made.epoch(epoch, start if epoch == 0 else 0)
    ]


def assert_same(
    one: list[tuple[list[int], torch.Tensor]], other: list[tuple[list[int], torch.Tensor]]
) -> None:
    assert [ids for ids, _ in one] == [ids for ids, _ in other]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(one, other, strict=True))


def bytes_asked(hub: StandInHub) -> int:
    ranges = [each[2] for each in hub.requests if each[1].endswith(".npy")]
    ends = [tuple(map(int, str(each).removeprefix("bytes=").split("-"))) for each in ranges]
    return sum(last + 1 - first for first, last in ends)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 2.0])
def test_order_and_bytes_are_those_of_local_files_whatever_the_cache_holds(
    local: Path, served: Path, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    monkeypatch.setenv("ROTVIT_SHARD_CACHE_GIB", str(share * SET_BYTES * 2 / 2**30))
    expected = stream(batches(PreparedData.open(local)))
    assert len(expected) == 2 * 16
    first, again = (PreparedData.open(served) for _ in range(2))
    assert_same(stream(batches(first)), expected)
    assert_same(stream(batches(again), start=5), expected[5:])
    if share == 2.0:
        assert pixels_of(again).fetched == 0, "all of it is here"
    if share == 0.0:
        assert pixels_of(first).fetched >= 2 * 128


def test_every_process_of_a_training_gets_its_part(local: Path, served: Path) -> None:
    """And they share a cache; here by two openings of it in one process."""
    for index in range(2):
        share = Share(index, 2)
        expected = stream(batches(PreparedData.open(local), share=share), epochs=1)
        assert_same(stream(batches(PreparedData.open(served), share=share), epochs=1), expected)


def test_evaluation_between_and_within_epochs_changes_nothing(local: Path, served: Path) -> None:
    def evaluated(directory: Path) -> list[tuple[list[int], torch.Tensor]]:
        opened = PreparedData.open(directory)
        parts = split(opened, val_fraction=0.1, test_fraction=0.1, seed=0)
        seen = []
        for number, batch in enumerate(batches(opened).epoch(0)):
            seen.append((batch.ids.tolist(), batch.images))
            if number % 5 == 1:
                seen += [
                    (each.ids.tolist(), each.images)
                    for part in (parts.val, parts.test)
                    for each in eval_batches(part, 8, 20, CPU)
                ]
        return seen

    assert_same(evaluated(served), evaluated(local))


def test_what_the_cache_holds_is_not_fetched_again(
    served: Path, hub: StandInHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = pixels_of(PreparedData.open(served))
    everything = np.arange(TRAIN)
    pixels[everything]
    assert len(hub.requests) == TRAIN
    hub.requests.clear()
    again = pixels_of(PreparedData.open(served))
    again[everything]
    assert hub.requests == []
    assert again.fetched == 0


def test_images_are_asked_for_ahead_of_their_batch(
    served: Path, hub: StandInHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = SIDE * SIDE * 3
    monkeypatch.setattr(remote_pixels, "AHEAD_BYTES", 30 * image)
    opened = PreparedData.open(served)
    subset = Subset(opened.train, np.arange(60))  # too few for the cache to be filled
    groups = [np.arange(first, first + 10) for first in range(0, 60, 10)]
    with subset.announced(groups):
        wait_for(lambda: len(hub.requests) == 30)
        time.sleep(0.1)
        assert len(hub.requests) == 30, "no more than that is held"
        subset.gather(groups[0])
        wait_for(lambda: len(hub.requests) == 40)
        for group in groups[1:]:
            subset.gather(group)
    assert len(hub.requests) == 60, "each of them once"


def test_the_cache_is_filled_by_long_requests_meanwhile(served: Path, hub: StandInHub) -> None:
    opened = PreparedData.open(served)
    subset = Subset(opened.train, np.arange(TRAIN))
    cache = pixels_of(opened).cache
    with subset.announced([np.arange(8)]):
        wait_for(lambda: not len(cache.missing(np.arange(TRAIN))))
    assert len(hub.requests) <= 8 + 4
    assert bytes_asked(hub) <= 1.2 * SET_BYTES


def test_what_is_given_up_is_not_waited_for(served: Path, hub: StandInHub) -> None:
    """Also where the server does not answer: whoever leaves an epoch leaves at once."""
    epoch = batches(PreparedData.open(served)).epoch(0)
    next(epoch)
    hub.faults.append(Fault("status", 503, times=10**6))
    began = time.monotonic()
    epoch.close()  # type: ignore[attr-defined]
    assert time.monotonic() - began < 1


FAULTS = {
    "cut": [Fault("cut", 500, times=3)],
    "cut before the first byte": [Fault("cut", 0, times=3)],
    "server errors": [Fault("status", 500, times=2), Fault("status", 503)],
    "slow down": [Fault("status", 429, {"Retry-After": "0"}, times=5)],
    "stall": [Fault("stall", 20)],
    "a wrong byte": [Fault("flip")],
    "too short": [Fault("short")],
}


@pytest.mark.parametrize("faults", FAULTS.values(), ids=FAULTS)
def test_after_faults_the_images_are_right(
    local: Path, served: Path, hub: StandInHub, faults: list[Fault]
) -> None:
    expected = stream(batches(PreparedData.open(local)), epochs=1)
    hub.faults += [replace(fault) for fault in faults]
    assert_same(stream(batches(PreparedData.open(served)), epochs=1), expected)
    assert hub.faults == []


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        (Fault("status", 500), DownloadError, "attempts in a row failed.*answered 500"),
        (Fault("cut", 0), DownloadError, "attempts in a row failed"),
        (Fault("flip"), DownloadError, r"train-0000\d\.npy must be as it was pushed; 3 copies"),
        (Fault("status", 403), DatasetError, "the server answered 403"),
        (Fault("status", 404), DatasetError, "the server answered 404"),
        (Fault("whole"), DatasetError, "must send parts of files"),
    ],
)
def test_a_fault_that_stays_is_one_clear_error(
    served: Path, hub: StandInHub, fault: Fault, error: type[Exception], message: str
) -> None:
    hub.faults.append(replace(fault, times=10**6))
    with pytest.raises(error, match=message):
        stream(batches(PreparedData.open(served)))
    # Before this test ends: pytest fails the one that is at it when a thread raises.
    wait_for(lambda: all(each.name != "fill-shards" for each in threading.enumerate()))


def test_while_a_server_fails_one_request_at_a_time_asks_again(
    served: Path, hub: StandInHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient = replace(PATIENCE, attempts=99, first_wait=0.2, longest_wait=0.2)
    monkeypatch.setattr(remote_pixels, "PATIENCE", patient)
    hub.faults.append(Fault("status", 503, times=10**6))
    opened = PreparedData.open(served)
    reading = threading.Thread(target=lambda: stream(batches(opened), epochs=1))
    reading.start()
    wait_for(lambda: len(hub.requests) >= remote_pixels.REQUESTS + remote_pixels.FILL_REQUESTS)
    time.sleep(1)  # until the last of those that began together has been refused
    before = len(hub.requests)
    time.sleep(1)
    asked = len(hub.requests) - before
    hub.faults.clear()
    reading.join(60)
    assert not reading.is_alive()
    assert 1 <= asked <= 7, "one that asks again, for all of them"


def test_once_a_store_is_given_up_nobody_goes_on_asking(
    served: Path, hub: StandInHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process ends when its threads have: at once, not when each of them has given up."""
    patient = replace(PATIENCE, attempts=3, first_wait=0.2, longest_wait=0.2)
    monkeypatch.setattr(remote_pixels, "PATIENCE", patient)
    hub.faults.append(Fault("status", 503, times=10**6))
    pixels = pixels_of(PreparedData.open(served))
    with pytest.raises(DownloadError):
        pixels[np.arange(32)]
    began = time.monotonic()
    pixels.pool.shutdown()
    assert time.monotonic() - began < 2


def test_a_damaged_image_at_the_address_is_named(served: Path, hub: StandInHub) -> None:
    files = hub.repositories["a/b"].files
    content = bytearray(files["train-00001.npy"])
    content[128 + 7 * SIDE * SIDE * 3] ^= 1
    files["train-00001.npy"] = bytes(content)
    with pytest.raises(DownloadError, match="copies of its image 7 had other bytes"):
        pixels_of(PreparedData.open(served))[np.array([47])]
    assert pixels_of(PreparedData.open(served))[np.array([46, 48])].shape == (2, SIDE, SIDE, 3)


def test_a_damaged_image_in_the_cache_is_fetched_again(
    local: Path, served: Path, tmp_path: Path
) -> None:
    expected = PreparedData.open(local).train.gather(np.arange(TRAIN))
    opened = PreparedData.open(served).train
    opened.gather(np.arange(TRAIN))
    for path in (tmp_path / "cache").glob("*/images"):
        content = bytearray(path.read_bytes())
        content[5000] ^= 1
        path.write_bytes(content)
    assert np.array_equal(opened.gather(np.arange(TRAIN)), expected)


def test_a_stop_ends_the_waiting(
    served: Path, hub: StandInHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient = replace(PATIENCE, attempts=99, first_wait=60, longest_wait=60)
    monkeypatch.setattr(remote_pixels, "PATIENCE", patient)
    hub.faults.append(Fault("status", 503, times=10**6))
    began = time.monotonic()
    opened = PreparedData.open(served, stop=lambda: time.monotonic() - began > 0.5)
    with pytest.raises(InterruptedError):
        stream(batches(opened))
    assert time.monotonic() - began < 3


READ = """
import sys
from pathlib import Path
import numpy as np
from data.prepared import PreparedData
train = PreparedData.open(Path(sys.argv[1])).train
print("open", flush=True)
images = train.gather(np.arange(len(train)))
sys.stdout.write(images.tobytes().hex())
"""


def reading(served: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", READ, str(served)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )


def test_two_processes_share_a_cache(local: Path, served: Path, hub: StandInHub) -> None:
    expected = PreparedData.open(local).train.gather(np.arange(TRAIN)).tobytes().hex()
    both = [reading(served) for _ in range(2)]
    assert [process.communicate(timeout=60)[0] for process in both] == [f"open\n{expected}"] * 2
    hub.requests.clear()
    last = reading(served)
    assert last.communicate(timeout=60)[0] == f"open\n{expected}"
    assert hub.requests == []


def test_after_a_kill_in_the_middle_the_images_are_right(
    local: Path, served: Path, hub: StandInHub
) -> None:
    expected = PreparedData.open(local).train.gather(np.arange(TRAIN)).tobytes().hex()
    for asked in (20, 60, 100):
        process = reading(served)
        wait_for(lambda: len(hub.requests) >= asked or process.poll() is not None)  # noqa: B023
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    process = reading(served)
    assert process.communicate(timeout=60)[0] == f"open\n{expected}"
    assert len(hub.requests) < 4 * TRAIN, "what had come was kept"


def wait_for(holds: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.005)
