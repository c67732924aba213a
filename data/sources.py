"""From what the user wrote in `data.source` to a source of images.

A package of yours adds a source of its own by an entry point: see `REGISTERED`.
"""

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from data import catalogue
from data.downloaded_source import DownloadedSource, Scratch
from data.drawn import DrawnSource
from data.folder_source import FolderSource
from data.parquet_source import ParquetSource
from data.records import DatasetError, Record, Source, Split
from data.specs import KNOWN, check_remote, is_remote

__all__ = ["DatasetError", "Record", "Source", "Split", "open_source"]

REGISTERED = "rotation_vit.sources"
"""Group of entry points that add sources. The name of one is what stands before the colon in
`data.source`; it refers to a subclass of `Source`, or to a function that returns one, which is
called with what stands behind the colon. What an environment has installed is found in every
process of a run, and a setting alone can import nothing."""

_KINDS = ["folder", "parquet", "hub"]
_FORMS = ("drawn10", *KNOWN, "hub:<owner>/<name>", "folder:<path>", "parquet:<glob>")


@dataclass(frozen=True, slots=True)
class Outline:
    """What is known of a source before it is there."""

    spec: str
    """What the user wrote."""
    counts: Mapping[Split, int]
    """Images per split, as `Source.counts`."""
    num_classes: int | None
    """Number of classes; None if the images have no labels."""


def open_source(
    spec: str,
    test_spec: str | None = None,
    *,
    downloads: Path | None = None,
    scratch: Scratch | None = None,
) -> Source:
    """Find the images that a setting names; nothing is decoded yet.

    Args:
        spec: Value of `data.source` or `transfer.source`.
        test_spec: Where the test images come from, if not from `spec` itself: the test part of
            that source, or all of it if it is not divided.
        downloads: Directory of the download of those of the two that are remote.
        scratch: For what is too large to be kept; only needed to read images.

    Returns:
        The source. It has a "test" split if `test_spec` is given or `spec` brings one.

    Raises:
        DatasetError: If the setting is misspelt, names nothing that exists or was not downloaded,
            or if the classes of the test images are not those of the training images.
    """
    source = _open(spec, downloads, scratch)
    return source if test_spec is None else _WithTest(source, _open(test_spec, downloads, scratch))


def outline(
    spec: str, test_spec: str | None = None, *, downloads: Path | None = None
) -> Outline | None:
    """Say what a source holds, without the network.

    Args:
        spec: As for `open_source`.
        test_spec: As for `open_source`.
        downloads: As for `open_source`; None if nothing was downloaded yet.

    Returns:
        What is known; None if only the download will tell.

    Raises:
        DatasetError: As `open_source`, as far as it can be known.
    """
    specs = [each for each in (spec, test_spec) if each is not None]
    if downloads is not None or not any(map(is_remote, specs)):
        return _outline_of(open_source(spec, test_spec, downloads=downloads))
    parts = [_published(each) if is_remote(each) else _outline_of(_open(each)) for each in specs]
    train, test = parts[0], parts[-1]
    if train is None or test is None:
        return None
    if test_spec is None:
        return train
    tests = test.counts.get("test", test.counts["train"])
    return replace(train, counts={"train": train.counts["train"], "test": tests})


def _published(spec: str) -> Outline | None:
    check_remote(spec)
    known = KNOWN.get(spec)
    return None if known is None else Outline(spec, known.counts, known.num_classes)


def _outline_of(source: Source) -> Outline:
    names = source.class_names
    return Outline(source.spec, source.counts, None if names is None else len(names))


def _open(spec: str, downloads: Path | None = None, scratch: Scratch | None = None) -> Source:
    kind, _, location = spec.partition(":")
    if spec == DrawnSource.spec:
        return DrawnSource()
    if is_remote(spec):
        return _open_downloaded(spec, downloads, scratch)
    if kind == "folder" and location:
        return FolderSource(location)
    if kind == "parquet" and location:
        return ParquetSource(location)
    for entry in metadata.entry_points(group=REGISTERED, name=kind):
        return _open_registered(entry, location)
    raise DatasetError(
        f"A source must be one of {', '.join(_FORMS)}, got {spec!r}.{_suggestion(spec)}"
    )


