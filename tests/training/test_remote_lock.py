"""Leases in a store: one holder at a time, whoever dies or falls asleep."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from data.patience import Patience
from training import remote_lock
from training.remote_lock import leased
from training.remote_store import Store

if TYPE_CHECKING:
    from tests.standin_s3 import StandInS3

FOLDER = "locks/pretrain-k"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_lock, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(remote_lock, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(remote_lock, "DEAD_AFTER_SECONDS", 1.0)


@pytest.fixture
def remote(address: str) -> Store:
    return Store(address)


@pytest.fixture
def folder(tmp_path: Path) -> Store:
    return Store(f"file://{tmp_path}/store")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("address", ["file", "s3"], indirect=True)
def test_one_holds_it_at_a_time_and_all_get_it(remote: Store) -> None:
    inside, most, turns = 0, 0, threading.Lock()

    def take(number: int) -> None:
        nonlocal inside, most
        with leased(Store(remote.address), FOLDER, owner=f"machine {number}", what="a stage"):
            with turns:
                inside += 1
                most = max(most, inside)
            time.sleep(0.05)
            with turns:
                inside -= 1

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(take, range(4)))
    assert most == 1


@pytest.mark.parametrize("address", ["file", "s3"], indirect=True)
def test_of_many_that_create_at_once_one_succeeds(remote: Store) -> None:
    contents = [f"machine {number}".encode() for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda content: remote.create("locks/one", content), contents))
    assert made.count(True) == 1
    assert remote.read("locks/one") == contents[made.index(True)]


@pytest.mark.usefixtures("quick")
def test_a_holder_that_is_alive_is_waited_for(
    folder: Store, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="training")
    order: list[str] = []

    def second() -> None:
        with leased(folder, FOLDER, owner="second", what="a stage"):
            order.append("second")

    with leased(folder, FOLDER, owner="first", what="a stage"):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(2.5)  # more than twice the time after which one without a sign of life is dead
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]
    assert "Waiting for process" in caplog.text


def test_after_an_outage_a_holder_that_is_alive_keeps_it(
    s3: "StandInS3", monkeypatch: pytest.MonkeyPatch
) -> None:
    """No sign of life could reach the store, and the one who waits is the first to ask again."""
    monkeypatch.setattr(remote_lock, "BEAT_SECONDS", 0.4)
    monkeypatch.setattr(remote_lock, "LOOK_SECONDS", 0.03)
    monkeypatch.setattr(remote_lock, "DEAD_AFTER_SECONDS", 2.5)
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)  # its own, which take seconds
    remote = Store("s3://bucket/x", Patience(attempts=1000, first_wait=0.02, longest_wait=0.02))
    order: list[str] = []

    def second() -> None:
        with leased(remote, FOLDER, owner="second", what="a stage"):
            order.append("second")

    with leased(remote, FOLDER, owner="first", what="a stage") as lease:
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.5)
        s3.fault = lambda asked: 503
        time.sleep(4)
        s3.fault = lambda asked: None
        time.sleep(1.5)
        assert lease.is_held()
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]


@pytest.mark.usefixtures("quick")
def test_a_holder_that_lost_it_says_so_once_and_gives_no_more_signs(
    folder: Store, caplog: pytest.LogCaptureFixture
) -> None:
    with leased(folder, FOLDER, owner="first", what="a stage") as lost:
        folder.create(f"{FOLDER}/00000002", json.dumps({"owner": "heir"}).encode())
        lost._thread.join(10)
        assert not lost.is_held()
    assert caplog.text.count("Another run has taken over a stage") == 1


@pytest.mark.usefixtures("quick")
def test_the_lease_of_a_dead_holder_is_taken_over_and_not_before_its_time(
    folder: Store, caplog: pytest.LogCaptureFixture
) -> None:
    dead = json.dumps({"owner": "dead", "host": "there", "process": 7}).encode()
    assert folder.create(f"{FOLDER}/00000003", dead)
    began = time.monotonic()
    with leased(folder, FOLDER, owner="heir", what="a stage") as lease:
        assert 1.0 <= time.monotonic() - began < 5
        assert lease.is_held()
    assert "process 7 on there has given no sign of life" in caplog.text
    assert list(folder.sizes(FOLDER)) == ["00000004"]


def test_whoever_died_on_the_same_machine_is_not_waited_for(remote: Store) -> None:
    dead = json.dumps({"owner": "this folder"}).encode()
    assert remote.create(f"{FOLDER}/00000001", dead)
    began = time.monotonic()
    with leased(remote, FOLDER, owner="this folder", what="a stage"):
        pass
    assert time.monotonic() - began < 3


@pytest.mark.usefixtures("quick")
def test_a_holder_that_was_suspended_finds_that_it_has_lost_it(
    folder: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_lock, "BEAT_SECONDS", 60.0)
    with leased(folder, FOLDER, owner="sleeper", what="a stage") as lost:
        assert lost.is_held()
        with leased(folder, FOLDER, owner="heir", what="a stage") as held:
            assert not lost.is_held()
            assert held.is_held()
            lost._beat_once(1)  # on waking up
            assert held.is_held()
        assert not lost.is_held()
    # And its end does not undo the end of the other one.
    assert json.loads(folder.read(f"{FOLDER}/00000002") or b"") == {"released": True}


def test_a_number_that_was_used_and_removed_is_not_held_again(remote: Store) -> None:
    """Whoever looked long ago creates a low number, and must see that a higher one counts."""
    with leased(remote, FOLDER, owner="a", what="a stage"):
        pass
    with leased(remote, FOLDER, owner="b", what="a stage"):
        assert remote_lock._create(remote, FOLDER, 1, {"owner": "late"})
        assert remote_lock._newest(remote, FOLDER) == 2


@pytest.mark.usefixtures("quick", "simple_kind")
def test_of_two_that_both_created_it_one_holds_it(tmp_path: Path) -> None:
    """In a store that looks first and then writes, both find nothing; the last to write has it."""
    remote = Store(f"simple://{tmp_path}/store")
    both = threading.Barrier(2)
    held: list[list[float]] = [[], []]

    def take(number: int) -> None:
        both.wait(10)
        with leased(remote, FOLDER, owner=f"machine {number}", what="a stage") as lease:
            ends = time.monotonic() + 0.5
            while time.monotonic() < ends:
                time.sleep(0.05)  # with a sign of life, which must not be in the other's place
                if lease.is_held():
                    held[number].append(time.monotonic())

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(take, range(2)))
    spans = sorted((times[0], times[-1]) for times in held if times)
    assert spans
    assert len(spans) == 1 or spans[0][1] < spans[1][0], "never both at a time"


@pytest.mark.usefixtures("quick")
def test_whoever_was_written_over_does_not_hold_it_and_leaves_it_alone(folder: Store) -> None:
    with leased(folder, FOLDER, owner="first", what="a stage") as lease:
        assert lease.is_held()
        late = json.dumps({"owner": "late", "token": "of another"}).encode()
        folder.write(f"{FOLDER}/00000001", late)
        assert not lease.is_held()
        time.sleep(0.3)  # several signs of life
    assert folder.read(f"{FOLDER}/00000001") == late
