"""Noise in files like those of a source: of the same sizes, formats, tables and orientations.

What such files show has no up. If a classifier can tell which way it was turned after it has passed
through the data path, it was the files' form, or the path, that gave it away.
"""

import io
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, JpegImagePlugin

from data.canary import pink_noise
from data.decode import FORMATS, MAX_PIXELS, UndecodableError, orientation_of, read_file
from data.randomness import derive_seed
from data.records import DatasetError, Record, Source, Split

_ORIENTATION = 0x0112  # tag of EXIF
_NOISE_SIDE_PX = 1024  # of the noise that all files are cut from; it repeats without a seam


@dataclass(frozen=True, slots=True)
class FileKind:
    """How a file is made, apart from what it shows."""

    width: int
    """As it is stored, in pixels: before the orientation in EXIF is applied."""
    height: int
    format: str | None
    """As Pillow names it; None for a picture that its source draws."""
    mode: str = "RGB"
    """L for grey pictures, RGB for all others; deeper than 8 bits are written with 8."""
    orientation: int = 1
    """In EXIF, 1 to 8."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What Pillow is told on saving: the tables and the subsampling of JPEG, the kind of WebP."""


def kind_of(image: bytes | Path | Image.Image) -> FileKind | None:
    """Return how a file is made; None if it is no picture that preparation would take.

    Args:
        image: The encoded file, its path, or a picture.
    """
    if isinstance(image, Image.Image):
        return FileKind(*image.size, format=None)
    try:
        content = read_file(image) if isinstance(image, Path) else image
        picture = Image.open(io.BytesIO(content), formats=FORMATS)
    except (UndecodableError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    if picture.width * picture.height > MAX_PIXELS:
        return None
    options: dict[str, Any] = {}
    if isinstance(picture, JpegImagePlugin.JpegImageFile):
        # Tables of 16 bits are not for baseline JPEG, which is what Pillow writes.
        tables = [[min(step, 255) for step in t] for t in picture.quantization.values()]
        options = {"qtables": tables, "subsampling": JpegImagePlugin.get_sampling(picture)}
    elif picture.format == "WEBP":
        options = {"lossless": b"VP8L" in content[:64]}
    orientation = orientation_of(picture)
    width, height = picture.size
    if picture.format == "TIFF" and orientation >= 5:  # Pillow tells the size of what it will show
        width, height = height, width
    return FileKind(
        width,
        height,
        # A JPEG file of several pictures has a name of its own.
        format="JPEG" if picture.format == "MPO" else picture.format,
        mode="L" if picture.mode in ("1", "L") else "RGB",
        orientation=orientation,
        options=options,
    )


class LookalikeSource(Source):
    """Noise images in the form of a sample of files, each form in turn."""

    spec = "lookalikes"
    class_names = None

    def __init__(self, kinds: Iterable[FileKind], *, train: int, test: int, seed: int) -> None:
        """Make the noise.

        Args:
            kinds: How the files are made; see `kinds_of`.
            train: Images to make for the train split.
            test: Images to make for the test split.
            seed: Of the noise.
        """
        self.kinds = tuple(kinds)
        self.counts = {"train": train, "test": test}
        self._seed = seed
        self._noise = pink_noise(np.random.default_rng([seed]), _NOISE_SIDE_PX)

    def identity(self) -> dict[str, Any]:
        """Return what determines the files."""
        return {
            "kind": self.spec,
            "files": [repr(kind) for kind in self.kinds],
            "counts": self.counts,
            "seed": self._seed,
        }

    def records(self, split: Split, start: int = 0) -> Iterator[Record]:
        """Yield noise as encoded files, or as pictures where the source draws its own."""
        for index in range(start, self.counts[split]):
            rng = np.random.default_rng(derive_seed(self._seed, split, index))
            kind = self.kinds[index % len(self.kinds)]
            noise = self._cut(rng, kind.width, kind.height)
            yield Record(f"{split}/{index}", _encode(noise, kind), None)

    def _cut(self, rng: np.random.Generator, width: int, height: int) -> NDArray[np.uint8]:
        """Return `(height, width, 3)`, from a random place, turned and mirrored at random.

        So every turn of what is returned is as likely as any other, whatever the one piece of noise
        looks like that all are cut from.
        """
        top, left = rng.integers(_NOISE_SIDE_PX, size=2)
        noise = np.rot90(self._noise, int(rng.integers(4)))
        noise = noise[:, ::-1] if rng.integers(2) else noise
        rows = np.arange(top, top + height) % _NOISE_SIDE_PX
        columns = np.arange(left, left + width) % _NOISE_SIDE_PX
        return np.asarray(noise[rows[:, None], columns])


def kinds_of(records: Iterable[Record]) -> list[FileKind]:
    """Return how the files of these records are made; those that are no pictures are left out.

    Raises:
        DatasetError: If none is one.
    """
    kinds = [kind for record in records if (kind := kind_of(record.image)) is not None]
    if not kinds:
        raise DatasetError(
            "Some of the files looked at must be images to learn their form from; none is. "
            "`rotvit prepare-data` names those that cannot be read, and why."
        )
    return kinds


def kinds_in_words(kinds: Iterable[FileKind]) -> str:
    """Say what files are like: `60 JPEG, 4 PNG; 320 to 1600 px on the long side`."""
    kinds = list(kinds)
    formats = Counter(kind.format or "drawn" for kind in kinds)
    sides = [max(kind.width, kind.height) for kind in kinds]
    counts = ", ".join(f"{count} {name}" for name, count in formats.most_common())
    largest = f" to {max(sides)}" if max(sides) > min(sides) else ""
    return f"{counts}; {min(sides)}{largest} px on the long side"


def _encode(noise: NDArray[np.uint8], kind: FileKind) -> bytes | Image.Image:
    picture = Image.fromarray(noise).convert(kind.mode)
    if kind.format is None:
        return picture
    if kind.format == "GIF":
        # Pillow's own choice of colours spreads their errors to the right and down.
        picture = picture.convert("RGB").quantize(dither=Image.Dither.NONE)
    options = dict(kind.options)
    if kind.orientation != 1:
        exif = Image.Exif()
        exif[_ORIENTATION] = kind.orientation
        options["exif"] = exif
    file = io.BytesIO()
    picture.save(file, kind.format, **options)
    return file.getvalue()
