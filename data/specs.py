"""What a source's name means before anything is read: grammar, known data sets, what is remote.

Reads and imports next to nothing, so that settings and plans know it at once.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from urllib.parse import urlsplit

from data.records import DatasetError, Split


@dataclass(frozen=True, slots=True, kw_only=True)
class HubAddress:
    """A data set on the Hugging Face Hub.

    Attributes:
        repository: `owner/name`.
        revision: Branch, tag or commit; None for the default branch.
        config: Which of its configurations; None for the only or default one.
    """

    repository: str
    revision: str | None = None
    config: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Archive:
    """Another place to have a data set from: a tar archive of class folders.

    Attributes:
        url: Where it lies.
        checksum: `md5:...`, as its publisher states it.
        root: Folder in it that holds `train/` and `val/`.
        classes: Name of each class by its folder, in the order of the labels.
        most_files: Bound of its members, well above what it has.
        most_bytes: Bound of its bytes, unpacked.
    """

    url: str
    checksum: str
    root: str
    classes: Mapping[str, str]
    most_files: int
    most_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownDataset:
    """A data set that has a name here, with what is published about it.

    Attributes:
        address: Where it lies.
        counts: Images per split, its official validation images being our test images.
        num_classes: Number of classes.
        files: Pattern of its files' names with a group `split`; None where their layout tells.
        archive: Where else it can be had.
    """

    address: HubAddress
    counts: Mapping[Split, int]
    num_classes: int
    files: str | None = None
    archive: Archive | None = None


KNOWN = {
    "imagenette": KnownDataset(
        # The data set is a script, which `datasets` no longer runs; the Hub has converted it.
        address=HubAddress(
            repository="frgfm/imagenette", revision="refs/convert/parquet", config="320px"
        ),
        counts={"train": 9469, "test": 3925},
        num_classes=10,
        # As torchvision's Imagenette takes it; a test compares address, checksum and names.
        archive=Archive(
            url="https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-320.tgz",
            checksum="md5:3df6f0d01a2c9592104656642f5e78a3",
            root="imagenette2-320",
            classes={
                "n01440764": "tench",
                "n02102040": "English springer",
                "n02979186": "cassette player",
                "n03000684": "chain saw",
                "n03028079": "church",
                "n03394916": "French horn",
                "n03417042": "garbage truck",
                "n03425413": "gas pump",
                "n03445777": "golf ball",
                "n03888257": "parachute",
            },
            most_files=20_000,
            most_bytes=2 * 10**9,
        ),
    ),
    "imagenet-1k": KnownDataset(
        address=HubAddress(repository="ILSVRC/imagenet-1k"),
        counts={"train": 1_281_167, "test": 50_000},
        num_classes=1000,
        # Its "test" files have no labels.
        files=r"data/(?P<split>train|validation)-\d+-of-\d+\.parquet",
    ),
    "cifar10": KnownDataset(
        address=HubAddress(repository="uoft-cs/cifar10"),
        counts={"train": 50_000, "test": 10_000},
        num_classes=10,
        files=r"plain_text/(?P<split>train|test)-\d+-of-\d+\.parquet",
    ),
}
"""Data sets that `data.source` may name without more."""


def is_remote(spec: str) -> bool:
    """Tell whether a source must be downloaded before it can be read."""
    kind, _, location = spec.partition(":")
    return spec in KNOWN or kind == "hub" or (kind == "parquet" and is_url(location))


def public_source(spec: str) -> str:
    """Return a data source without what is nobody else's business: paths, users, tokens."""
    kind, _, location = spec.partition(":")
    if not location or kind == "hub":
        return spec
    return without_secrets(spec) if is_url(location) else f"{kind}:{PurePath(location).name}"


def without_secrets(spec: str) -> str:
    """Return a data source whose address, if it is one, has no user, password or query."""
    kind, _, location = spec.partition(":")
    if kind == "hub" or not is_url(location):
        return spec
    parts = urlsplit(location)
    return f"{kind}:{parts.scheme}://{parts.hostname or ''}{parts.path}"


def is_url(location: str) -> bool:
    """Tell whether a location is an address (`https://`, `s3://`, ...) rather than a path."""
    return re.match(r"[a-z][a-z0-9+.-]*://", location) is not None


def hub_address(spec: str) -> HubAddress:
    """Return where a data set on the Hub lies.

    Args:
        spec: A name in `KNOWN`, or `hub:<owner>/<name>[@revision][:config]`.

    Raises:
        DatasetError: If it is not written so.
    """
    if spec in KNOWN:
        return KNOWN[spec].address
    word = r"[\w][\w.-]*"
    found = re.fullmatch(
        rf"hub:(?P<repository>{word}/{word})(@(?P<revision>[^@:\s]+))?(:(?P<config>[^:\s]+))?", spec
    )
    if not found:
        raise DatasetError(
            f"A source on the Hub is written hub:<owner>/<name>[@revision][:config], got {spec!r}. "
            "Example: hub:frgfm/imagenette@refs/convert/parquet:320px."
        )
    return HubAddress(**found.groupdict())


def check_remote(spec: str) -> None:
    """Find mistakes in the name of a remote source, without the network.

    Raises:
        DatasetError: If it is misspelt.
    """
    if not spec.startswith("parquet:"):
        hub_address(spec)
