"""Taking an archive apart without giving it a say in where anything lands.

Python's own filter for members (`filter="data"`) has been got round before (CVE-2025-4517,
CVE-2025-4330), so it is not relied on: only plain files and folders are made, one by one, below a
fresh folder, and nothing that is there already is opened.
"""

import gzip
import lzma
import os
import re
import shutil
import tarfile
import zlib
from pathlib import Path

from data.patience import Stop, never
from data.records import DatasetError

_PIECE = 2**20
_DAMAGE = (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError)


def extract(
    archive: Path,
    target: Path,
    *,
    most_files: int,
    most_bytes: int,
    stop: Stop = never,
) -> None:
    """Unpack a tar archive, compressed or not, into a folder that is there whole or not at all.

    Verify the archive's checksum before.

    Args:
        archive: The file.
        target: Folder to make; one that is there is replaced.
        most_files: Bound of the number of members.
        most_bytes: Bound of the bytes of all files, unpacked.
        stop: Asked before every member; true ends it.

    Raises:
        DatasetError: If a member is a link or a device, has a name that leads out of the folder,
            if there are more members or bytes than the bounds, or if the archive is damaged.
        InterruptedError: If `stop` said so.
    """
    fresh = target.with_name(f"{target.name}.unpacking")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    files, size = 0, 0
    try:
        with tarfile.open(archive, "r:*") as opened:
            for member in opened:
                if stop():
                    raise InterruptedError(
                        f"Stopped while unpacking {archive.name}; the same command begins anew."
                    )
                files += 1
                size += member.size
                if files > most_files or size > most_bytes:
                    raise _refused(
                        archive,
                        f"must have at most {most_files:,} members with {most_bytes:,} bytes, "
                        "it has more",
                    )
                _make(opened, member, fresh, archive)
    except _DAMAGE as error:
        shutil.rmtree(fresh, ignore_errors=True)
        raise _refused(archive, f"must be a whole tar archive, it is not ({error})") from error
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    shutil.rmtree(target, ignore_errors=True)
    fresh.replace(target)


def unsafe_name(name: str) -> str | None:
    """Say why a name from outside must not be used below a folder of ours.

    Args:
        name: With forward slashes.

    Returns:
        The reason in a few words; None if it may be used.
    """
    if not name or "\0" in name:
        return "it is empty or holds a zero byte"
    if name.startswith("/") or "\\" in name or re.match(r"[A-Za-z]:", name):
        return "it is absolute"
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        return "it leads upwards"
    if any(len(part.encode("utf-8", "surrogateescape")) > 255 for part in parts):
        return "it is too long"
    return None


def _make(opened: tarfile.TarFile, member: tarfile.TarInfo, fresh: Path, archive: Path) -> None:
    reason = unsafe_name(member.name)
    if reason is None and not (member.isreg() or member.isdir()):
        reason = "it is a link or a device"
    if reason is not None:
        raise _refused(
            archive,
            f"must hold plain files and folders below its own root; {member.name!r}: {reason}",
        )
    place = fresh / member.name
    # No link was made in there, so this cannot fail; should it ever, nothing is written.
    if not place.resolve().is_relative_to(fresh.resolve()):
        raise _refused(archive, f"must stay below its own root; {member.name!r} does not")
    if member.isdir():
        place.mkdir(parents=True, exist_ok=True)
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
    except FileExistsError as error:
        raise _refused(archive, f"must name every file once; {member.name!r} is there") from error
    with os.fdopen(handle, "wb") as copy:
        content = opened.extractfile(member)
        assert content is not None  # a regular file
        shutil.copyfileobj(content, copy, _PIECE)


def _refused(archive: Path, what: str) -> DatasetError:
    return DatasetError(
        f"{archive.name} {what}. Nothing of it was kept. Do not use it, or ask its publisher."
    )
