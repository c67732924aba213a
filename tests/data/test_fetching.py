"""Whatever a server does, a fetched file is whole and right, or there is one clear error."""

import errno
import hashlib
import socket
import time
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest

from data.catalogue import RemoteFile
from data.fetching import PART, fetch
from data.patience import DownloadError, Patience, TryAgainError, asked_wait
from data.records import DatasetError
from data.remote_files import read_range
from tests.data.standin_hub import Fault, StandInHub

CONTENT = bytes(range(256)) * 400
PATIENCE = Patience(
    attempts=4,
    first_wait=0.01,
    longest_wait=0.02,
    longest_asked=0.3,
    stall_seconds=0.3,
    least_bytes=1000,
    progress_bytes=1000,
)


@pytest.fixture
def file(hub: StandInHub) -> RemoteFile:
    """A file of 102,400 bytes on the stand-in, which publishes its SHA-256."""
    hub.add("a/b", {"f": CONTENT})
    checksum = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"
    return RemoteFile(
        name="f", url=f"{hub.url}/plain/a/b/-/f", size=len(CONTENT), checksum=checksum
    )


def leftovers(target: Path) -> list[str]:
    return [path.name for path in target.parent.iterdir() if path != target]


FAULTS = {
    "cut": [Fault("cut", 30_000)],
    "cut again and again": [Fault("cut", 10_000, times=8)],
    "cut before the first byte": [Fault("cut", 0, times=3)],
    "too many requests": [Fault("status", 429, {"Retry-After": "0"}, times=3)],
    "server errors": [Fault("status", 500), Fault("status", 503), Fault("status", 502)],
    "stall": [Fault("stall", 20_000)],
    "drip": [Fault("drip")],
    "a wrong byte": [Fault("flip")],
    "too short": [Fault("short")],
    "too long": [Fault("long")],
    "no ranges": [Fault("cut", 30_000), Fault("whole")],
    "cut, then wrong": [Fault("cut", 30_000), Fault("flip")],
}


@pytest.mark.parametrize("faults", FAULTS.values(), ids=FAULTS)
def test_after_a_fault_the_file_is_whole(
    hub: StandInHub, file: RemoteFile, tmp_path: Path, faults: list[Fault]
) -> None:
    hub.faults += [replace(fault) for fault in faults]
    fetch(file, tmp_path / "f", patience=PATIENCE)
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert leftovers(tmp_path / "f") == []
    assert hub.faults == []


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault("cut", 0, times=99), "4 attempts in a row failed.*run the same command again"),
        (Fault("status", 429, times=99), "the server answered 429"),
        (Fault("status", 500, times=99), "the server answered 500"),
        pytest.param(
            Fault("stall", 0, times=99), "4 attempts in a row failed", marks=pytest.mark.slow
        ),
        pytest.param(
            Fault("drip", times=99), r"only \d+ bytes came in 0 s", marks=pytest.mark.slow
        ),
        (Fault("flip", times=99), "must have 102,400 bytes and sha256:.*3 copies had others"),
        (Fault("short", times=99), "the server has 51,200 bytes instead of 102,400"),
        (Fault("long", times=99), "the server has 102,500 bytes instead of 102,400"),
    ],
)
def test_a_fault_that_stays_is_one_clear_error(
    hub: StandInHub, file: RemoteFile, tmp_path: Path, fault: Fault, message: str
) -> None:
    hub.faults.append(replace(fault))
    with pytest.raises(DownloadError, match=message):
        fetch(file, tmp_path / "f", patience=PATIENCE)
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_what_the_server_refuses_is_not_asked_for_again(
    hub: StandInHub, file: RemoteFile, tmp_path: Path, status: int
) -> None:
    hub.faults.append(Fault("status", status, times=99))
    with pytest.raises(DatasetError, match=f"the server answered {status}"):
        fetch(file, tmp_path / "f", patience=PATIENCE)
    assert len(hub.content_requests()) == 1


def test_it_goes_on_from_the_byte_where_it_was_cut(
    hub: StandInHub, file: RemoteFile, tmp_path: Path
) -> None:
    hub.faults.append(Fault("cut", 30_000))
    fetch(file, tmp_path / "f", patience=PATIENCE)
    assert [each[2] for each in hub.content_requests()] == [None, "bytes=30000-"]


