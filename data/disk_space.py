"""How much disk space prepared images take, asked before the work begins."""

import logging
import math
import shutil
from itertools import islice
from pathlib import Path

from data import jpeg
from data.decode import UndecodableError, decode_square
from data.decoding_pool import pillow_warnings_ignored
from data.records import DatasetError, Source
from data.shards import PixelFormat

SAMPLE_PLACES, SAMPLE_RUN = 8, 8
"""Images whose size as JPEG is measured: so many in a row, at so many places over the split."""

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
    return math.ceil(sum(source.counts.values()) * image_bytes(source, side, pixel_format))


def image_bytes(source: Source, side: int, pixel_format: PixelFormat) -> float:
    """Return how much disk space one image takes, in bytes; see `estimate_bytes`."""
    raw = 3 * side * side + _RECORD_BYTES
    if pixel_format == "raw":
        return raw
    sizes = _sample(source, side)
    if not sizes:
        return raw
    return MARGIN * sum(sizes) / len(sizes) + 8 + _RECORD_BYTES  # 8: where it begins


def check_disk(directory: Path, images: int, needed: float, pixel_format: PixelFormat) -> None:
    """Log how much space is needed and free, and refuse to begin where it is too little.

    Args:
        directory: Where the images go.
        images: Images still to be written.
        needed: What they take, in bytes.
        pixel_format: How they are stored.

    Raises:
        DatasetError: If the disk is too small.
    """
    free = shutil.disk_usage(directory).free
    _log.info(
        "Preparing %s images as %s needs about %.2f GiB, %.2f GiB are free.",
        f"{images:,}",
        pixel_format,
        needed / _GIB,
        free / _GIB,
    )
    if needed > free:
        smaller = ", prepare smaller images" if pixel_format == "jpeg" else ", set data.format=jpeg"
        raise DatasetError(
            f"Preparing the images needs {needed / _GIB:.1f} GiB, the disk of {directory} has "
            f"{free / _GIB:.1f} GiB free. Free some space{smaller}, or choose another --outputs "
            "directory."
        )


def _sample(source: Source, side: int) -> list[int]:
    count = source.counts["train"]
    step = max(1, count // SAMPLE_PLACES)
    sizes = []
    with pillow_warnings_ignored():
        for start in range(0, count, step):
            for record in islice(source.records("train", start), min(SAMPLE_RUN, step)):
                try:
                    sizes.append(len(jpeg.encode(decode_square(record.image, side))))
                except UndecodableError:
                    continue
    return sizes
