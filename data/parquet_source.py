"""Images in Parquet files, as the Hugging Face Hub serves them, through the `datasets` library."""

import glob
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.folder_source import SPLIT_NAMES
from data.records import DatasetError, Record, Source, Split

IMAGE_COLUMNS = ("image", "img")
"""Names under which the Hub's data sets keep their images."""

LABEL_COLUMNS = ("label", "labels")
"""Names under which they keep the class."""


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
        self._files = self._divide(paths)
        self._rows = {
            split: [_count_rows(path) for path in files] for split, files in self._files.items()
        }
        self.counts = {split: sum(rows) for split, rows in self._rows.items()}
        features = self._features()
        self._image = self._find_image(features)
        self._label = next((name for name in LABEL_COLUMNS if name in features), None)
        self._values, self.class_names = self._classes(features)

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
        # Slow to import, and a source that is never read (its result is cached) needs none of it.
        import datasets
        import pyarrow

        number = start
        for path, rows in zip(self._files[split], self._rows[split], strict=True):
            if start >= rows:  # whole files are passed over without reading them
                start -= rows
                continue
            table = datasets.load_dataset(
                "parquet", data_files=glob.escape(str(path)), split="train", streaming=True
            ).cast_column(self._image, datasets.Image(decode=False))
            try:
                for row in table.skip(start):
                    yield self._record(row, split, number)
                    number += 1
            except (pyarrow.ArrowException, OSError) as error:
                raise DatasetError(
                    f"{path} must be a whole Parquet file, reading it failed after image "
                    f"{number} of {split}: {error}. Fetch the file again."
                ) from error
            start = 0

    def _record(self, row: dict[str, Any], split: Split, number: int) -> Record:
        image = row[self._image] or {}
        name = f"{split}/{number}"
        if image.get("path"):
            name = f"{name} {image['path']}"
        label = None if self._label is None else self._values.get(row[self._label])
        # An empty cell becomes an empty file, which preparation sets aside with its name.
        return Record(name, image.get("bytes") or b"", label)

    def _divide(self, paths: list[Path]) -> dict[Split, list[Path]]:
        words = [re.match(r"[a-z]+(?=[-_.])", path.name) for path in paths]
        splits = {word.group() if word else "" for word in words}
        if "train" not in splits or not splits <= set(SPLIT_NAMES):
            return {"train": paths}
        tests = sorted(splits - {"train"})
        if len(tests) > 1:
            raise DatasetError(
                f"{self.spec} must match files of one test split, matches those of "
                f"{' and '.join(tests)}. Give source the pattern of the training files and "
                "test_source that of the test files."
            )
        files: dict[Split, list[Path]] = {}
        for path, word in zip(paths, words, strict=True):
            files.setdefault(SPLIT_NAMES[word.group() if word else ""], []).append(path)
        return files

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

    def _find_image(self, features: Any) -> str:
        for name in IMAGE_COLUMNS:
            if name in features:
                return name
        raise DatasetError(
            f"{self.spec} must have a column {' or '.join(IMAGE_COLUMNS)}, has "
            f"{', '.join(features)}. Rename the column that holds the images."
        )

    def _classes(self, features: Any) -> tuple[dict[Any, int], list[str] | None]:
        """Return the label of each value in the label column, and the names in that order."""
        import datasets
        import pyarrow.dataset

        if self._label is None:
            return {}, None
        feature = features[self._label]
        if isinstance(feature, datasets.ClassLabel):
            return {value: value for value in range(feature.num_classes)}, list(feature.names)
        # Plain numbers or words: the classes are the values that occur.
        column = pyarrow.dataset.dataset([str(path) for path in self._files["train"]])
        values = column.to_table(columns=[self._label])[self._label].unique().to_pylist()
        ordered = sorted(value for value in values if value is not None)
        return {value: k for k, value in enumerate(ordered)}, [str(value) for value in ordered]


def _count_rows(path: Path) -> int:
    import pyarrow
    import pyarrow.parquet

    try:
        return int(pyarrow.parquet.read_metadata(path).num_rows)
    except (pyarrow.ArrowException, OSError) as error:
        raise DatasetError(f"{path} must be a Parquet file: {error}. Fetch it again.") from error
