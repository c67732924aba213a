"""What a source of images is: named records in a fixed order, with or without labels."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from PIL import Image

Split = Literal["train", "test"]
"""Parts of a source. Validation is held out of `train` later, by `data.splits`."""

SAMPLE_PLACES = 8
"""Places from which a sample is taken, some images in a row at each: sources have an order."""


class DatasetError(ValueError):
    """Images that cannot be found, read, prepared or divided as asked."""


def printable(name: str) -> str:
    r"""Return the name of a file as one line of text that can be written anywhere.

    File names may hold line feeds, escape sequences and bytes that are no text. These, and the
    backslash, are written as in Python (`\n`, `\x1b`, `\xe9`): different names stay different.
    """
    raw = name.replace("\\", "\\\\").encode("utf-8", "surrogateescape")
    text = raw.decode("utf-8", "backslashreplace")
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )


@dataclass(frozen=True, slots=True)
class Record:
    """One image as its source delivers it, not decoded yet unless it was drawn."""

    name: str
    """Tells a person which image this is; unique within its split where the source allows."""
    image: bytes | Path | Image.Image
    """The encoded file, where it lies, or the picture itself."""
    label: int | None
    """Index into the source's `class_names`; None where there are none."""


class Source(ABC):
    """Where images come from. Records have the same order every time."""

    spec: str
    """What the user wrote in `data.source`."""
    class_names: Sequence[str] | None
    """Names in the order of the labels; None if the images have no labels."""
    counts: Mapping[Split, int]
    """Images per split; has "test" only where the source brings test images of its own."""
    sample_place: str = "all of them"
    """Which images `sample` stands for at best, for people."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return what tells this content from other content, as plain JSON values.

        It names no location, so moving or copying images (with their times) changes nothing.
        """

    @abstractmethod
    def records(self, split: Split, start: int = 0) -> Iterator[Record]:
        """Yield the images of `split`, leaving out the first `start`."""

    def sample(self, split: Split, count: int) -> Iterator[Record]:
        """Yield images that stand for all of `split`, evenly spread: `count`, or a few less.

        A source of which a part is costly to reach overrides it, and `sample_place`.
        """
        for start, length in spread(self.counts[split], count):
            yield from islice(self.records(split, start), length)


def spread(total: int, count: int) -> Iterator[tuple[int, int]]:
    """Yield where to take some of `total` images in a row, and how many there.

    The places are at equal distances, at most `SAMPLE_PLACES`; no image is taken twice.

    Args:
        total: Images that there are.
        count: Images wanted in all, which is rounded down to as many at each place.
    """
    count = min(count, total)
    places = min(SAMPLE_PLACES, count)
    for place in range(places):
        yield total * place // places, count // places
