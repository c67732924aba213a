"""Fixtures for outputs at addresses: stores, and machines that know nothing of each other."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from training import remote_outputs

if TYPE_CHECKING:
    from fsspec.implementations.local import LocalFileSystem

    from tests.standin_s3 import StandInS3


@pytest.fixture(scope="session")
def s3_server() -> "Iterator[StandInS3]":
    from tests.standin_s3 import standin_s3  # its packages take a second to import

    with standin_s3() as server:
        yield server


@pytest.fixture
def s3(s3_server: "StandInS3", monkeypatch: pytest.MonkeyPatch) -> "Iterator[StandInS3]":
    """A stand-in for S3 with an empty bucket, which this process and its children find."""
    import fsspec

    for name, value in {
        "AWS_ENDPOINT_URL": s3_server.url,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_MAX_ATTEMPTS": "1",  # its library's own; ours are what is tested
    }.items():
        monkeypatch.setenv(name, value)
    s3_server.fault = lambda request: None
    kind = fsspec.get_filesystem_class("s3")
    kind.clear_instance_cache()
    files = kind()
    with suppress(FileNotFoundError):
        files.rm("bucket", recursive=True)
    files.mkdir("bucket")
    kind.clear_instance_cache()
    s3_server.seen.clear()
    yield s3_server
    kind.clear_instance_cache()


@pytest.fixture(params=["file", "memory", "s3"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place in a store."""
    if request.param == "s3":
        request.getfixturevalue("s3")
        return f"s3://bucket/{tmp_path.name}"
    return f"{request.param}://{tmp_path}/store"


@pytest.fixture
def simple_kind() -> "type[LocalFileSystem]":
    """A kind of address, `simple://`, whose library has only what fsspec does for all of them.

    So have sftp, smb, ftp and hdfs: it looks whether an object is there, and then writes it.
    """
    import fsspec
    from fsspec.implementations.local import LocalFileSystem

    class Simple(LocalFileSystem):  # type: ignore[misc]  # fsspec has no types
        protocol = "simple"

        def exists(self, path: str, **given: Any) -> bool:
            found = super().exists(path, **given)
            time.sleep(0.05)  # the way there and back
            return bool(found)

        @classmethod
        def _strip_protocol(cls, path: Any) -> Any:
            return LocalFileSystem._strip_protocol(str(path).replace("simple://", "file://"))

    fsspec.register_implementation("simple", Simple, clobber=True)
    return Simple


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """The outputs folder for an address on a machine, by the machine's name; nothing known yet."""

    def outputs(name: str, address: str) -> Path:
        monkeypatch.setenv("ROTVIT_CACHE", str(tmp_path / name))
        folder = remote_outputs.local_folder(address)
        remote_outputs._mirrors.pop(folder, None)
        return folder

    return outputs
