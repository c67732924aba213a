"""From what the user wrote in `data.source` to a source of images."""

import difflib
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from data.drawn import DrawnSource
from data.folder_source import FolderSource
from data.parquet_source import ParquetSource
from data.records import DatasetError, Record, Source, Split

__all__ = ["DatasetError", "Record", "Source", "Split", "open_source"]

DOWNLOADS = ("imagenette", "imagenet-1k", "cifar10")
"""Data sets known by name that have to be fetched first."""

_KINDS = ["folder", "parquet", "hub"]
_FORMS = ("drawn10", *DOWNLOADS, "hub:<owner>/<name>", "folder:<path>", "parquet:<glob>")


def open_source(spec: str, test_spec: str | None = None) -> Source:
    """Find the images that a setting names; nothing is decoded yet.

    Args:
        spec: Value of `data.source` or `transfer.source`.
        test_spec: Where the test images come from, if not from `spec` itself: the test part of
            that source, or all of it if it is not divided.

    Returns:
        The source. It has a "test" split if `test_spec` is given or `spec` brings one.

    Raises:
        DatasetError: If the setting is misspelt, names nothing that exists, cannot be had by this
            version, or if the classes of the test images are not those of the training images.
    """
    source = _open(spec)
    return source if test_spec is None else _WithTest(source, _open(test_spec))


def _open(spec: str) -> Source:
    kind, _, location = spec.partition(":")
    if spec == DrawnSource.spec:
        return DrawnSource()
    if kind == "folder" and location:
        return FolderSource(location)
    if kind == "parquet" and location:
        return ParquetSource(location)
    if spec in DOWNLOADS or (kind == "hub" and location):
        raise DatasetError(
            f"A source must be on this computer for now; this version cannot download {spec!r} "
            "yet. Download it yourself and use parquet:<glob> or folder:<path>."
        )
    raise DatasetError(
        f"A source must be one of {', '.join(_FORMS)}, got {spec!r}.{_suggestion(spec)}"
    )


def _suggestion(spec: str) -> str:
    kind, colon, location = spec.partition(":")
    if colon:
        near = [f"{name}:{location or '...'}" for name in _near(kind, _KINDS)]
    else:
        # Separators are what people get wrong: imagenet1k, cifar-10, drawn_10.
        plain = {re.sub(r"[-_ ]", "", name): name for name in ("drawn10", *DOWNLOADS)}
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