def test_it_goes_on_in_another_process_if_the_part_is_of_the_same_file(
    hub: StandInHub, file: RemoteFile, tmp_path: Path
) -> None:
    stop_at = 50_000
    done = 0

    def report(bytes_done: int) -> None:
        nonlocal done
        done = bytes_done

    hub.faults.append(Fault("cut", stop_at))
    with pytest.raises(InterruptedError, match="the same command goes on there"):
        fetch(file, tmp_path / "f", patience=PATIENCE, report=report, stop=lambda: done >= stop_at)
    fetch(file, tmp_path / "f", patience=PATIENCE)
    assert hub.content_requests()[-1][2] == f"bytes={stop_at}-"
    assert (tmp_path / "f").read_bytes() == CONTENT


@pytest.mark.parametrize("known", ["checksum", "etag"])
def test_a_part_of_another_file_is_not_gone_on_with(
    hub: StandInHub, file: RemoteFile, tmp_path: Path, known: str
) -> None:
    old = replace(file, checksum="sha256:0" if known == "checksum" else None)
    hub.faults.append(Fault("cut", 50_000, times=99))
    with pytest.raises(DownloadError):
        fetch(old, tmp_path / "f", patience=replace(PATIENCE, attempts=1))
    assert (tmp_path / f"f{PART}").stat().st_size > 0
    hub.faults.clear()
    if known == "etag":
        hub.repositories["a/b"].files["f"] = CONTENT[::-1]  # other bytes, the same length
        file = replace(file, checksum=None)
    hub.requests.clear()
    fetch(file, tmp_path / "f", patience=PATIENCE)
    assert (tmp_path / "f").read_bytes() == hub.repositories["a/b"].files["f"]
    assert len(hub.requests) == 1, "the server was told which content the part is of"
    assert (hub.requests[0][2] is None) == (known == "checksum")


def test_a_file_that_is_no_longer_the_listed_one_is_refused(
    hub: StandInHub, file: RemoteFile, tmp_path: Path
) -> None:
    other = replace(file, checksum=None, version='"old"')
    with pytest.raises(DatasetError, match=r"must be as it was listed.*--refresh download`"):
        fetch(other, tmp_path / "f", patience=PATIENCE)
    with pytest.raises(DatasetError, match=r"--refresh download-transfer`"):
        fetch(other, tmp_path / "f", patience=PATIENCE, stage="download-transfer")


def test_a_sound_copy_is_not_fetched_again(
    hub: StandInHub, file: RemoteFile, tmp_path: Path
) -> None:
    (tmp_path / "f").write_bytes(CONTENT)
    fetch(file, tmp_path / "f", patience=PATIENCE)
    assert hub.requests == []
    (tmp_path / "f").write_bytes(b"x" + CONTENT[1:])
    fetch(file, tmp_path / "f", patience=PATIENCE)
    assert (tmp_path / "f").read_bytes() == CONTENT


def test_the_wait_that_a_server_asks_for_is_kept(
    hub: StandInHub, file: RemoteFile, tmp_path: Path
) -> None:
    hub.faults.append(Fault("status", 429, {"Retry-After": "99"}))
    before = time.monotonic()
    fetch(file, tmp_path / "f", patience=PATIENCE)
    assert 0.3 <= time.monotonic() - before < 2, "as long as asked for, up to the bound"


def test_waits_grow_up_to_a_bound() -> None:
    patience = Patience(first_wait=1, longest_wait=10)
    waits = [patience.wait(failures, None) for failures in (1, 2, 3, 9)]
    assert [0.8 * n <= wait <= 1.2 * n for n, wait in zip((1, 2, 4, 10), waits, strict=True)]
    assert all(0.8 * n <= wait <= 1.2 * n for n, wait in zip((1, 2, 4, 10), waits, strict=True))
    assert patience.wait(1, 5.0) == 5.0


