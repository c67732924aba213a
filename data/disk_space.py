"""How much disk space prepared images take, asked before the work begins."""

import logging
import math
import shutil
from pathlib import Path

from data import jpeg
from data.decode import UndecodableError, decode_square
from data.decoding_pool import pillow_warnings_ignored
from data.records import DatasetError, Source
from data.shards import PixelFormat

SAMPLE = 64
"""Images whose size as JPEG is measured."""

MARGIN = 1.1
"""Added to what the sample says: its mean is off by a few per cent, and sources have an order."""

_RECORD_BYTES = 8  # a label in JSON

_GIB = 2**30
_log = logging.getLogger(__name__)


def estimate_bytes(source: Source, side: int, pixel_format: PixelFormat = "raw") -> int:
    """Return how much disk space the prepared images of `source` take, in bytes.

    Exact for raw images, apart from a few kilobytes per shard. For JPEG it is the mean of a
    sample of 64 training images, encoded for the purpose, and a tenth more.
    """
    return math.ceil(sum(source.counts.values()) * _image_bytes(source, side, pixel_format))


def check_disk(
    source: Source,
    directory: Path,
    *,
    side: int,
    pixel_format: PixelFormat,
    done: int,
    done_bytes: int,
) -> None:
    """Log how much space is needed and free, and refuse to begin where it is too little.

    Args:
        source: Where the images come from.
        directory: Where the images go.
        side: Height and width of the prepared images, in pixels.
        pixel_format: How they are stored.
        done: Images that are there already.
        done_bytes: What these take.

    Raises:
        DatasetError: If the disk is too small.
    """
    images = sum(source.counts.values()) - done
    basis = ""
    if pixel_format == "jpeg" and done:  # a better sample than any
        needed, basis = images * MARGIN * done_bytes / done, ", by those that are there"
    else:
        needed = images * _image_bytes(source, side, pixel_format)
        if pixel_format == "jpeg":
            basis = f", by a sample of {source.sample_place}"
    free = shutil.disk_usage(directory).free
    _log.info(
        "Preparing %s images as %s needs about %.2f GiB%s; %.2f GiB are free.",
        f"{images:,}",
        pixel_format,
        needed / _GIB,
        basis,
        free / _GIB,
    )
    if needed > free:
        smaller = ", prepare smaller images" if pixel_format == "jpeg" else ", set data.format=jpeg"
        raise DatasetError(
            f"Preparing the images needs {needed / _GIB:.1f} GiB, the disk of {directory} has "
            f"{free / _GIB:.1f} GiB free. Free some space{smaller}, or choose another --outputs "
            "directory."
        )


def _image_bytes(source: Source, side: int, pixel_format: PixelFormat) -> float:
    """Return how much disk space one image takes, in bytes; see `estimate_bytes`."""
    raw = 3 * side * side + _RECORD_BYTES
    if pixel_format == "raw":
        return raw
    sizes = _sample(source, side)
    if not sizes:
        return raw
    return MARGIN * sum(sizes) / len(sizes) + 8 + _RECORD_BYTES  # 8: where it begins


def _sample(source: Source, side: int) -> list[int]:
    sizes = []
    with pillow_warnings_ignored():
        for record in source.sample("train", SAMPLE):
            try:
                sizes.append(len(jpeg.encode(decode_square(record.image, side))))
            except UndecodableError:
                continue
    return sizes
