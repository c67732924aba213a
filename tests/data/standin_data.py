"""A data set on the stand-in for the Hub, downloaded and read, as several tests need it."""

import io
from pathlib import Path

import datasets
from PIL import Image

from data import catalogue, downloads
from data.downloaded_source import Scratch
from data.patience import Patience
from data.sources import open_source

PATIENCE = Patience(
    attempts=4, first_wait=0.01, longest_wait=0.02, longest_asked=0.1, stall_seconds=1.0
)


def parquet(
    reds: range,
    *,
    names: list[str] | None = None,
    words: bool = False,
    column: str = "image",
    labels: bool = True,
) -> bytes:
    """Make a Parquet file of images whose red is given, as the Hub's data sets have them."""
    names = names or ["cat", "dog"]
    pictures = []
    for red in reds:
        file = io.BytesIO()
        Image.new("RGB", (6, 6), (red, 0, 0)).save(file, "PNG")
        pictures.append({"bytes": file.getvalue(), "path": f"{red}.png"})
    content: dict[str, list[object]] = {column: list(pictures)}
    features: dict[str, object] = {column: datasets.Image()}
    if labels:
        content["label"] = [names[r % len(names)] if words else r % len(names) for r in reds]
        features["label"] = datasets.Value("string") if words else datasets.ClassLabel(names=names)
    file = io.BytesIO()
    datasets.Dataset.from_dict(content, features=datasets.Features(features)).to_parquet(file)
    return file.getvalue()


def get(spec: str, directory: Path) -> catalogue.Catalogue:
    (found,) = downloads.download(
        [spec], directory, report=lambda done, total: None, patience=PATIENCE
    )
    return found


def reds(spec: str, directory: Path, split: str = "train", start: int = 0) -> list[int]:
    scratch = Scratch(directory=directory.parent / "scratch", patience=PATIENCE)
    source = open_source(spec, downloads=directory, scratch=scratch)
    found = []
    for record in source.records("train" if split == "train" else "test", start):
        assert isinstance(record.image, bytes)
        with Image.open(io.BytesIO(record.image)) as picture:
            pixel = picture.getpixel((0, 0))
        assert isinstance(pixel, tuple)
        assert record.label == pixel[0] % 2
        found.append(pixel[0])
    return found
