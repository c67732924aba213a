"""Images in Parquet files, as the Hugging Face Hub serves them, through the `datasets` library."""

import glob
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data.folder_source import SPLIT_NAMES
from data.records import DatasetError, Record, Source, Split

IMAGE_COLUMNS = ("image", "img")
"""Names under which the Hub's data sets keep their images."""

LABEL_COLUMNS = ("label", "labels")
"""Names under which they keep the class."""

_WHOLE_NUMBERS = {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}

LABEL_TYPES = frozenset({"bool", "string", "large_string", *_WHOLE_NUMBERS})
"""Types of such a column, where it does not declare its classes."""


_log = logging.getLogger(__name__)


class ParquetSource(Source):
    """The source behind `data.source=parquet:<glob>`.

    Files are read in the order of their names. Where all names begin with a split, as in the Hub's
    `train-00000-of-00002.parquet` and `validation-00000-of-00001.parquet`, they are divided so.
    """

    def __init__(self, pattern: str) -> None:
        """Look at the files' headers; images are read later.

        Raises:
            DatasetError: If no file matches, a file is not Parquet, or there is no image column.
        """
        self.spec = f"parquet:{pattern}"
        paths = [Path(p) for p in glob.glob(str(Path(pattern).expanduser()), recursive=True)]  # noqa: PTH207 (absolute patterns)
        paths = sorted(path for path in paths if path.is_file())
        if not paths:
            raise DatasetError(f"{self.spec} must match Parquet files; none match.")
        divided = divide(self.spec, [path.name for path in paths])
        self._files = {
            split: [paths[number] for number in numbers] for split, numbers in divided.items()
        }
        self._rows = {
            split: [_count_rows(path) for path in files] for split, files in self._files.items()
        }
        self.counts = {split: sum(rows) for split, rows in self._rows.items()}
        features = self._features()
        self._image = image_column(self.spec, features)
        self._label = label_column(features)
        names = class_names(features, self._label)
        values: Sequence[Any] = range(len(names or ()))
        if self._label is not None and names is None:
            values = values_in(self._files["train"], self._label)
            names = [str(value) for value in values]
        self.class_names = names
        self._values = {value: number for number, value in enumerate(values)}

    def identity(self) -> dict[str, Any]:
        """Return names, sizes in bytes and times of the files."""
        return {
            "kind": "parquet",
            "files": {
                split: [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files]
                for split, files in self._files.items()
            },
        }

    def records(self, split: Split, start: int = 0) -> Iterator[Record]:
        """Yield the images of `split` in the order of the files and of the rows in them."""
        first = 0
        for path, rows in zip(self._files[split], self._rows[split], strict=True):
            skipped = min(rows, max(0, start - first))
            if skipped < rows:  # whole files are passed over without reading them
                yield from read_rows(
                    path,
                    split,
                    first + skipped,
                    skip=skipped,
                    image=self._image,
                    label=self._label,
                    values=self._values,
                )
            first += rows

    def _features(self) -> Any:
        """Return the columns, which the first file of each split must agree on."""
        import datasets
        import pyarrow.parquet

        schemas = [pyarrow.parquet.read_schema(files[0]) for files in self._files.values()]
        found = [datasets.Features.from_arrow_schema(schema) for schema in schemas]
        if found[-1] != found[0]:
            raise DatasetError(
                f"{self.spec} must have the same columns and classes in training and test files, "
                f"has {found[0]} and {found[-1]}. Give them as source and test_source, which are "
                "matched by the names of the classes."
            )
        return found[0]


