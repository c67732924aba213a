"""What was pushed to an address is there once, whole, and makes a prepared directory elsewhere."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import numpy as np
import pytest

from data import prepare as module
from data import pushed_shards, remote_files
from data.manifest import read as read_manifest
from data.patience import DownloadError, Patience
from data.prepare import prepare
from data.prepared import PreparedData, verify
from data.pushed_shards import FILE_NAME, Pushed, checked_address, push, take
from data.records import DatasetError, Source
from data.shards import pixels_path

MakeSource = Callable[..., Source]

ADDRESS = "memory://bucket/prefix/key"
PATIENCE = Patience(attempts=2, first_wait=0.01, longest_wait=0.01)


@pytest.fixture(autouse=True)
def empty_store() -> Iterator[None]:
    """Nothing is at any `memory://` address."""
    store = fsspec.filesystem("memory")
    store.store.clear()
    yield
    store.store.clear()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROTVIT_SHARD_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def directory(
    tmp_path: Path,
    list_source: MakeSource,
    noise_images: Callable[..., list[Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """Prepared images of 6 px in shards of 4: 4 + 4 + 2 for training and 3 for testing."""
    return make(tmp_path / "prepared", list_source, noise_images, monkeypatch)


def make(
    directory: Path,
    list_source: MakeSource,
    noise_images: Callable[..., list[Any]],
    monkeypatch: pytest.MonkeyPatch,
    *,
    seed: int = 0,
    **options: Any,
) -> Path:
    monkeypatch.setattr(module, "SHARD_IMAGES", 4)
    source = list_source(
        noise_images(10, 6, 6, seed),
        noise_images(3, 6, 6, seed + 1),
        labels={"train": [i % 3 for i in range(10)], "test": [0, 1, 2]},
        class_names=["a", "b", "c"],
    )
    prepare(source, directory, side=6, report=lambda done, total: None, workers=1, **options)
    return directory


def pushed(directory: Path, address: str = ADDRESS, **options: Any) -> Pushed:
    return push(directory, address, report=lambda done, total: None, patience=PATIENCE, **options)


def taken(directory: Path, made_from: str, address: str = ADDRESS) -> object:
    return take(
        address,
        directory,
        made_from=made_from,
        report=lambda done, total: None,
        patience=PATIENCE,
    )


def delete_pixels(directory: Path) -> None:
    found = read_manifest(directory)
    for entry in found.entries:
        pixels_path(directory, entry.name, found.pixel_format).unlink()


def content(directory: Path) -> list[Any]:
    opened = PreparedData.open(directory)
    assert opened.test is not None
    return [
        opened.fingerprint,
        opened.class_names,
        *(
            values.tolist()
            for split in (opened.train, opened.test)
            for values in (split.gather(np.arange(len(split))), split.labels, split.hashes())
            if values is not None
        ),
    ]


def names_there() -> list[str]:
    return sorted(fsspec.filesystem("memory").find("/bucket/prefix/key"))


@pytest.mark.parametrize("pixel_format", ["raw", "jpeg"])
def test_images_are_the_same_without_their_pixels_here_and_elsewhere(
    tmp_path: Path,
    list_source: MakeSource,
    noise_images: Callable[..., list[Any]],
    monkeypatch: pytest.MonkeyPatch,
    pixel_format: str,
) -> None:
    directory = make(
        tmp_path / "prepared", list_source, noise_images, monkeypatch, pixel_format=pixel_format
    )
    expected = content(directory)
    pushed(directory)
    assert content(directory) == expected
    delete_pixels(directory)
    assert content(directory) == expected
    assert verify(directory, full=False) is None
    assert verify(directory, full=True) is None
    other = tmp_path / "other"
    assert taken(other, read_manifest(directory).made_from) == read_manifest(directory)
    assert content(other) == expected
    assert verify(other, full=True) is None
    assert not list(other.glob("*.npy")) + list(other.glob("*.jpegs"))


def test_a_folder_is_an_address(directory: Path, tmp_path: Path) -> None:
    expected = content(directory)
    there = tmp_path / "shared disk" / "key"
    assert pushed(directory, str(there)).address == there.as_uri()
    delete_pixels(directory)
    assert content(directory) == expected


def test_what_is_there_is_not_copied_again(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed(directory)
    copied: list[str] = []
    original = remote_files.put

    def counting(path: Path, url: str) -> None:
        copied.append(path.name)
        original(path, url)

    monkeypatch.setattr(pushed_shards, "put", counting)
    pushed(directory)
    assert set(copied) == {"manifest.json", FILE_NAME}
    # A copy that was cut short, and one whose digests are missing.
    fsspec.filesystem("memory").pipe("/bucket/prefix/key/train-00001.npy", b"short")
    fsspec.filesystem("memory").rm("/bucket/prefix/key/train-00002.index")
    copied.clear()
    pushed(directory)
    assert {name.partition(".")[0] for name in copied} == {
        "manifest",
        "pushed",
        "train-00001",
        "train-00002",
    }
    delete_pixels(directory)
    assert verify(directory, full=True) is None


@pytest.mark.parametrize("left", [b"", b'{"format": 99}'])
def test_a_note_there_that_cannot_be_read_is_written_anew(directory: Path, left: bytes) -> None:
    """Of a push that was cut off, or of another version."""
    pushed(directory)
    fsspec.filesystem("memory").pipe(f"/bucket/prefix/key/{FILE_NAME}", left)
    pushed(directory)
    delete_pixels(directory)
    assert verify(directory, full=True) is None


def test_a_file_in_a_folder_has_its_name_when_it_is_whole(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(source: BinaryIO, target: BinaryIO) -> None:
        target.write(source.read(10))
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.copyfileobj", cut_off)
    with pytest.raises(KeyboardInterrupt):
        pushed(directory, str(tmp_path / "there"))
    assert not list((tmp_path / "there").glob("*.npy"))


def test_a_push_that_was_cut_off_does_not_count_and_goes_on(
    directory: Path, tmp_path: Path
) -> None:
    shards = 0

    def stop() -> bool:
        nonlocal shards
        shards = sum(name.endswith(".index") for name in names_there())
        return shards >= 2

    with pytest.raises(InterruptedError):
        pushed(directory, stop=stop)
    made_from = read_manifest(directory).made_from
    assert taken(tmp_path / "other", made_from) is None
    assert not (directory / FILE_NAME).exists()
    pushed(directory)
    assert taken(tmp_path / "other", made_from) is not None


def test_other_images_are_not_mixed_with_those_that_are_there(
    directory: Path,
    tmp_path: Path,
    list_source: MakeSource,
    noise_images: Callable[..., list[Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pushed(directory)
    other = make(tmp_path / "b", list_source, noise_images, monkeypatch, seed=5)
    with pytest.raises(DatasetError, match="must be empty or hold these images"):
        pushed(other)
    with pytest.raises(DatasetError, match="must hold images made from this source"):
        taken(tmp_path / "c", "another digest")
    assert not (tmp_path / "c" / "manifest.json").exists()


def test_a_damaged_shard_is_not_pushed(directory: Path) -> None:
    path = directory / "train-00001.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(DatasetError, match=r"train-00001\.npy must be there as it was prepared"):
        pushed(directory)
    assert not any("train-00001" in name or FILE_NAME in name for name in names_there())


@pytest.mark.parametrize("name", ["train-00001.json", "train-00001.index"])
def test_a_damaged_file_at_the_address_is_not_taken(
    directory: Path, tmp_path: Path, name: str
) -> None:
    pushed(directory)
    store = fsspec.filesystem("memory")
    path = f"/bucket/prefix/key/{name}"
    store.pipe(path, store.cat_file(path)[:-1] + b"x")
    with pytest.raises(DatasetError, match=f"{name} must be as it was pushed"):
        taken(tmp_path / "other", read_manifest(directory).made_from)
    assert not (tmp_path / "other" / "manifest.json").exists()


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"format": 99}'])
def test_a_damaged_note_of_where_they_are_is_one_clear_error(
    directory: Path, content: bytes
) -> None:
    pushed(directory)
    delete_pixels(directory)
    (directory / FILE_NAME).write_bytes(content)
    with pytest.raises(DatasetError, match=r"must say where prepared images lie.*Push them again"):
        PreparedData.open(directory)
    assert "must say where" in str(verify(directory, full=False))


def test_a_note_of_other_images_is_refused(directory: Path) -> None:
    pushed(directory)
    delete_pixels(directory)
    path = directory / FILE_NAME
    path.write_text(path.read_text().replace(read_manifest(directory).fingerprint, "0" * 64))
    with pytest.raises(DatasetError, match="it is of others"):
        PreparedData.open(directory)


@pytest.mark.parametrize("harm", ["change", "remove"])
def test_changed_digests_are_found(directory: Path, harm: str) -> None:
    pushed(directory)
    delete_pixels(directory)
    path = directory / "test-00000.index"
    if harm == "remove":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert verify(directory, full=False) == "test-00000.index is missing or has changed"
    with pytest.raises(DatasetError, match="does not fit what was pushed"):
        PreparedData.open(directory)


def test_other_pixels_at_the_address_are_found_by_the_full_check(directory: Path) -> None:
    pushed(directory)
    delete_pixels(directory)
    store = fsspec.filesystem("memory")
    path = "/bucket/prefix/key/test-00000.npy"
    store.pipe(path, store.cat_file(path)[:-1] + b"x")
    assert verify(directory, full=False) is None
    assert verify(directory, full=True) == f"test-00000.npy has other pixels at {ADDRESS}"


def test_pixels_that_are_here_are_read_here(directory: Path) -> None:
    expected = content(directory)
    pushed(directory)
    fsspec.filesystem("memory").store.clear()
    assert content(directory) == expected


def test_prepared_again_the_images_here_count(
    directory: Path,
    list_source: MakeSource,
    noise_images: Callable[..., list[Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = content(directory)
    pushed(directory)
    delete_pixels(directory)
    fsspec.filesystem("memory").store.clear()
    make(directory, list_source, noise_images, monkeypatch)
    assert content(directory) == expected


def test_a_store_that_fails_for_ever_is_one_clear_error(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **others: object) -> None:
        raise ConnectionResetError("cut")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "put_file", fail)
    with pytest.raises(DownloadError, match=r"2 attempts in a row failed.*cut"):
        pushed(directory)


@pytest.mark.parametrize(
    "address",
    ["s3://user:secret@bucket/x", "https://host/x?token=secret", "https://secret@host/x"],
)
def test_an_address_with_a_secret_is_refused_and_not_repeated(address: str) -> None:
    with pytest.raises(DatasetError, match="must have no user, password or query") as refused:
        checked_address(address)
    assert "secret" not in str(refused.value)


def test_a_web_server_takes_no_files(directory: Path) -> None:
    shutil.copy(directory / "manifest.json", directory / FILE_NAME)
    with pytest.raises(DatasetError, match="put into a store"):
        remote_files.put(directory / FILE_NAME, "https://host.invalid/x")
