"""What a source of images is: named records in a fixed order, with or without labels."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image

Split = Literal["train", "test"]
"""Parts of a source. Validation is held out of `train` later, by `data.splits`."""


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

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return what tells this content from other content, as plain JSON values.

        It names no location, so moving or copying images (with their times) changes nothing.
        """

    @abstractmethod
    def records(self, split: Split, start: int = 0) -> Iterator[Record]:
        """Yield the images of `split`, leaving out the first `start`."""
