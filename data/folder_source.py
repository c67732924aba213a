"""Images in folders: one folder per class, or no classes at all.

The `datasets` library's imagefolder builder is not used here. Tried with version 5.2: it takes
class folders called "test" or "eval" for splits and drops all the others, it finds nothing in a
folder whose own path has `[` or `*` in it, and it lists all files once more, which we have listed
for the source's identity.
"""

import logging
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.records import DatasetError, Record, Source, Split, printable

EXTENSIONS = frozenset(
    {".apng", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm"}
    | {".ppm", ".tif", ".tiff", ".webp"}
)
"""File names that end so, in any case, are taken for images; others are left alone."""

SPLIT_NAMES: dict[str, Split] = {
    "train": "train",
    "test": "test",
    "val": "test",
    "validation": "test",
}
"""Names that divide a source. Its official validation images are our test images."""

_SPLITS: tuple[Split, ...] = ("train", "test")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _File:
    name: str  # relative to the root, with forward slashes
    size: int
    mtime_ns: int
    class_name: str | None


class FolderSource(Source):
    """The source behind `data.source=folder:<path>`.

    Classes are the first folders below the root (or below `train/` and `test/`), in alphabetical
    order. Images that lie in the root itself, or all in one folder, have no labels. Links are
    followed within the root only, so that a folder from elsewhere cannot name other people's files.
    """

    def __init__(self, path: str) -> None:
        """List the images.

        Raises:
            DatasetError: If the folder is missing or has no images, if only some images lie in
                class folders, or if the division into splits is not clear.
        """
        self.spec = f"folder:{path}"
        self._root = Path(path).expanduser().resolve()
        if not self._root.is_dir():
            raise DatasetError(f"{self.spec} must name a folder, and there is none.")
        walk = _Walk(self._root)
        self._files = {
            split: walk.list_images(below) for split, below in self._split_folders().items()
        }
        if walk.left_out:
            _log.warning(
                "%s: left out %d links that lead out of the folder, such as %s. Copy what they "
                "lead to, or name that folder itself.",
                self.spec,
                len(walk.left_out),
                walk.left_out[0],
            )
        for split, files in self._files.items():
            if not files:
                raise DatasetError(
                    f"{self.spec} must hold images, found none for {split}. Images "
                    f"are files that end in {', '.join(sorted(EXTENSIONS))}."
                )
        self.counts = {split: len(files) for split, files in self._files.items()}
        self.class_names = self._classes()

    def identity(self) -> dict[str, Any]:
        """Return names within the folder, sizes in bytes and times of all images."""
        return {
            "kind": "folder",
            "files": {
                split: [[file.name, file.size, file.mtime_ns] for file in files]
                for split, files in self._files.items()
            },
        }

    def records(self, split: Split, start: int = 0) -> Iterator[Record]:
        """Yield the images of `split` in the order of their names."""
        for file in self._files[split][start:]:
            label = None
            if self.class_names is not None and file.class_name is not None:
                label = self.class_names.index(file.class_name)
            yield Record(file.name, self._root / file.name, label)

    def _split_folders(self) -> dict[Split, str]:
        folders = sorted(path.name for path in self._root.iterdir() if path.is_dir())
        folders = [name for name in folders if not name.startswith(".")]
        if "train" not in folders or not set(folders) <= set(SPLIT_NAMES):
            return {"train": ""}
        tests = [name for name in folders if name != "train"]
        if len(tests) > 1:
            raise DatasetError(
                f"{self.spec} must hold one folder of test images, found "
                f"{' and '.join(tests)}. Name the two to use: {self.spec}/train as source and "
                f"{self.spec}/{tests[0]} as test_source."
            )
        return {"train": "train", **{SPLIT_NAMES[name]: name for name in tests}}

    def _classes(self) -> list[str] | None:
        train, test = ({file.class_name for file in self._files.get(s, [])} for s in _SPLITS)
        names = sorted(name for name in train if name is not None)
        if len(names) < 2:
            if names:
                _log.warning("%s: one folder is no classification; no labels.", self.spec)
            return None
        loose = next((f for files in self._files.values() for f in files if not f.class_name), None)
        if loose is not None:
            raise DatasetError(
                f"{self.spec} must have all images in class folders or none, found "
                f"class folders ({', '.join(names[:3])}, ...) and {loose.name} beside them. Move "
                "it into one of them, or all images into one folder."
            )
        unknown = sorted(name for name in test if name is not None and name not in train)
        if unknown:
            raise DatasetError(
                f"{self.spec}: test classes must be training classes, found "
                f"{', '.join(unknown[:5])} only among the test images."
            )
        return names


def list_images(root: Path) -> list[str]:
    """Return the names of all images below a folder, relative to it, sorted; whatever its folders.

    Hidden ones, and links that lead out of the folder, are left out.

    Raises:
        DatasetError: If it is no folder that can be listed, or has no images.
    """
    if not root.is_dir():
        raise DatasetError(f"{root} must be a folder of photos, and there is none.")
    names = [file.name for file in _Walk(root.resolve()).list_images("")]
    if not names:
        raise DatasetError(
            f"{root} must hold images, found none. Images are files that end in "
            f"{', '.join(sorted(EXTENSIONS))}."
        )
    return names


def _not_listed(error: OSError) -> None:
    """Stop: without this, `os.walk` would leave out all that is in such a folder."""
    raise DatasetError(
        f"{error.filename} must be readable, listing it failed: {error.strerror}. Change its "
        "permissions, or move it away."
    ) from error


class _Walk:
    """Lists images below a root, and remembers which links it did not follow."""

    def __init__(self, root: Path) -> None:
        self.left_out: list[str] = []
        self._root = root

    def list_images(self, below: str) -> list[_File]:
        """Return the images under `root/below`, sorted by name; hidden ones are left out."""
        top = self._root / below
        files: list[_File] = []
        if below and self._leads_out(top):
            return files
        for where, folders, names in os.walk(top, onerror=_not_listed, followlinks=True):
            folder = Path(where)
            folders[:] = [name for name in folders if self._may_enter(folder / name)]
            parts = folder.relative_to(top).parts
            prefix = "/".join([*folder.relative_to(self._root).parts, ""])
            for name in names:
                if name.startswith(".") or Path(name).suffix.lower() not in EXTENSIONS:
                    continue
                status = self._status(folder / name)
                if status is not None:
                    class_name = printable(parts[0]) if parts else None
                    files.append(_File(prefix + name, *status, class_name))
        return sorted(files, key=lambda file: file.name)

    def _may_enter(self, folder: Path) -> bool:
        if folder.name.startswith("."):
            return False
        if not folder.is_symlink():
            return True
        return not self._leads_out(folder) and not self._leads_back(folder)

    def _leads_back(self, link: Path) -> bool:
        """Tell whether a link leads to where the walk has come through: it would never end."""
        target = link.resolve()
        way = [each for each in link.parents if each.is_relative_to(self._root)]
        return any(each.resolve().is_relative_to(target) for each in way)

    def _leads_out(self, path: Path) -> bool:
        """Tell whether a link leads out of the root, and remember it if so."""
        try:
            if not path.is_symlink() or path.resolve().is_relative_to(self._root):
                return False
        except (OSError, RuntimeError):
            return False  # a link to itself leads nowhere: preparation sets it aside
        self.left_out.append(path.relative_to(self._root).as_posix())
        return True

    def _status(self, path: Path) -> tuple[int, int] | None:
        """Return size in bytes and time of an image; None if it is none of this folder's."""
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode):
            if self._leads_out(path):
                return None
            try:
                status = path.stat()
            except OSError:
                # A link that leads nowhere: preparation sets it aside and says so.
                return 0, 0
        return status.st_size, status.st_mtime_ns
