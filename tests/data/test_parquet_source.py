import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data.decode import decode_square
from data.parquet_source import ParquetSource
from data.prepare import prepare
from data.prepared import PreparedData
from data.records import DatasetError

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
Write = Callable[..., Path]


def encode(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (5, 4), (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write images with red values `values` as the Hub serves them."""

    def write(
        name: str,
        values: list[int],
        labels: list[Any] | None = None,
        *,
        names: list[str] | None = None,
        column: str = "image",
        folder: str = "data [v1]",
    ) -> Path:
        path = tmp_path / folder / name
        path.parent.mkdir(exist_ok=True)
        content: dict[str, list[Any]] = {
            column: [{"bytes": encode(value), "path": f"{value}.png"} for value in values]
        }
        features = {column: datasets.Image()}
        if labels is not None:
            content["label"] = labels
            kind = datasets.ClassLabel(names=names) if names else None
            features["label"] = kind or datasets.Value(
                "string" if isinstance(labels[0], str) else "int64"
            )
        table = datasets.Dataset.from_dict(content, features=datasets.Features(features))
        table.to_parquet(path)
        return path.parent

    return write


def open_parquet(folder: Path, pattern: str = "*.parquet") -> ParquetSource:
    return ParquetSource(str(folder).replace("[", "[[]", 1) + "/" + pattern)


def test_images_come_in_the_order_of_files_and_rows(write: Write) -> None:
    write("b.parquet", [30, 40], [1, 0], names=["cat", "dog"])
    source = open_parquet(write("a.parquet", [10, 20], [0, 1], names=["cat", "dog"]))
    assert source.counts == {"train": 4}
    assert source.class_names == ["cat", "dog"]
    records = list(source.records("train"))
    assert [record.label for record in records] == [0, 1, 1, 0]
    assert [record.name for record in records] == [
        "train/0 10.png",
        "train/1 20.png",
        "train/2 30.png",
        "train/3 40.png",
    ]
    assert [decode_square(record.image, 1)[0, 0, 0] for record in records] == [10, 20, 30, 40]


@pytest.mark.parametrize("start", range(8))
def test_reading_goes_on_from_any_image(write: Write, start: int) -> None:
    write("a.parquet", [0, 1, 2])
    write("b.parquet", [3])
    folder = write("c.parquet", [4, 5, 6])
    names = [record.name for record in open_parquet(folder).records("train", start)]
    assert names == [f"train/{n} {n}.png" for n in range(start, 7)]


def test_files_named_after_splits_divide_the_images(write: Write) -> None:
    write("validation-00000-of-00001.parquet", [9], [1], names=["cat", "dog"])
    write("train-00001-of-00002.parquet", [2], [0], names=["cat", "dog"])
    folder = write("train-00000-of-00002.parquet", [0, 1], [0, 1], names=["cat", "dog"])
    source = open_parquet(folder)
    assert source.counts == {"train": 3, "test": 1}
    assert [record.name for record in source.records("test")] == ["test/0 9.png"]


def test_one_file_of_any_name_is_for_training(write: Write) -> None:
    assert open_parquet(write("validation.parquet", [1, 2])).counts == {"train": 2}


def test_two_kinds_of_test_files_must_be_chosen_from(write: Write) -> None:
    write("train.parquet", [1])
    write("test.parquet", [1])
    folder = write("val.parquet", [1])
    with pytest.raises(DatasetError, match=r"matches those of test and val\. Give source"):
        open_parquet(folder)


def test_images_without_a_label_column_have_no_labels(write: Write) -> None:
    source = open_parquet(write("a.parquet", [1, 2], column="img"))
    assert source.class_names is None
    assert [record.label for record in source.records("train")] == [None, None]


def test_plain_values_become_classes_in_their_order(write: Write) -> None:
    source = open_parquet(write("numbers.parquet", [1, 2, 3], [10, 2, 10]))
    assert source.class_names == ["2", "10"]
    assert [record.label for record in source.records("train")] == [1, 0, 1]
    source = open_parquet(write("a.parquet", [1, 2], ["dog", "cat"], folder="words"))
    assert source.class_names == ["cat", "dog"]
    assert [record.label for record in source.records("train")] == [1, 0]


def test_an_unknown_label_is_none_and_not_a_class(write: Write) -> None:
    source = open_parquet(write("a.parquet", [1, 2], [-1, 1], names=["cat", "dog"]))
    assert [record.label for record in source.records("train")] == [None, 1]


def test_other_class_names_in_the_test_files_are_refused(write: Write) -> None:
    write("train.parquet", [1, 2], [0, 1], names=["cat", "dog"])
    folder = write("test.parquet", [1, 2], [0, 1], names=["dog", "cat"])
    with pytest.raises(DatasetError, match="same columns and classes"):
        open_parquet(folder)


def test_files_without_the_libraries_own_notes_are_read_too(tmp_path: Path) -> None:
    images = [{"bytes": encode(7), "path": None}]
    pq.write_table(pa.table({"image": images, "label": [0]}), tmp_path / "a.parquet")
    (record,) = open_parquet(tmp_path).records("train")
    assert (record.name, record.label) == ("train/0", 0)
    assert decode_square(record.image, 1)[0, 0, 0] == 7


def test_an_empty_cell_becomes_an_image_that_is_set_aside(tmp_path: Path) -> None:
    images = [{"bytes": encode(7), "path": None}, None]
    pq.write_table(pa.table({"image": images}), tmp_path / "a.parquet")
    records = list(open_parquet(tmp_path).records("train"))
    assert records[1].image == b""


def test_identity_follows_names_sizes_and_times_but_not_the_place(write: Write) -> None:
    one = write("a.parquet", [1, 2], folder="one")
    before = open_parquet(one).identity()
    one.rename(one.with_name("two"))
    two = one.with_name("two")
    assert open_parquet(two).identity() == before
    (two / "a.parquet").touch()
    assert open_parquet(two).identity() != before


def test_a_pattern_that_matches_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="must match Parquet files; none match"):
        open_parquet(tmp_path)


def test_what_is_not_parquet_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"<html>not found</html>")
    with pytest.raises(DatasetError, match=r"a\.parquet must be a Parquet file"):
        open_parquet(tmp_path)


def test_a_missing_image_column_is_refused_with_the_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"picture": [b"x"], "label": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DatasetError, match="column image or img, has picture, label"):
        open_parquet(tmp_path)


def test_a_damaged_part_is_an_error_that_names_the_file(write: Write) -> None:
    folder = write("a.parquet", [1, 2, 3])
    path = folder / "a.parquet"
    content = bytearray(path.read_bytes())
    content[4:200] = bytes(196)
    path.write_bytes(content)
    source = open_parquet(folder)
    with pytest.raises(DatasetError, match=r"a\.parquet must be a whole Parquet file"):
        list(source.records("train"))


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the photos for development")
def test_real_photos_are_prepared_without_exception(tmp_path: Path) -> None:
    source = ParquetSource(str(SHARED / "imagenet-samples" / "*.parquet"))
    prepare(source, tmp_path, side=160, report=lambda done, total: None, workers=2)
    train = PreparedData.open(tmp_path).train
    assert len(train) == 200
    images = train.gather(np.arange(0, 200, 7))
    assert (images.std(axis=(1, 2, 3)) > 5).all()
    last = next(source.records("train", start=199)).image
    assert np.array_equal(train.gather(np.array([199]))[0], decode_square(last, 160))


def test_a_column_of_several_labels_per_image_is_no_class(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kinds = datasets.List(datasets.ClassLabel(names=["sky", "sea"]))
    table = datasets.Dataset.from_dict(
        {"image": [{"bytes": encode(1), "path": None}], "labels": [[0, 1]]},
        features=datasets.Features({"image": datasets.Image(), "labels": kinds}),
    )
    table.to_parquet(tmp_path / "one.parquet")
    source = ParquetSource(str(tmp_path / "one.parquet"))
    assert source.class_names is None
    assert [record.label for record in source.records("train")] == [None]
    assert "Column labels holds no one class per image" in caplog.text
