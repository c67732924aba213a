"""A source that lives in memory, and prepared directories made from it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from data.prepare import prepare
from data.prepared import PreparedData
from data.records import Record, Source, Split
from tests.data.standin_data import parquet
from tests.data.standin_hub import StandInHub

MakeSource = Callable[..., Source]
MakePrepared = Callable[..., PreparedData]


class ListSource(Source):
    """Images given one by one: pictures, arrays or encoded files."""

    spec = "list"

    def __init__(
        self,
        train: list[Any],
        test: list[Any] | None = None,
        *,
        labels: dict[Split, list[int | None]] | None = None,
        class_names: list[str] | None = None,
        name: str = "list",
    ) -> None:
        self._images: dict[Split, list[Any]] = {"train": train}
        if test is not None:
            self._images["test"] = test
        self._labels, self._name = labels, name
        self.class_names = class_names
        self.counts = {split: len(images) for split, images in self._images.items()}
        self.read: list[tuple[Split, int]] = []

    def identity(self) -> dict[str, Any]:
        return {"name": self._name}

    def records(self, split: Split, start: int = 0) -> Iterator[Record]:
        for index in range(start, self.counts[split]):
            self.read.append((split, index))
            image = self._images[split][index]
            if isinstance(image, np.ndarray):
                image = Image.fromarray(image)
            label = None if self._labels is None else self._labels[split][index]
            yield Record(f"{split}/{index}", image, label)


def noise(count: int, height: int, width: int, seed: int = 0) -> list[NDArray[np.uint8]]:
    rng = np.random.default_rng(seed)
    return list(rng.integers(0, 256, (count, height, width, 3), dtype=np.uint8))


@pytest.fixture
def list_source() -> MakeSource:
    """Make a source from lists."""
    return ListSource


@pytest.fixture
def noise_images() -> Callable[..., list[NDArray[np.uint8]]]:
    """Make `count` noise images `(height, width, 3)`."""
    return noise


@pytest.fixture
def make_prepared(tmp_path: Path) -> MakePrepared:
    """Prepare noise images and open them: `(train, test, classes=..., side=...)`.

    Labels go 0, 1, 2, ... around; classes=None leaves them out.
    """

    def make(
        train: int, test: int | None = None, *, classes: int | None = 3, side: int = 5
    ) -> PreparedData:
        counts: dict[Split, int] = {"train": train, "test": test or 0}
        source = ListSource(
            noise(train, side, side),
            None if test is None else noise(test, side, side, seed=1),
            labels=None
            if classes is None
            else {split: [i % classes for i in range(n)] for split, n in counts.items()},
            class_names=None if classes is None else [f"class {c}" for c in range(classes)],
        )
        directory = tmp_path / "prepared"
        prepare(source, directory, side=side, report=lambda done, total: None, workers=2)
        return PreparedData.open(directory)

    return make


@pytest.fixture
def main_branch(hub: StandInHub) -> StandInHub:
    """`a/b` with two training files and a test file, and `a/configs` with a card."""
    files = {
        "data/train-00000-of-00002.parquet": parquet(range(5)),
        "data/train-00001-of-00002.parquet": parquet(range(5, 8)),
        "data/test-00000-of-00001.parquet": parquet(range(8, 10)),
    }
    hub.add("a/b", {"README.md": b"---\n---\n", **files}, revisions=("main", "v1"))
    card = (
        "---\nconfigs:\n- config_name: big\n  data_files:\n  - split: train\n"
        "    path: big/*.parquet\n- config_name: small\n  data_files:\n  - split: train\n"
        "    path: small/*.parquet\n---\n"
    )
    hub.add(
        "a/configs",
        {
            "README.md": card.encode(),
            "big/x.parquet": parquet(range(4)),
            "small/x.parquet": parquet(range(4, 6)),
        },
    )
    return hub