def divide(spec: str, names: Sequence[str]) -> dict[Split, list[int]]:
    """Divide files into splits by how their names begin.

    Args:
        spec: What the user wrote, for messages.
        names: Of the files, without folders.

    Returns:
        Numbers of the files of each split.

    Raises:
        DatasetError: If there are files of two test splits.
    """
    words = [re.match(r"[a-z]+(?=[-_.])", name) for name in names]
    splits = {word.group() if word else "" for word in words}
    if "train" not in splits or not splits <= set(SPLIT_NAMES):
        return {"train": list(range(len(names)))}
    tests = sorted(splits - {"train"})
    if len(tests) > 1:
        raise DatasetError(
            f"{spec} must match files of one test split, matches those of "
            f"{' and '.join(tests)}. Give source the pattern of the training files and "
            "test_source that of the test files."
        )
    files: dict[Split, list[int]] = {}
    for number, word in enumerate(words):
        files.setdefault(SPLIT_NAMES[word.group() if word else ""], []).append(number)
    return files


def image_column(spec: str, features: Any) -> str:
    """Return the column that holds the images.

    Raises:
        DatasetError: If there is none of a known name, and not one that says that it holds images.
    """
    import datasets

    for name in IMAGE_COLUMNS:
        if name in features:
            return name
    declared = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    if len(declared) == 1:
        return str(declared[0])
    raise DatasetError(
        f"{spec} must have a column {' or '.join(IMAGE_COLUMNS)}, has "
        f"{', '.join(features)}. Rename the column that holds the images."
    )


def label_column(features: Any) -> str | None:
    """Return the column that holds one class per image; None if the images have no labels."""
    import datasets

    for name in LABEL_COLUMNS:
        kind = features.get(name)
        if isinstance(kind, datasets.ClassLabel) or (
            isinstance(kind, datasets.Value) and kind.dtype in LABEL_TYPES
        ):
            return name
        if kind is not None:
            _log.warning("Column %s holds no one class per image (%s): no labels.", name, kind)
    return None


def class_names(features: Any, label: str | None) -> list[str] | None:
    """Return the names of the classes where the files declare them, else None."""
    import datasets

    kind = None if label is None else features[label]
    return list(kind.names) if isinstance(kind, datasets.ClassLabel) else None


def values_in(paths: Sequence[Path], label: str) -> list[Any]:
    """Return the values that occur in a column of plain numbers or words, in their order."""
    import pyarrow.dataset

    column = pyarrow.dataset.dataset([str(path) for path in paths])
    values = column.to_table(columns=[label])[label].unique().to_pylist()
    return sorted(value for value in values if value is not None)


def read_rows(
    path: Path,
    split: Split,
    number: int,
    *,
    skip: int,
    image: str,
    label: str | None,
    values: Mapping[Any, int],
) -> Iterator[Record]:
    """Yield the images of one file.

    Args:
        path: The file.
        split: Goes into the images' names.
        number: Number of the first image within its split.
        skip: Rows before it.
        image: Column of the images.
        label: Column of the labels.
        values: The label of each value in that column.

    Raises:
        DatasetError: If the file is damaged.
    """
    # Slow to import, and a source that is never read (its result is cached) needs none of it.
    import datasets
    import pyarrow

    table = datasets.load_dataset(
        "parquet", data_files=glob.escape(str(path)), split="train", streaming=True
    ).cast_column(image, datasets.Image(decode=False))
    try:
        for row in table.skip(skip):
            picture = row[image] or {}
            name = f"{split}/{number}"
            if picture.get("path"):
                name = f"{name} {picture['path']}"
            # An empty cell becomes an empty file, which preparation sets aside with its name.
            content = picture.get("bytes") or b""
            yield Record(name, content, None if label is None else values.get(row[label]))
            number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise DatasetError(
            f"{path} must be a whole Parquet file, reading it failed after image "
            f"{number} of {split}: {error}. Fetch the file again."
        ) from error


def _count_rows(path: Path) -> int:
    import pyarrow
    import pyarrow.parquet

    try:
        return int(pyarrow.parquet.read_metadata(path).num_rows)
    except (pyarrow.ArrowException, OSError) as error:
        raise DatasetError(f"{path} must be a Parquet file: {error}. Fetch it again.") from error
