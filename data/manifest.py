"""The manifest of a prepared directory: what is in it, and how to tell that it still is."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from data.records import DatasetError, Split
from data.shards import (
    SUFFIXES,
    PixelFormat,
    Shard,
    Skipped,
    digest_of,
    file_sha256,
    read_shard,
    record_path,
    write_json,
)

FILE_NAME = "manifest.json"
"""Written last: a directory without it is not finished."""

FORMAT = 1
"""Raised when the layout of a prepared directory changes."""


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """How to tell that a shard is the one that was written."""

    name: str
    """File name without ending."""
    images: int
    """Images in it."""
    sha256: str
    """Of the file that holds its pixels."""
    size: int
    """Of that file, in bytes."""
    mtime_ns: int
    """Of that file, in nanoseconds since 1970."""
    record_sha256: str
    """Of its `.json` file, which holds the labels."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a prepared directory holds."""

    format: int
    """Layout of the directory."""
    side: int
    """Height and width of the images, in pixels."""
    counts: Mapping[Split, int]
    """Images per split, without those set aside."""
    class_names: Sequence[str] | None
    """In the order of the labels; None if there are no labels."""
    skipped: Sequence[Skipped]
    """Images that could not be used, of all splits."""
    shards: Mapping[Split, Sequence[ShardEntry]]
    """In the order of the images."""
    fingerprint: str
    """SHA-256 over pixels, labels, class names and side: equal for equal training data."""
    made_from: str
    """Digest of the source's identity and the settings of the preparation."""
    pixel_format: PixelFormat = "raw"
    """How the pixels of all shards are stored."""

    @property
    def entries(self) -> list[ShardEntry]:
        """The shards of all splits."""
        return [entry for group in self.shards.values() for entry in group]


class Fingerprint:
    """SHA-256 over pixels, labels, class names and side, of one shard after the other.

    Splits come in the order of their names. Only one shard's labels need to be in memory.
    """

    def __init__(
        self, side: int, class_names: Sequence[str] | None, pixel_format: PixelFormat
    ) -> None:
        names = None if class_names is None else list(class_names)
        # Raw is left out: it was the only format once, and those fingerprints stay valid.
        stored = [] if pixel_format == "raw" else [pixel_format]
        self._digest = hashlib.sha256(digest_of([side, names, *stored]).encode())

    def begin(self, split: Split, shards: int) -> None:
        """Go on with a split of so many shards."""
        self._digest.update(digest_of([split, shards]).encode())

    def add(self, shard: Shard) -> None:
        """Take in the next shard of the split."""
        self._digest.update(shard.sha256.encode())
        self._digest.update(np.asarray(shard.labels or [], dtype="<i8").tobytes())

    def hexdigest(self) -> str:
        """Return what has been taken in so far, as hex digits."""
        return self._digest.hexdigest()


def build(
    directory: Path,
    names: Mapping[Split, Sequence[str]],
    *,
    side: int,
    class_names: Sequence[str] | None,
    made_from: str,
    pixel_format: PixelFormat,
) -> Manifest:
    """Return the manifest of finished shards, by their names; their records are read again.

    Raises:
        DatasetError: If one of them is not finished.
    """
    entries: dict[Split, list[ShardEntry]] = {split: [] for split in names}
    skipped: dict[Split, list[Skipped]] = {split: [] for split in names}
    fingerprint = Fingerprint(side, class_names, pixel_format)
    for split, group in sorted(names.items()):
        fingerprint.begin(split, len(group))
        for name in group:
            path = record_path(directory, name)
            shard = read_shard(directory, name)
            if shard is None:
                raise DatasetError(
                    f"{path} must stay as it was written until the preparation ends, it was "
                    "changed or removed. Run the same command again."
                )
            fingerprint.add(shard)
            skipped[split] += shard.skipped
            entries[split].append(
                ShardEntry(
                    shard.name,
                    shard.images,
                    shard.sha256,
                    shard.size,
                    shard.mtime_ns,
                    file_sha256(path),
                )
            )
    return Manifest(
        format=FORMAT,
        side=side,
        counts={split: sum(entry.images for entry in group) for split, group in entries.items()},
        class_names=None if class_names is None else list(class_names),
        skipped=[each for group in skipped.values() for each in group],
        shards=entries,
        fingerprint=fingerprint.hexdigest(),
        made_from=made_from,
        pixel_format=pixel_format,
    )


def write(directory: Path, manifest: Manifest) -> None:
    """Write the manifest, which declares the directory finished."""
    write_json(directory / FILE_NAME, asdict(manifest))


def read(directory: Path) -> Manifest:
    """Return the manifest of a finished directory.

    Raises:
        DatasetError: If there is none, or it cannot be read.
    """
    path = directory / FILE_NAME
    try:
        content = json.loads(path.read_bytes())
        entries = {s: [ShardEntry(**e) for e in group] for s, group in content["shards"].items()}
        skipped = [Skipped(**each) for each in content["skipped"]]
        manifest = Manifest(**{**content, "shards": entries, "skipped": skipped})
        if manifest.pixel_format not in SUFFIXES:
            raise ValueError(f"images stored as {manifest.pixel_format}")
    except FileNotFoundError as error:
        raise DatasetError(
            f"{directory} must hold prepared images, has no {FILE_NAME}. Run the prepare-data "
            "stage; it goes on where it was cut off."
        ) from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DatasetError(
            f"{path} must be a manifest that this version wrote, reading it failed: {error!r}. "
            "Delete it and run the prepare-data stage, which keeps finished parts."
        ) from error
    if manifest.format != FORMAT:
        raise DatasetError(
            f"{path} must have format {FORMAT}, has {manifest.format}. Delete {directory} and run "
            "the prepare-data stage."
        )
    return manifest