def _open_downloaded(spec: str, downloads: Path | None, scratch: Scratch | None) -> Source:
    check_remote(spec)
    found = [] if downloads is None else catalogue.read(downloads)
    for each in found:
        if each.spec == spec and downloads is not None:
            return DownloadedSource(each, downloads, scratch)
    raise DatasetError(
        f"{spec} must be downloaded before it is read, it is not. Run `rotvit download` with the "
        "same settings; every command that needs the images does so by itself."
    )


def _open_registered(entry: metadata.EntryPoint, location: str) -> Source:
    try:
        made = entry.load()(location)
    except (ImportError, AttributeError) as error:
        raise DatasetError(
            f"The source {entry.name!r} must be importable as {entry.value}, it is not: {error}. "
            "Install its package anew."
        ) from error
    if not isinstance(made, Source):
        raise DatasetError(
            f"{entry.value} must return a data.records.Source, it returned {type(made).__name__}."
        )
    return made


def _suggestion(spec: str) -> str:
    kind, colon, location = spec.partition(":")
    if colon:
        near = [f"{name}:{location or '...'}" for name in _near(kind, _KINDS)]
    else:
        # Separators are what people get wrong: imagenet1k, cifar-10, drawn_10.
        plain = {re.sub(r"[-_ ]", "", name): name for name in ("drawn10", *KNOWN)}
        plain |= {kind: f"{kind}:..." for kind in _KINDS}
        near = [plain[name] for name in _near(re.sub(r"[-_ ]", "", spec).lower(), list(plain))]
    return f" Did you mean {' or '.join(near)}?" if near else ""


def _near(word: str, names: list[str]) -> list[str]:
    return difflib.get_close_matches(word.lower(), names, n=3, cutoff=0.6)


class _WithTest(Source):
    """Training images of one source, test images of another."""

    def __init__(self, train: Source, test: Source) -> None:
        self._train, self._test = train, test
        self._part: Split = "test" if "test" in test.counts else "train"
        self.spec = train.spec
        self.class_names = train.class_names
        self.counts = {"train": train.counts["train"], "test": test.counts[self._part]}
        self.sample_place = train.sample_place
        self._label_map = _map_labels(train, test)

    def identity(self) -> dict[str, Any]:
        """Return the identities of both sources."""
        return {
            "kind": "with-test",
            "train": self._train.identity(),
            "test": self._test.identity(),
        }

    def records(self, split: Split, start: int = 0) -> Iterator[Record]:
        """Yield the images of `split`, with labels that index the training classes."""
        if split == "train":
            yield from self._train.records("train", start)
            return
        for record in self._test.records(self._part, start):
            known = record.label is not None and self._label_map is not None
            label = self._label_map[record.label] if known else None  # type: ignore[index]
            yield replace(record, label=label)

    def sample(self, split: Split, count: int) -> Iterator[Record]:
        """Yield images that stand for all of `split`, as the training images' source chooses."""
        return (
            self._train.sample(split, count) if split == "train" else super().sample(split, count)
        )


def _map_labels(train: Source, test: Source) -> list[int] | None:
    """Return the training label of each test label; classes are matched by name."""
    if train.class_names is None:
        return None
    unknown = sorted(set(test.class_names or ()) - set(train.class_names))
    if test.class_names is None or unknown:
        found = f"{unknown[:5]}" if unknown else "images without labels"
        raise DatasetError(
            f"The test images ({test.spec}) must have classes of the training images "
            f"({train.spec}), got {found}. The training classes are "
            f"{list(train.class_names)[:10]}."
        )
    return [train.class_names.index(name) for name in test.class_names]
