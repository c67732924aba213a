"""A folder that is written whole or not at all, and never over another."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from training.stage_files import OutputsError, full_disk_explained


def check_new(path: Path) -> None:
    """Make sure that there is nothing yet at `path`, or an empty folder.

    Raises:
        OutputsError: If there is.
    """
    try:
        taken = path.is_symlink() or (path.exists() and (not path.is_dir() or any(path.iterdir())))
    except OSError as error:
        raise OutputsError(f"{path} must be readable: {error.strerror}.") from error
    if taken:
        raise OutputsError(f"{path} exists already and is left as it is. Choose a new folder.")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder that gets the name `path` when the `with` block ends well.

    Until then it lies beside it, hidden; where the block fails, it is removed.

    Raises:
        OutputsError: If something is at `path`, it cannot be written, or the disk is full.
    """
    check_new(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    except OSError as error:
        raise OutputsError(f"{path} must be a place to write to: {error.strerror}.") from error
    try:
        with full_disk_explained(path):
            yield unfinished
            mask = os.umask(0)
            os.umask(mask)
            unfinished.chmod(0o777 & ~mask)  # mkdtemp lets nobody else in
            try:
                unfinished.rename(path)
            except OSError as error:
                raise OutputsError(f"{path} exists already and is left as it is.") from error
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
