"""An archive lands below its folder, whole, or not at all."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from data.archives import extract, unsafe_name
from data.records import DatasetError

Make = Callable[..., Path]


def plain(name: str, content: bytes = b"x") -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    return info, content


def special(name: str, kind: bytes, target: str = "") -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info, b""


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Make `archive.tgz` of members."""

    def make(*members: tuple[tarfile.TarInfo, bytes]) -> Path:
        path = tmp_path / "archive.tgz"
        with tarfile.open(path, "w:gz") as archive:
            for info, content in members:
                archive.addfile(info, io.BytesIO(content))
        return path

    return make


def unpack(archive: Path, most_files: int = 10, most_bytes: int = 1000) -> Path:
    target = archive.parent / "below" / "target"
    extract(archive, target, most_files=most_files, most_bytes=most_bytes)
    return target


def everything(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_files_and_folders_are_unpacked(make: Make) -> None:
    target = unpack(make(special("a", tarfile.DIRTYPE), plain("a/b", b"12"), plain("./c/d")))
    assert everything(target) == {"a", "a/b", "c", "c/d"}
    assert (target / "a" / "b").read_bytes() == b"12"
    assert (target / "a" / "b").stat().st_mode & 0o111 == 0


ATTACKS = {
    "absolute": plain("/tmp/rotvit-attack"),
    "upwards": plain("../escaped"),
    "upwards in between": plain("a/../../escaped"),
    "backslash": plain("..\\escaped"),
    "drive": plain("C:escaped"),
    "link out": special("a", tarfile.SYMTYPE, "/etc"),
    "link in": special("a", tarfile.SYMTYPE, "b"),
    "hard link out": special("a", tarfile.LNKTYPE, "../../secret"),
    "device": special("a", tarfile.CHRTYPE),
    "block device": special("a", tarfile.BLKTYPE),
    "pipe": special("a", tarfile.FIFOTYPE),
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_an_attack_is_refused_and_nothing_is_kept(
    make: Make, tmp_path: Path, attack: tuple[tarfile.TarInfo, bytes]
) -> None:
    (tmp_path / "secret").write_text("s")
    archive = make(plain("fine"), attack)
    before = everything(tmp_path)
    with pytest.raises(DatasetError, match=r"archive\.tgz must hold plain files.*Nothing of it"):
        unpack(archive)
    assert everything(tmp_path) - before == {"below"}
    assert not Path("/tmp/rotvit-attack").exists()


def test_a_file_through_a_link_of_the_same_archive_is_refused(make: Make, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    archive = make(special("a", tarfile.SYMTYPE, str(tmp_path / "outside")), plain("a/escaped"))
    with pytest.raises(DatasetError, match="'a': it is a link"):
        unpack(archive)
    assert everything(tmp_path / "outside") == set()


def test_a_name_that_comes_twice_is_refused(make: Make) -> None:
    with pytest.raises(DatasetError, match="every file once"):
        unpack(make(plain("a", b"1"), plain("a", b"2")))


@pytest.mark.parametrize(
    "members",
    [[plain(str(n)) for n in range(11)], [plain("a", b"0" * 600), plain("b", b"0" * 600)]],
)
def test_more_than_the_bounds_is_refused(
    make: Make, members: list[tuple[tarfile.TarInfo, bytes]]
) -> None:
    with pytest.raises(DatasetError, match="at most 10 members with 1,000 bytes"):
        unpack(make(*members))


@pytest.mark.parametrize("damage", ["cut", "no archive"])
def test_a_damaged_archive_is_refused(make: Make, damage: str) -> None:
    archive = make(*(plain(f"{n}", bytes(range(90))) for n in range(9)))
    content = archive.read_bytes()
    archive.write_bytes(content[: len(content) // 2] if damage == "cut" else b"<html>")
    with pytest.raises(DatasetError, match="must be a whole tar archive"):
        unpack(archive)


def test_what_was_there_is_replaced_only_by_a_whole_archive(make: Make) -> None:
    target = unpack(make(plain("old")))
    with pytest.raises(DatasetError):
        unpack(make(plain("new"), plain("../x")))
    assert everything(target) == {"old"}
    unpack(make(plain("new")))
    assert everything(target) == {"new"}


def test_a_stop_leaves_nothing(make: Make, tmp_path: Path) -> None:
    with pytest.raises(InterruptedError):
        extract(make(plain("a")), tmp_path / "t", most_files=9, most_bytes=9, stop=lambda: True)
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("name", ["", "/a", "a/../b", "..", "a\\b", "C:x", "a\0b", "x" * 300])
def test_names_that_lead_elsewhere_are_told(name: str) -> None:
    assert unsafe_name(name) is not None


@pytest.mark.parametrize("name", ["a", "a/b.c", "./a", "a..b", "320px/train/0000.parquet"])
def test_plain_names_are_fine(name: str) -> None:
    assert unsafe_name(name) is None
