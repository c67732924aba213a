"""The manifest of a prepared directory: what is in it, and how to tell that it still is."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from data.records import DatasetError, Split
from data.shards import Shard, Skipped, digest_of, file_sha256, record_path, write_json

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
    """Of its `.npy` file."""
    size: int
    """Of its `.npy` file, in bytes."""
    mtime_ns: int
    """Of its `.npy` file, in nanoseconds since 1970."""
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


def build(
    directory: Path,
    shards: Mapping[Split, Sequence[Shard]],
    *,
    side: int,
    class_names: Sequence[str] | None,
    made_from: str,
) -> Manifest:
    """Return the manifest of finished shards."""
    return Manifest(
        format=FORMAT,
        side=side,
        counts={split: sum(shard.images for shard in group) for split, group in shards.items()},
        class_names=None if class_names is None else list(class_names),
        skipped=[each for group in shards.values() for shard in group for each in shard.skipped],
        shards={
            split: [
                ShardEntry(
                    shard.name,
                    shard.images,
                    shard.sha256,
                    shard.size,
                    shard.mtime_ns,
                    file_sha256(record_path(directory, shard.name)),
                )
                for shard in group
            ]
            for split, group in shards.items()
        },
        fingerprint=fingerprint(shards, side, class_names),
        made_from=made_from,
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


def fingerprint(
    shards: Mapping[Split, Sequence[Shard]], side: int, class_names: Sequence[str] | None
) -> str:
    """Return the SHA-256 over pixels, labels, class names and side, as hex digits."""
    names = None if class_names is None else list(class_names)
    digest = hashlib.sha256(digest_of([side, names]).encode())
    for split, group in sorted(shards.items()):
        digest.update(digest_of([split, len(group)]).encode())
        for shard in group:
            digest.update(shard.sha256.encode())
            digest.update(np.asarray(shard.labels or [], dtype="<i8").tobytes())
    return digest.hexdigest()
