import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data.sources import DatasetError, Record, Source, Split, open_source, outline
from data.specs import HubAddress, hub_address

MakeFolder = Callable[..., Path]


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """Make a folder of images from their names."""

    def make(name: str, *images: str) -> Path:
        for image in images:
            path = tmp_path / name / image
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (3, 2)).save(path)
        return tmp_path / name

    return make


def test_drawn10_opens_by_its_name() -> None:
    source = open_source("drawn10")
    assert source.spec == "drawn10"
    assert source.counts["train"] == 3334
    record = next(source.records("train"))
    assert record.label == 0


@pytest.mark.parametrize(
    "spec",
    ["imagenette", "imagenet-1k", "cifar10", "hub:a/b", "hub:a/b@main:c", "parquet:s3://a/b"],
)
def test_what_must_be_downloaded_is_not_read_before_it_is(spec: str) -> None:
    with pytest.raises(
        DatasetError, match=r"must be downloaded before.*`rotvit download`"
    ) as error:
        open_source(spec)
    assert spec in str(error.value)


@pytest.mark.parametrize(
    "spec", ["hub:beans", "hub:a/b/c", "hub:a/b@", "hub:a/b:", "hub:/b", "hub:../b", "hub:a b/c"]
)
def test_a_misspelt_address_on_the_hub_is_refused_with_the_form(spec: str) -> None:
    with pytest.raises(DatasetError, match=r"written hub:<owner>/<name>\[@revision\]\[:config\]"):
        open_source(spec)
    with pytest.raises(DatasetError, match="is written"):
        outline(spec)


def test_an_address_has_revision_and_configuration() -> None:
    assert hub_address("hub:a/b") == HubAddress(repository="a/b")
    assert hub_address("hub:a/b@refs/convert/parquet:c") == HubAddress(
        repository="a/b", revision="refs/convert/parquet", config="c"
    )


def test_what_is_published_is_known_without_a_download(make_folder: MakeFolder) -> None:
    found = outline("imagenette")
    assert found is not None
    assert (found.counts, found.num_classes) == ({"train": 9469, "test": 3925}, 10)
    test = make_folder("one", "1.png")
    with_test = outline("imagenet-1k", f"folder:{test}")
    assert with_test is not None
    assert with_test.counts == {"train": 1_281_167, "test": 1}
    assert outline("hub:a/b") is None
    assert outline("imagenette", "hub:a/b") is None


class Numbers(Source):
    """A source of one's own: small pictures, one for each number."""

    def __init__(self, location: str) -> None:
        self.spec = f"numbers:{location}"
        self.class_names = ["even", "odd"]
        self.counts = {"train": int(location)}

    def identity(self) -> dict[str, Any]:
        return {"kind": "numbers", "count": self.counts["train"]}

    def records(self, split: Split, start: int = 0) -> Iterator[Record]:
        for number in range(start, self.counts[split]):
            yield Record(str(number), Image.new("RGB", (3, 3), (number, 0, 0)), number % 2)


def register(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    def entry_points(*, group: str, name: str) -> list[metadata.EntryPoint]:
        found = metadata.EntryPoint(name="numbers", value=value, group="rotation_vit.sources")
        return [found] if (group, name) == (found.group, found.name) else []

    monkeypatch.setattr(metadata, "entry_points", entry_points)


def test_a_package_adds_a_source_by_an_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, f"{__name__}:Numbers")
    monkeypatch.setitem(sys.modules, __name__, sys.modules[Numbers.__module__])
    source = open_source("numbers:5")
    assert source.counts == {"train": 5}
    assert [record.label for record in source.records("train", 2)] == [0, 1, 0]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("no_such_module:Source", "must be importable as no_such_module:Source, it is not"),
        ("math:no_such_name", "must be importable as math:no_such_name"),
        ("builtins:str", r"must return a data\.records\.Source, it returned str"),
    ],
)
def test_an_entry_point_that_gives_no_source_is_said(
    monkeypatch: pytest.MonkeyPatch, value: str, message: str
) -> None:
    register(monkeypatch, value)
    with pytest.raises(DatasetError, match=message):
        open_source("numbers:5")


