"""The catalogue of a download: which files a remote source has, and what is in them.

It is what the download stage makes; with it a source needs the network no more, or, for one that
is too large to keep, no more than for the files themselves.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data.records import DatasetError, Split
from data.shards import digest_of, write_json

FILE_NAME = "catalogue.json"
"""Name of the catalogue in the directory of a download."""

FORMAT = 1
"""Raised when the content of the file changes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFile:
    """One file of a remote source, and how to tell that a copy is whole."""

    name: str
    """Its path within the source, and below `folder` of the catalogue."""
    url: str
    """Where it lies: `https://`, or any other address that fsspec knows."""
    size: int
    """In bytes."""
    checksum: str | None = None
    """`sha256:...`, `md5:...` or `git:...` (the name of a blob) as its publisher states it. Where
    nobody does, None until the download is finished, and for a kept file that of the copy then."""
    version: str | None = None
    """Tells this content from another one at the same address, before all of it is here."""
    split: Split | None = None
    """The images it holds; None for an archive of all of them."""
    rows: int = 0
    """Images in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalogue:
    """What a remote source holds.

    Attributes:
        spec: What the user wrote.
        origin: What it was resolved to, for people: repository and commit, or address.
        files: In the order of their images.
        counts: Images per split.
        class_names: In the order of the labels; None if the images have no labels.
        layout: Tables with images in them, or an archive of class folders.
        kept: Whether the files lie in the directory of the download; those that do not are
            fetched as they are read.
        image: Column of the images, in tables.
        label: Column of the labels, in tables; None if there is none.
        values: The values in that column, in the order of the labels, where they are not numbers
            from 0 already.
        root: Folder of the images, in an archive.
        folders: Class folders, in the order of `class_names`, in an archive.
        unpacked: Number and bytes of the files of an archive, once it is taken apart.
    """

    spec: str
    origin: str
    files: Sequence[RemoteFile]
    counts: Mapping[Split, int]
    class_names: Sequence[str] | None
    layout: str = "parquet"
    kept: bool = True
    image: str = ""
    label: str | None = None
    values: Sequence[Any] | None = None
    root: str = ""
    folders: Sequence[str] = ()
    unpacked: Sequence[int] = ()

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def identity(self) -> dict[str, Any]:
        """Return what tells these images from others: content, and no location."""
        return {
            "kind": self.layout,
            "files": [
                [file.split, file.name, file.size, file.checksum or file.version]
                for file in self.files
            ],
            "columns": [self.image, self.label, self.root],
            "classes": None if self.class_names is None else list(self.class_names),
        }

    def files_of(self, split: Split) -> list[RemoteFile]:
        """Return the files with images of a split, in their order."""
        return [file for file in self.files if file.split == split]


def folder_of(directory: Path, spec: str) -> Path:
    """Return where the files of a source lie in the directory of a download."""
    plain = "".join(sign if sign.isalnum() or sign in "._-" else "-" for sign in spec)[:60]
    return directory / "files" / f"{plain.strip('.')}-{digest_of(spec)[:6]}"


def write(directory: Path, catalogues: Sequence[Catalogue]) -> None:
    """Write the catalogues of a download."""
    times = {
        f"{place.relative_to(directory)}": place.stat().st_mtime_ns
        for catalogue in catalogues
        for place in kept_files(directory, catalogue)
        if place.is_file()
    }
    content = {"format": FORMAT, "sources": [asdict(each) for each in catalogues], "times": times}
    write_json(directory / FILE_NAME, content)


def read(directory: Path) -> list[Catalogue]:
    """Return the catalogues of a download.

    Raises:
        DatasetError: If there are none, or they cannot be read.
    """
    return _read(directory)[0]


def kept_files(directory: Path, catalogue: Catalogue) -> list[Path]:
    """Return where the files of a source lie, if they are kept."""
    folder = folder_of(directory, catalogue.spec)
    if not catalogue.kept or catalogue.layout == "archive":  # taken apart, and deleted then
        return []
    return [folder / file.name for file in catalogue.files]


def was_finished(directory: Path, catalogue: Catalogue) -> bool:
    """Tell whether all files of a source, one that is kept, have been here once.

    Raises:
        DatasetError: As `read`.
    """
    times = _read(directory)[1]
    return all(
        f"{path.relative_to(directory)}" in times for path in kept_files(directory, catalogue)
    )


def count_files(folder: Path) -> list[int]:
    """Return number and bytes of the files below a folder."""
    sizes = [
        (Path(where) / name).lstat().st_size
        for where, _, names in os.walk(folder)
        for name in names
    ]
    return [len(sizes), sum(sizes)]


def is_whole(path: Path, file: RemoteFile) -> bool:
    """Tell whether a copy has the length and the checksum of a file. Reads all of it."""
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    return file.checksum is None or checksum_of(path, file.checksum) == file.checksum


def checksum_of(path: Path, like: str) -> str:
    """Return the checksum of a file, of the kind of `like`, such as `sha256:...`."""
    kind = like.partition(":")[0]
    with path.open("rb") as file:
        if kind == "git":
            start = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
            return f"git:{hashlib.file_digest(file, lambda: start).hexdigest()}"
        return f"{kind}:{hashlib.file_digest(file, kind).hexdigest()}"


def verify(directory: Path) -> str | None:
    """Tell whether a download is as it was written; looks at sizes and times.

    A file whose time has changed, such as a copied one, is read and compared.

    Returns:
        None if it is sound, else the first thing that is wrong, in one line.
    """
    try:
        catalogues, times = _read(directory)
    except DatasetError as error:
        return str(error)
    for catalogue in catalogues:
        if catalogue.layout == "archive":
            found = count_files(folder_of(directory, catalogue.spec) / catalogue.root)
            if found != list(catalogue.unpacked):
                return f"{catalogue.root} has {found[0]} files, {found[1]} bytes, not all it had"
        for path, file in zip(kept_files(directory, catalogue), catalogue.files, strict=False):
            if not path.is_file():
                return f"{file.name} is gone"
            status = path.stat()
            if status.st_size != file.size:
                return f"{file.name} has {status.st_size} bytes instead of {file.size}"
            written = times.get(f"{path.relative_to(directory)}")
            if status.st_mtime_ns != written and not is_whole(path, file):
                return f"{file.name} has other bytes than were downloaded"
    return None


def _read(directory: Path) -> tuple[list[Catalogue], dict[str, int]]:
    path = directory / FILE_NAME
    try:
        content = json.loads(path.read_bytes())
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}")
        found = []
        for source in content["sources"]:
            files = [RemoteFile(**file) for file in source["files"]]
            found.append(replace(Catalogue(**source), files=files))
        return found, dict(content["times"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DatasetError(
            f"{path} must be the catalogue of a download, reading it failed: {error!r}. Run "
            "`rotvit download` with the same settings."
        ) from error
