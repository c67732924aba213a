"""Objects in stores, what goes wrong on the way to them, and addresses."""

import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from data.patience import Patience
from training import remote_store
from training.remote_store import (
    Inventory,
    LostError,
    Store,
    StoreAwayError,
    is_address,
    tidy_address,
)
from training.stage_files import FileRecord, OutputsError, sha256_of

if TYPE_CHECKING:
    from tests.standin_s3 import Fault, StandInS3

PATIENT = Patience(attempts=3, first_wait=0.01)


def failing_times(times: int, what: "Fault", method: str) -> Callable[[str], "Fault"]:
    """Let the first requests of a method fail."""
    left = [times]

    def fault(request: str) -> "Fault":
        if request.startswith(method) and left[0] > 0:
            left[0] -= 1
            return what
        return None

    return fault


def test_objects_are_written_read_listed_and_removed(address: str, tmp_path: Path) -> None:
    remote = Store(address)
    assert remote.read("pretrain/k/result.json") is None
    assert remote.sizes("pretrain/k") == {}
    remote.write("pretrain/k/result.json", b"{}")
    remote.write("pretrain/k/result.json", b"{ }")
    (tmp_path / "weights").write_bytes(b"0123456789")
    remote.upload(tmp_path / "weights", "pretrain/k/model/weights")
    remote.write("pretrain/other/result.json", b"1")
    assert remote.sizes("pretrain/k") == {"result.json": 3, "model/weights": 10}
    assert remote.download("pretrain/k/model/weights", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"0123456789"
    assert not remote.download("pretrain/k/nothing", tmp_path / "copy")
    remote.remove("pretrain/k/result.json")
    remote.remove("pretrain/k/result.json")
    assert remote.read("pretrain/k/result.json") is None


def test_what_is_there_is_not_created_again(address: str) -> None:
    remote = Store(address)
    assert remote.create("locks/a", b"first")
    assert not remote.create("locks/a", b"second")
    assert remote.read("locks/a") == b"first"
    assert remote.create("locks/a", b"first"), "our own, when an answer was lost"


FULL = """
import resource, signal, sys
from training import remote_store
from training.stage_files import OutputsError

remote = remote_store.Store(sys.argv[1])
assert remote.create("locks/before", b"x")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
for write in (remote.create, remote.write):
    try:
        print(write("locks/a", b"content"))
    except OutputsError as error:
        print(error)
print(sorted(remote.sizes("locks")))
"""


def test_a_folder_that_is_full_is_said_so_at_once_and_nothing_is_left_in_it(tmp_path: Path) -> None:
    """An object without its content would be taken for another's, and be waited for."""
    began = time.monotonic()
    found = subprocess.run(
        [sys.executable, "-c", FULL, f"file://{tmp_path}/store"],
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    *said, left = found.stdout.splitlines()
    assert len(said) == 2
    for line in said:
        assert re.search(r"locks/a is not: OSError: .*File too large.* Free some space", line)
    assert left == "['before']"
    assert time.monotonic() - began < 30, "asked once"


@pytest.mark.parametrize("fault", [500, 503, "cut"])
def test_a_store_that_fails_for_a_while_is_asked_again(
    s3: "StandInS3", fault: "Fault", tmp_path: Path
) -> None:
    remote = Store("s3://bucket/x", PATIENT)
    (tmp_path / "weights").write_bytes(bytes(10**6))
    s3.fault = failing_times(2, fault, "PUT")
    remote.upload(tmp_path / "weights", "weights")
    assert remote.sizes("") == {"weights": 10**6}
    s3.fault = failing_times(2, fault, "GET")
    assert remote.download("weights", tmp_path / "copy")
    assert sha256_of(tmp_path / "copy") == sha256_of(tmp_path / "weights")


@pytest.mark.parametrize("fault", [500, 503, "cut"])
def test_an_upload_that_never_succeeds_leaves_nothing_and_says_what_to_do(
    s3: "StandInS3", fault: "Fault", tmp_path: Path
) -> None:
    remote = Store("s3://bucket/x", PATIENT)
    (tmp_path / "weights").write_bytes(bytes(10**6))
    s3.fault = failing_times(1000, fault, "PUT")
    with pytest.raises(StoreAwayError, match=r"s3://bucket/x must be .* weights is not: .* again;"):
        remote.upload(tmp_path / "weights", "weights")
    s3.fault = lambda request: None
    assert remote.sizes("") == {}


def test_a_created_object_whose_answer_was_lost_is_ours(s3: "StandInS3") -> None:
    """The store has written it, and its library asks again and hears that it is there."""
    remote = Store("s3://bucket/x", PATIENT)
    remote._files.pipe_file("bucket/x/lock", b"ours")
    assert remote.create("lock", b"ours")
    assert not remote.create("lock", b"another's")


def test_a_port_that_is_closed_is_one_clear_line(
    s3: "StandInS3", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(OutputsError, match=r"s3://bucket/x must be .*127\.0\.0\.1:9.*network"):
        Store("s3://bucket/x", PATIENT).read("a")


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "credentials"), ({}, "As asked")],
)
def test_what_another_attempt_cannot_mend_is_said_at_once(
    s3: "StandInS3", change: dict[str, str], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in change.items():
        monkeypatch.setenv(name, value)
    s3.fault = lambda request: 403
    with pytest.raises(OutputsError, match=rf"{reason}.*AWS_ACCESS_KEY_ID") as raised:
        Store("s3://bucket/x").write("a", b"b")
    assert "\n" not in str(raised.value)
    assert not isinstance(raised.value, StoreAwayError), "no retry of the task helps"
    assert len(s3.seen) <= 1


def test_a_bucket_that_is_not_there_is_not_made(s3: "StandInS3") -> None:
    with pytest.raises(OutputsError, match="bucket does not exist"):
        Store("s3://other/x").write("a", b"b")
    assert not [request for request in s3.seen if request == "PUT /other"]


@pytest.mark.parametrize(
    ("place", "tidy"),
    [
        ("s3://bucket/a/b/", "s3://bucket/a/b"),
        ("S3:/bucket/a", "s3://bucket/a"),
        ("gs://bucket", "gs://bucket"),
        ("file:///tmp/../x", "file:///x"),
        ("file:/x", "file:///x"),
        ("memory://a", "memory://a"),
    ],
)
def test_an_address_has_one_form(place: str, tidy: str) -> None:
    assert is_address(place)
    assert tidy_address(place) == tidy
    assert tidy_address(tidy) == tidy


@pytest.mark.parametrize("place", ["https://host/a", "s3://", "simplecache::s3://bucket/a"])
def test_an_address_that_outputs_cannot_have_is_refused(place: str) -> None:
    assert is_address(place)
    with pytest.raises(OutputsError, match="An address for outputs must"):
        tidy_address(place)


@pytest.mark.parametrize("place", ["outputs", "/a/b", "~/x", "a:b", "C:/x", "../s3/x"])
def test_a_path_is_no_address(place: str) -> None:
    assert not is_address(place)


def test_an_unknown_kind_of_address_is_refused() -> None:
    with pytest.raises(OutputsError, match="must be of a kind that fsspec knows"):
        Store("nonsense://a/b")


@pytest.mark.parametrize("password", ["secret", "sec@ret", "s:ecret", ""])
def test_a_password_is_not_shown(password: str) -> None:
    with pytest.raises(OutputsError, match=r"nonsense://user:\*\*\*@host/b is not") as raised:
        Store(f"nonsense://user:{password}@host/b")
    assert "cret" not in str(raised.value)
    assert "ret@" not in str(raised.value)


@pytest.mark.parametrize(
    "address",
    ["abfs://container@account.dfs.core.windows.net/x", "sftp://me@host/x", "s3://bucket/a:b@c"],
)
def test_an_address_without_a_password_is_shown_as_it_is(address: str) -> None:
    """The command that resumes is made of it."""
    assert remote_store.without_login(address) == address


def test_a_file_is_fetched_verified_and_with_its_time(address: str, tmp_path: Path) -> None:
    remote = Store(address)
    remote.write("a", b"0123456789")
    made = tmp_path / "made"
    made.write_bytes(b"0123456789")
    record = FileRecord(sha256=sha256_of(made), size=10, modified_ns=1_700_000_000_123_456_789)
    remote_store.fetch(remote, "a", tmp_path / "deep" / "b", record)
    assert (tmp_path / "deep" / "b").read_bytes() == b"0123456789"
    assert (tmp_path / "deep" / "b").stat().st_mtime_ns == record.modified_ns
    remote.write("a", b"0123456780")
    with pytest.raises(LostError, match="a is damaged"):
        remote_store.fetch(remote, "a", tmp_path / "c", record)
    remote.remove("a")
    with pytest.raises(LostError, match="a is gone"):
        remote_store.fetch(remote, "a", tmp_path / "c", record)
    assert not (tmp_path / "c").exists()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["b"]


@pytest.mark.parametrize("name", ["../a", "/a", "b/../../a"])
def test_an_inventory_names_nothing_outside_of_its_folder(name: str) -> None:
    record = FileRecord(sha256="0", size=1)
    with pytest.raises(LostError, match="outside of its folder"):
        Inventory.read(Inventory(files={name: record}).as_bytes())