def test_a_wait_may_be_asked_for_as_seconds_or_as_a_date() -> None:
    assert asked_wait("7") == 7
    assert asked_wait("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert asked_wait("soon") is None
    assert asked_wait(None) is None


def test_a_stop_ends_the_wait(hub: StandInHub, file: RemoteFile, tmp_path: Path) -> None:
    hub.faults.append(Fault("status", 503, times=99))
    began = time.monotonic()
    with pytest.raises(InterruptedError, match="the same command goes on there"):
        fetch(
            file,
            tmp_path / "f",
            patience=replace(PATIENCE, first_wait=60, longest_wait=60),
            stop=lambda: time.monotonic() - began > 0.3,
        )
    assert time.monotonic() - began < 2


def test_the_token_goes_to_the_hub_and_not_to_where_it_redirects(
    hub: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.add("a/b", {"f.parquet": CONTENT})
    file = RemoteFile(
        name="f", url=f"{hub.url}/datasets/a/b/resolve/main/f.parquet", size=len(CONTENT)
    )
    fetch(file, tmp_path / "f", patience=PATIENCE)
    asked = {path.split("/")[1]: token for _, path, _, token in hub.requests}
    assert asked == {"datasets": "Bearer hf_secret", "cdn": None}


def test_offline_is_a_clear_error(
    hub: StandInHub, file: RemoteFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DatasetError, match="HF_HUB_OFFLINE forbids it"):
        fetch(file, tmp_path / "f", patience=PATIENCE)


@pytest.fixture
def stored() -> RemoteFile:
    """The same bytes in a store that fsspec knows, which publishes no checksum."""
    fsspec.filesystem("memory").pipe({"/bucket/f": CONTENT})
    return RemoteFile(name="f", url="memory://bucket/f", size=len(CONTENT))


@pytest.mark.parametrize(
    ("local", "shown", "message"),
    [
        (OSError(errno.ENOSPC, "full"), DatasetError, "The disk of .* is full"),
        (InterruptedError("Stopped."), InterruptedError, "Stopped"),
        (PermissionError(errno.EACCES, "no", "f.part"), PermissionError, r"f\.part"),
    ],
)
def test_an_error_of_this_computer_is_not_said_to_be_the_stores(
    stored: RemoteFile, tmp_path: Path, local: OSError, shown: type[Exception], message: str
) -> None:
    def report(done: int) -> None:
        if done:
            raise local

    with pytest.raises(shown, match=message):
        fetch(stored, tmp_path / "f", patience=PATIENCE, report=report)


@pytest.mark.parametrize("asked", ["info", "open", "read"])
@pytest.mark.parametrize(
    ("raised", "shown", "message"),
    [
        (RuntimeError("no\ncredentials."), DatasetError, "says RuntimeError: no credentials.$"),
        (PermissionError("no"), DatasetError, "credentials of its store"),
        (OSError("cut"), TryAgainError, "OSError: cut"),
    ],
)
def test_what_the_library_of_a_store_raises_is_one_clear_error(
    stored: RemoteFile,
    monkeypatch: pytest.MonkeyPatch,
    asked: str,
    raised: Exception,
    shown: type[Exception],
    message: str,
) -> None:
    def fail(*args: object, **others: object) -> None:
        raise raised

    filesystem = type(fsspec.filesystem("memory"))
    if asked == "read":
        monkeypatch.setattr("fsspec.implementations.memory.MemoryFile.read", fail, raising=False)
    else:
        monkeypatch.setattr(filesystem, asked, fail)
    with pytest.raises(shown, match=message):
        read_range(stored.url, 0, 10, PATIENCE)


@pytest.mark.parametrize("host", ["127.0.0.1", "there-is-none.invalid"])
def test_where_there_is_no_server_few_attempts_are_made(
    file: RemoteFile, tmp_path: Path, host: str
) -> None:
    with socket.socket() as closed:  # bound, and nobody listens
        closed.bind(("127.0.0.1", 0))
        url = f"http://{host}:{closed.getsockname()[1]}/f"
        with pytest.raises(DownloadError, match=r"3 attempts in a row failed.*ConnectError"):
            fetch(replace(file, url=url), tmp_path / "f", patience=replace(PATIENCE, attempts=5))


def test_a_part_of_a_file_must_not_drip_either(hub: StandInHub, file: RemoteFile) -> None:
    hub.faults.append(Fault("drip"))
    with pytest.raises(TryAgainError, match=r"only \d+ bytes came in 0 s"):
        read_range(file.url, 0, 500, PATIENCE)


def test_the_reading_of_a_part_of_a_file_can_be_stopped(hub: StandInHub, file: RemoteFile) -> None:
    hub.faults.append(Fault("drip"))
    with pytest.raises(InterruptedError, match="the same command goes on there"):
        read_range(file.url, 0, 500, replace(PATIENCE, stall_seconds=60), lambda: True)
