"""Photos turned the right way up: what a rotation model is sure of, and nothing else.

A photo is judged as viewers show it, with its EXIF orientation applied.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from uuid import uuid4

from torch import Tensor

from data.decode import UndecodableError, read_file
from data.decoding_pool import decoding_pool
from data.folder_source import list_images
from data.processors import available_processors
from data.rotation import NUM_ROTATIONS
from data.upright_files import LossError, turn_by_encoding, turn_file
from models.errors import ModelError
from training.new_folder import check_new, new_folder
from training.prediction import Predictor
from training.stage_files import FULL_DISK, OutputsError, full_disk_explained

Outcome = Literal["turned", "upright", "skipped"]

Found = tuple[str, bytes, Tensor] | tuple[str, str]
"""Name, content and pixels of a photo; or its name and why there are none."""


@dataclass(frozen=True, kw_only=True)
class Photo:
    """What became of one photo.

    Attributes:
        name: Relative to the folder.
        outcome: `upright` photos are copied as they are, `skipped` ones are left alone.
        turned: Degrees counter-clockwise by which it was found turned; None if undecodable.
        probability: Of that, in [0, 1].
        reason: Why it was skipped.
    """

    name: str
    outcome: Outcome
    turned: int | None = None
    probability: float | None = None
    reason: str = ""


def turn_upright(
    predictor: Predictor,
    folder: Path,
    out: Path | None,
    *,
    min_confidence: float,
    reencode: bool = False,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> list[Photo]:
    """Write the photos of a folder, and of the folders in it, the right way up.

    Args:
        predictor: Tells rotations.
        folder: Where the photos are. Hidden ones and links that lead out of it are not listed.
        out: Folder to make, with the same names; None turns the files in place, each one replaced
            as a whole.
        min_confidence: Photos whose most probable turn has less than this are skipped.
        reencode: Encode anew what cannot be turned without loss, instead of skipping it.
        report: Called with the numbers of photos done and in all.

    Returns:
        All photos, in the order of their names.

    Raises:
        ModelError: If the model tells no rotations.
        DatasetError: If there are no images.
        OutputsError: If `out` exists or something cannot be written.
    """
    if not predictor.tells_rotations:
        raise ModelError(
            "Which way up photos are is told by a model of pretrain; this one tells "
            f"{', '.join(predictor.label_names[:5])}."
        )
    names = list_images(folder)
    if out is not None:
        check_new(out)
    root = folder.resolve()
    photos = []
    with (
        nullcontext(root) if out is None else new_folder(out) as target,
        full_disk_explained(folder if out is None else out),
        decoding_pool(available_processors()) as pool,
    ):
        for found in pool.in_order(lambda name: _read(predictor, root, name), names):
            photo, turned = _judge(predictor, found, min_confidence, reencode)
            with _writing_explained(target / photo.name):
                if out is None and turned is not None:
                    photo = _replace(root / photo.name, turned, photo)
                elif out is not None and photo.outcome != "skipped":
                    _copy(root / photo.name, target / photo.name, turned)
            photos.append(photo)
            report(len(photos), len(names))
    return photos


def _read(predictor: Predictor, root: Path, name: str) -> Found:
    try:
        content = read_file(root / name)
        return name, content, predictor.read(content)
    except UndecodableError as error:
        return name, str(error)
    except OSError as error:
        return name, str(error.strerror)


def _judge(
    predictor: Predictor, found: Found, min_confidence: float, reencode: bool
) -> tuple[Photo, bytes | None]:
    """Return what becomes of a photo, and its content where that changes."""
    if len(found) == 2:
        return Photo(name=found[0], outcome="skipped", reason=found[1]), None
    name, content, image = found
    probabilities = predictor.turns(image[None])[0]
    turn = int(probabilities.argmax())
    probability = float(probabilities[turn])

    def photo(outcome: Outcome, reason: str = "") -> Photo:
        return Photo(
            name=name, outcome=outcome, turned=90 * turn, probability=probability, reason=reason
        )

    if probability < min_confidence:
        return photo("skipped", "not sure enough"), None
    if turn == 0:
        return photo("upright"), None
    back = NUM_ROTATIONS - turn
    try:
        try:
            return photo("turned"), turn_file(content, back)
        except LossError:
            if not reencode:
                raise
            return photo("turned"), turn_by_encoding(content, back)
    except LossError as error:
        return photo("skipped", str(error)), None


def _copy(source: Path, target: Path, content: bytes | None) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if content is None:
        shutil.copyfile(source, target)
    else:
        target.write_bytes(content)
    shutil.copystat(source, target)  # people sort photos by their time


def _replace(path: Path, content: bytes, photo: Photo) -> Photo:
    """Put another content in the place of a file, whole or not at all."""
    if path.resolve() != path:  # what it leads to has a turn of its own
        return Photo(
            name=photo.name,
            outcome="skipped",
            turned=photo.turned,
            probability=photo.probability,
            reason="a link",
        )
    unfinished = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        with unfinished.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        shutil.copymode(path, unfinished)  # not the time: back-ups go by it
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    return photo


@contextmanager
def _writing_explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in FULL_DISK:
            raise
        raise OutputsError(f"{path} must be writable: {error.strerror}.") from error
