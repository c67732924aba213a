"""What a source's name means before anything is read: grammar, known data sets, what is remote.

Imports next to nothing, so that keys, plans and the command line know it at once.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

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
class KnownDataset:
    """A data set that has a name here. Its counts are published, so nothing need be fetched to plan.

    Attributes:
        address: Where it lies.
        counts: Images per split, its official validation images being our test images.
        num_classes: Number of classes.
        files: Pattern of its files' names with a group `split`; None where their layout tells.
    """

    address: HubAddress
    counts: Mapping[Split, int]
    num_classes: int
    files: str | None = None


KNOWN = {
    "imagenette": KnownDataset(
        # The data set is a script, which `datasets` no longer runs; the Hub has converted it.
        address=HubAddress(
            repository="frgfm/imagenette", revision="refs/convert/parquet", config="320px"
        ),
        counts={"train": 9469, "test": 3925},
        num_classes=10,
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