@pytest.mark.parametrize(
    ("spec", "near"),
    [
        ("drawn", "drawn10"),
        ("Drawn10", "drawn10"),
        ("drawn-10", "drawn10"),
        ("imagenete", "imagenette"),
        ("imagenet1k", "imagenet-1k"),
        ("cifar-10", "cifar10"),
        ("foldr:/data/photos", "folder:/data/photos"),
        ("parquet", "parquet:..."),
        ("Folder:x", "folder:x"),
        ("folder:", "folder:..."),
    ],
)
def test_a_misspelt_source_is_refused_with_the_nearest_name(spec: str, near: str) -> None:
    with pytest.raises(DatasetError, match="must be one of") as error:
        open_source(spec)
    assert f"got {spec!r}" in str(error.value)
    assert f"Did you mean {near}" in str(error.value)


@pytest.mark.parametrize("spec", ["", ":", "xyzzy", "/data/photos"])
def test_what_is_like_nothing_is_refused_without_a_guess(spec: str) -> None:
    with pytest.raises(DatasetError, match="must be one of") as error:
        open_source(spec)
    assert "Did you mean" not in str(error.value)


def test_test_images_may_come_from_elsewhere_and_classes_go_by_name(
    make_folder: MakeFolder,
) -> None:
    train = make_folder("one", "cat/1.png", "dog/1.png", "elk/1.png")
    test = make_folder("two", "dog/7.png", "elk/8.png", "elk/9.png")
    source = open_source(f"folder:{train}", f"folder:{test}")
    assert source.counts == {"train": 3, "test": 3}
    assert source.class_names == ["cat", "dog", "elk"]
    assert [(r.name, r.label) for r in source.records("test")] == [
        ("dog/7.png", 1),
        ("elk/8.png", 2),
        ("elk/9.png", 2),
    ]
    assert [r.name for r in source.records("test", start=2)] == ["elk/9.png"]
    assert [r.label for r in source.records("train")] == [0, 1, 2]


def test_of_a_divided_test_source_only_the_test_part_is_used(make_folder: MakeFolder) -> None:
    train = make_folder("one", "1.png")
    test = make_folder("two", "train/1.png", "train/2.png", "val/3.png")
    source = open_source(f"folder:{train}", f"folder:{test}")
    assert source.counts == {"train": 1, "test": 1}
    assert [r.name for r in source.records("test")] == ["val/3.png"]


def test_identity_covers_both_sources(make_folder: MakeFolder) -> None:
    one, two = make_folder("one", "1.png"), make_folder("two", "2.png", "3.png")
    found = [
        open_source(f"folder:{a}", f"folder:{b}").identity()
        for a, b in ((one, two), (two, one), (one, one))
    ]
    assert found[0] != found[1]
    assert found[0] != found[2]


def test_test_classes_unknown_to_training_are_refused(make_folder: MakeFolder) -> None:
    train = make_folder("one", "cat/1.png", "dog/1.png")
    test = make_folder("two", "cat/1.png", "yak/1.png")
    with pytest.raises(DatasetError, match=r"got \['yak'\]\. The training classes are"):
        open_source(f"folder:{train}", f"folder:{test}")


def test_test_images_without_labels_are_refused_for_labelled_training(
    make_folder: MakeFolder,
) -> None:
    train, test = make_folder("one", "cat/1.png", "dog/1.png"), make_folder("two", "1.png")
    with pytest.raises(DatasetError, match="got images without labels"):
        open_source(f"folder:{train}", f"folder:{test}")


def test_labels_of_test_images_are_dropped_where_training_has_none(make_folder: MakeFolder) -> None:
    train, test = make_folder("one", "1.png"), make_folder("two", "cat/1.png", "dog/1.png")
    source = open_source(f"folder:{train}", f"folder:{test}")
    assert source.class_names is None
    assert [record.label for record in source.records("test")] == [None, None]
