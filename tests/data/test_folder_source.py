import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from data.folder_source import FolderSource
from data.records import DatasetError

Make = Callable[..., FolderSource]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "photos [2024]*"  # what a shell would take for a pattern


@pytest.fixture
def make(root: Path) -> Make:
    """Make images by their names, and open the folder."""

    def make(*names: str) -> FolderSource:
        for name in names:
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (3, 2)).save(path, "PNG")
        return FolderSource(str(root))

    return make


def test_classes_are_the_folders_in_alphabetical_order(make: Make, root: Path) -> None:
    source = make("dog/2.png", "cat/9.jpg", "dog/1.png")
    assert source.class_names == ["cat", "dog"]
    assert source.counts == {"train": 3}
    records = list(source.records("train"))
    assert [(r.name, r.label) for r in records] == [
        ("cat/9.jpg", 0),
        ("dog/1.png", 1),
        ("dog/2.png", 1),
    ]
    assert records[0].image == root / "cat" / "9.jpg"


def test_images_deeper_down_belong_to_the_first_folder(make: Make) -> None:
    source = make("cat/2023/1.png", "dog/a/b/2.png")
    assert [record.label for record in source.records("train")] == [0, 1]


def test_images_side_by_side_have_no_labels(make: Make) -> None:
    source = make("b.png", "a.png")
    assert source.class_names is None
    assert [(r.name, r.label) for r in source.records("train")] == [
        ("a.png", None),
        ("b.png", None),
    ]


def test_one_folder_alone_is_no_classification(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    source = make("holiday/1.png", "holiday/2.png")
    assert source.class_names is None
    assert [record.label for record in source.records("train")] == [None, None]
    assert "no labels" in caplog.text


@pytest.mark.parametrize("name", ["test", "val", "validation"])
def test_train_and_test_folders_divide_the_images(make: Make, name: str) -> None:
    source = make("train/cat/1.png", "train/dog/2.png", f"{name}/dog/3.png")
    assert source.counts == {"train": 2, "test": 1}
    assert source.class_names == ["cat", "dog"]
    assert [(r.name, r.label) for r in source.records("test")] == [(f"{name}/dog/3.png", 1)]


def test_a_class_may_be_called_train(make: Make) -> None:
    source = make("train/1.png", "car/2.png", "test/3.png")
    assert source.class_names == ["car", "test", "train"]
    assert source.counts == {"train": 3}


def test_two_kinds_of_test_images_must_be_chosen_from(make: Make) -> None:
    with pytest.raises(DatasetError, match=r"found test and val\. Name the two to use: .*train"):
        make("train/1.png", "val/2.png", "test/3.png")


def test_images_beside_class_folders_are_refused(make: Make) -> None:
    with pytest.raises(DatasetError, match=r"or none, found .*\(cat, dog.*lost\.png"):
        make("cat/1.png", "dog/2.png", "lost.png")


def test_a_test_class_unknown_to_training_is_refused(make: Make) -> None:
    with pytest.raises(DatasetError, match="found yak only among the test images"):
        make("train/cat/1.png", "train/dog/2.png", "test/cat/3.png", "test/yak/4.png")


def test_test_images_must_have_labels_if_training_images_have(make: Make) -> None:
    with pytest.raises(DatasetError, match=r"class folders or none.*test/3\.png"):
        make("train/cat/1.png", "train/dog/2.png", "test/3.png")


def test_other_files_and_hidden_ones_are_left_alone(make: Make, root: Path) -> None:
    make("cat/1.PNG", "dog/2.JPeG", ".cache/3.png", "dog/.4.png")
    (root / "cat" / "notes.txt").write_text("x")
    (root / "README.md").write_text("x")
    source = FolderSource(str(root))
    assert source.class_names == ["cat", "dog"]
    assert source.counts == {"train": 2}


def test_reading_goes_on_from_any_image(make: Make) -> None:
    source = make(*(f"{number}.png" for number in range(7)))
    assert [r.name for r in source.records("train", start=5)] == ["5.png", "6.png"]
    assert list(source.records("train", start=7)) == []


def test_identity_follows_names_sizes_and_times_but_not_the_place(
    make: Make, root: Path, tmp_path: Path
) -> None:
    before = make("cat/1.png", "dog/2.png").identity()
    shutil.copytree(root, tmp_path / "copy")  # keeps times
    assert FolderSource(str(tmp_path / "copy")).identity() == before

    image = tmp_path / "copy" / "cat" / "1.png"
    status = image.stat()
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert FolderSource(str(tmp_path / "copy")).identity() != before
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert FolderSource(str(tmp_path / "copy")).identity() == before
    image.rename(image.with_name("3.png"))
    assert FolderSource(str(tmp_path / "copy")).identity() != before


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"folder:.*gone must name a folder"):
        FolderSource(str(tmp_path / "gone"))


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "movie.mp4").write_bytes(b"x")
    with pytest.raises(DatasetError, match=r"must hold images, found none.*\.jpeg"):
        FolderSource(str(tmp_path))


def test_a_link_to_a_folder_above_is_not_followed_round_and_round(make: Make, root: Path) -> None:
    make("cat/1.png", "dog/2.png")
    (root / "cat" / "again").symlink_to(root)
    (root / "elk").symlink_to(root / "dog")
    source = FolderSource(str(root))
    assert [r.name for r in source.records("train")] == ["cat/1.png", "dog/2.png", "elk/2.png"]


def test_a_link_that_leads_nowhere_does_not_stop_the_listing(make: Make, root: Path) -> None:
    make("1.png")
    (root / "2.png").symlink_to(root / "gone.png")
    source = FolderSource(str(root))
    assert source.counts == {"train": 2}, "preparation will set it aside with its name"


def test_a_link_that_leads_out_of_the_folder_is_left_out_with_one_warning(
    make: Make, root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make("cat/1.png", "dog/2.png")
    outside = tmp_path / "outside"
    outside.mkdir()
    shutil.copy(root / "cat" / "1.png", outside / "secret.png")
    (root / "cat" / "3.png").symlink_to(outside / "secret.png")
    (root / "cat" / "4.png").symlink_to("../../outside/secret.png")
    (root / "elk").symlink_to(outside)
    (root / "dog" / "5.png").symlink_to(root / "cat" / "1.png")
    source = FolderSource(str(root))
    assert [r.name for r in source.records("train")] == ["cat/1.png", "dog/2.png", "dog/5.png"]
    assert source.class_names == ["cat", "dog"]
    assert caplog.text.count("left out 3 links that lead out of the folder") == 1


def test_a_split_that_is_a_link_out_of_the_folder_is_not_followed(
    make: Make, root: Path, tmp_path: Path
) -> None:
    make("train/1.png")
    (tmp_path / "outside").mkdir()
    shutil.copy(root / "train" / "1.png", tmp_path / "outside")
    (root / "test").symlink_to(tmp_path / "outside")
    with pytest.raises(DatasetError, match="found none for test"):
        FolderSource(str(root))


def test_links_in_circles_come_to_an_end(make: Make, root: Path) -> None:
    make("a/1.png")
    make("b/2.png")
    for number in range(3):  # of several, the walk would take days to come to the kernel's limit
        (root / "a" / f"to-b-{number}").symlink_to(root / "b")
        (root / "b" / f"to-a-{number}").symlink_to(root / "a")
    names = [record.name for record in FolderSource(str(root)).records("train")]
    assert names == sorted(
        ["a/1.png", "b/2.png"]
        + [f"a/to-b-{number}/2.png" for number in range(3)]
        + [f"b/to-a-{number}/1.png" for number in range(3)]
    )
