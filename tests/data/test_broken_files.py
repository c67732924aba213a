"""Files that are called images and are none, or no longer, or too much of one: each is set aside.

Made here, byte by byte where no library writes such a thing. None may crash, hang, use much memory
or be taken for a picture; what is wrong is said in words that are the same on every machine.
"""

import io
import json
import re
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from data.decode import UndecodableError, decode_square
from data.decoding_pool import pillow_warnings_ignored
from data.folder_source import FolderSource
from data.manifest import read
from data.prepare import prepare
from data.prepared import PreparedData

NO_IMAGE = "not an image of the kinds JPEG, PNG, WEBP, GIF, BMP, TIFF, PPM"
TRUNCATED = "OSError: image file is truncated..."
NO_END = "the JPEG data have no end, the file was cut off"
TEXT = "ValueError: Decompressed data too large for PngImagePlugin.MAX_TEXT_CHUNK"
STREAM = "OSError:..."  # in the decoder's words
ENDS_EARLY = "the JPEG data end before the picture does"
NO_WHITE = "its pixels are floats, signed or of 32 bits, and nothing says which value is white"
TOO_LARGE = "the picture has more than 120 million pixels"

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


def save(kind: str, picture: Image.Image = NOISE, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.copy().save(file, kind, **options)  # a copy, because some writers leave marks
    return file.getvalue()


def cut(content: bytes, part: float) -> bytes:
    return content[: int(len(content) * part)]


def flipped(content: bytes, part: float) -> bytes:
    """One byte is another."""
    at = int(len(content) * part)
    return content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]


def tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("n01440764_18.JPEG"), io.BytesIO(b""))
    return file.getvalue()


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.jpg", save("JPEG"))
    return file.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + check


def png(width: int, height: int, data: bytes, *more: bytes, depth: int = 8, kind: int = 0) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    parts = (chunk(b"IHDR", header), *more, chunk(b"IDAT", data), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def png_bomb() -> bytes:
    """All of 30,000 x 30,000 white pixels, in a few hundred kilobytes."""
    side = 30_000
    packer = zlib.compressobj(9)
    row = b"\0" + b"\xff" * (side // 8)
    data = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    return png(side, side, data, depth=1)


def text_bomb() -> bytes:
    """A small picture with a comment of 32 MiB in 32 kilobytes."""
    text = b"Comment\0\0" + zlib.compress(bytes(2**25), 9)
    return png(1, 1, zlib.compress(b"\0\0"), chunk(b"zTXt", text))


def start_of_frame(jpeg: bytes) -> int:
    found = re.search(rb"\xff[\xc0\xc2]\x00[\x0b\x11]\x08", jpeg)
    assert found
    return found.start()


def declared(height: int, width: int, picture: Image.Image = NOISE) -> bytes:
    """A JPEG with another size in its header than there is data for."""
    jpeg = save("JPEG", picture)
    at = start_of_frame(jpeg) + 5
    return jpeg[:at] + struct.pack(">HH", height, width) + jpeg[at + 4 :]


def taller(picture: Image.Image) -> bytes:
    return declared(640, 64, picture)


def ended(jpeg: bytes) -> bytes:
    """Half of the data, and a proper end."""
    return cut(jpeg, 0.5) + b"\xff\xd9"


def frame_kind(jpeg: bytes, marker: int) -> bytes:
    at = start_of_frame(jpeg)
    return jpeg[: at + 1] + bytes([marker]) + jpeg[at + 2 :]


def gif(width: int, height: int, frame: tuple[int, int] | None = None) -> bytes:
    screen = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6)
    image = b"," + struct.pack("<HHHHB", 0, 0, *(frame or (width, height)), 0)
    return screen + image + b"\2\2\x44\1\0;"


def bmp(width: int, height: int) -> bytes:
    return struct.pack(
        "<2sIHHIIiiHHIIiiII", b"BM", 54, 0, 0, 54, 40, width, height, 1, 24, *[0] * 6
    )


def tiff(width: int, height: int, *, bits: int = 8, sample_format: int = 1) -> bytes:
    """A header that points to 64 bytes of data and to itself as the next page."""
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, 1), (273, 8), (277, 1)]
    tags += [(278, height), (279, 64), (339, sample_format)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    start = 8 + 64
    return (
        struct.pack("<2sHI", b"II", 42, start)
        + bytes(64)
        + struct.pack("<H", len(tags))
        + entries
        + struct.pack("<I", start)
    )


def lzw() -> bytes:
    return save("TIFF", compression="tiff_lzw")


def run_lengths() -> bytes:
    """A BMP of 64 x 64 px with data for 9 rows."""
    data = b"\x20\1\x20\0\0\0" * 9
    start = 54 + 8
    header = struct.pack("<2sIHHI", b"BM", start + len(data), 0, 0, start)
    info = struct.pack("<IiiHHIIiiII", 40, 64, 64, 1, 8, 1, len(data), 0, 0, 2, 0)
    return header + info + bytes(8) + data


def shorter_strip(compression: str) -> bytes:
    """A TIFF that says that its only strip has half of its bytes."""
    content = save("TIFF", compression=compression)
    with Image.open(io.BytesIO(content)) as picture:
        (length,) = picture.tag_v2[279]  # type: ignore[attr-defined]
    at = content.index(struct.pack("<HHI", 279, 4, 1)) + 8
    return content[:at] + struct.pack("<I", length // 2) + content[at + 4 :]


def webp_bomb() -> bytes:
    """The largest canvas that the format has, and one small frame in it."""
    side = (16383 - 1).to_bytes(3, "little")
    frame = save("WEBP", Image.new("RGB", (1, 1)), lossless=True)[12:]
    parts = b"VP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + side + side
    parts += b"ANIM" + struct.pack("<I", 6) + bytes(6)
    parts += b"ANMF" + struct.pack("<I", 16 + len(frame)) + bytes(16) + frame
    return b"RIFF" + struct.pack("<I", len(parts) + 4) + b"WEBP" + parts


class Broken(NamedTuple):
    make: Callable[[], bytes]
    reason: str
    """All of the reason, or its beginning and `...`."""


BROKEN = {
    "empty.jpg": Broken(lambda: b"", "the file is empty"),
    "one-byte.jpg": Broken(lambda: b"\xff", NO_IMAGE),
    "zeros.png": Broken(lambda: bytes(5000), NO_IMAGE),
    "not-found.jpg": Broken(lambda: b"<!DOCTYPE html><title>404 Not Found</title>", NO_IMAGE),
    "readme.jpg": Broken(lambda: b"This image was removed.\n", NO_IMAGE),
    "words-like-ppm.jpg": Broken(lambda: b"P3r, the photo is gone\n", NO_IMAGE),
    "denied.png": Broken(lambda: json.dumps({"error": "denied"}).encode(), NO_IMAGE),
    "drawing.png": Broken(lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>', NO_IMAGE),
    "pointer.jpg": Broken(lambda: b"version https://git-lfs.github.com/spec/v1\n", NO_IMAGE),
    "archive.jpg": Broken(tar, NO_IMAGE),
    "zip.jpg": Broken(zipped, NO_IMAGE),
    "document.jpg": Broken(lambda: b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", NO_IMAGE),
    "postscript.tif": Broken(lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n", NO_IMAGE),
    "program.gif": Broken(lambda: b"\x7fELF\2\1\1" + bytes(99), NO_IMAGE),
    "random.jpg": Broken(lambda: np.random.default_rng(1).bytes(5000), NO_IMAGE),
    "jpeg2000.jpg": Broken(lambda: save("JPEG2000"), NO_IMAGE),
    "avif.jpg": Broken(lambda: save("AVIF"), NO_IMAGE),
    "icon.png": Broken(lambda: save("ICO"), NO_IMAGE),
    "floats.pnm": Broken(lambda: b"Pf 2 2 -1.0\n" + bytes(16), NO_WHITE),
    "jpeg-start-only.jpg": Broken(lambda: save("JPEG")[:3], NO_IMAGE),
    "jpeg-cut-in-header.jpg": Broken(lambda: save("JPEG")[:100], "OSError: Truncated File Read"),
    "jpeg-cut-early.jpg": Broken(lambda: cut(save("JPEG"), 0.2), "OSError: Truncated File Read"),
    "jpeg-cut-in-half.jpg": Broken(lambda: cut(save("JPEG"), 0.5), TRUNCATED),
    "jpeg-cut-late.jpg": Broken(lambda: cut(save("JPEG"), 0.98), TRUNCATED),
    "jpeg-cut-at-end.jpg": Broken(lambda: save("JPEG")[:-8], TRUNCATED),
    "jpeg-no-end.jpg": Broken(lambda: save("JPEG")[:-2], TRUNCATED),
    "jpeg-cut-and-ended.jpg": Broken(lambda: ended(save("JPEG")), ENDS_EARLY),
    "jpeg-cut-progressive.jpg": Broken(lambda: cut(save("JPEG", progressive=True), 0.7), TRUNCATED),
    "jpeg-zeros-inside.jpg": Broken(
        lambda: cut(save("JPEG"), 0.5) + bytes(3000),
        "the JPEG data have no end, the file was cut off",
    ),
    "jpeg-taller-than-data.jpg": Broken(lambda: taller(NOISE), ENDS_EARLY),
    "jpeg-grey-taller-than-data.jpg": Broken(lambda: taller(NOISE.convert("L")), ENDS_EARLY),
    "jpeg-cmyk-cut-and-ended.jpg": Broken(
        lambda: ended(save("JPEG", NOISE.convert("CMYK"))), ENDS_EARLY
    ),
    "jpeg-huge.jpg": Broken(lambda: declared(65500, 65500), TOO_LARGE),
    "jpeg-large.jpg": Broken(lambda: declared(4000, 4000), ENDS_EARLY),
    "jpeg-no-height.jpg": Broken(lambda: declared(0, 64), NO_IMAGE),
    "jpeg-lossless.jpg": Broken(lambda: frame_kind(save("JPEG"), 0xC3), STREAM),
    "jpeg-hierarchical.jpg": Broken(lambda: frame_kind(save("JPEG"), 0xC5), STREAM),
    "png-signature.png": Broken(lambda: b"\x89PNG\r\n\x1a\n", NO_IMAGE),
    "png-header-only.png": Broken(lambda: save("PNG")[:33], NO_IMAGE),
    "png-cut-early.png": Broken(lambda: cut(save("PNG"), 0.1), TRUNCATED),
    "png-cut-in-half.png": Broken(lambda: cut(save("PNG"), 0.5), TRUNCATED),
    "png-cut-late.png": Broken(lambda: cut(save("PNG"), 0.98), TRUNCATED),
    "png-wrong-check.png": Broken(lambda: flipped(save("PNG"), 0.5), STREAM),
    "png-wrong-data.png": Broken(lambda: png(64, 64, b"no zlib stream"), STREAM),
    "png-too-little-data.png": Broken(lambda: png(64, 64, zlib.compress(bytes(99))), TRUNCATED),
    "png-no-pixels.png": Broken(lambda: png(0, 0, zlib.compress(b"")), NO_IMAGE),
    "png-bomb.png": Broken(png_bomb, TOO_LARGE),
    "png-huge.png": Broken(lambda: png(2**31 - 1, 2**31 - 1, b""), TOO_LARGE),
    "png-text-bomb.png": Broken(
        text_bomb, "ValueError: Decompressed data too large for PngImagePlugin.MAX_TEXT_CHUNK"
    ),
    "gif-cut.gif": Broken(lambda: cut(save("GIF"), 0.6), TRUNCATED),
    "gif-no-frame.gif": Broken(lambda: gif(9, 9)[:19] + b";", NO_IMAGE),
    "gif-no-pixels.gif": Broken(lambda: gif(0, 0), NO_IMAGE),
    "gif-too-little-data.gif": Broken(lambda: gif(64, 64), TRUNCATED),
    "gif-bomb.gif": Broken(lambda: gif(65535, 65535), TOO_LARGE),
    "gif-frame-bomb.gif": Broken(lambda: gif(9, 9, frame=(65535, 65535)), TOO_LARGE),
    "webp-cut.webp": Broken(lambda: cut(save("WEBP"), 0.5), STREAM),
    "webp-cut-lossless.webp": Broken(lambda: cut(save("WEBP", lossless=True), 0.5), STREAM),
    "webp-bomb.webp": Broken(webp_bomb, TOO_LARGE),
    "bmp-cut.bmp": Broken(lambda: cut(save("BMP"), 0.5), TRUNCATED),
    "bmp-cut-run-lengths.bmp": Broken(lambda: run_lengths(), "ValueError: not enough..."),
    "bmp-no-pixels.bmp": Broken(lambda: bmp(0, 0), NO_IMAGE),
    "bmp-bomb.bmp": Broken(lambda: bmp(60_000, -60_000), TOO_LARGE),
    "tiff-cut.tif": Broken(lambda: cut(save("TIFF"), 0.5), TRUNCATED),
    "tiff-cut-lzw.tif": Broken(lambda: cut(lzw(), 0.5), NO_IMAGE),
    "tiff-wrong-lzw.tif": Broken(lambda: flipped(lzw(), 0.5), STREAM),
    "tiff-cut-deflate.tif": Broken(lambda: shorter_strip("tiff_adobe_deflate"), STREAM),
    "tiff-cut-packbits.tif": Broken(lambda: shorter_strip("packbits"), STREAM),
    "tiff-bomb.tif": Broken(lambda: tiff(90_000, 90_000), TOO_LARGE),
    "tiff-too-little-data.tif": Broken(lambda: tiff(99, 99), TRUNCATED),
    "tiff-32-bit.tif": Broken(lambda: tiff(4, 4, bits=32), NO_WHITE),
    "tiff-floats.tif": Broken(lambda: tiff(4, 4, bits=32, sample_format=3), NO_WHITE),
    "tiff-signed.tif": Broken(lambda: tiff(4, 4, bits=16, sample_format=2), NO_WHITE),
    "tiff-64-bit-floats.tif": Broken(lambda: tiff(2, 2, bits=64, sample_format=3), NO_IMAGE),
    "ppm-cut.ppm": Broken(lambda: cut(save("PPM"), 0.5), TRUNCATED),
    "ppm-cut-in-words.ppm": Broken(lambda: b"P3 9 9 255 1 2 3", "ValueError: not enough..."),
    "ppm-no-pixels.ppm": Broken(lambda: b"P6 0 0 255\n", NO_IMAGE),
    "ppm-bomb.ppm": Broken(lambda: b"P6 99999 99999 255\n" + bytes(99), TOO_LARGE),
    "pbm-bomb.pbm": Broken(lambda: b"P4 999999 999999\n" + bytes(99), TOO_LARGE),
}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with pillow_warnings_ignored():
        yield


def check_reason(reason: str, expected: str) -> None:
    if expected.endswith("..."):
        assert reason.startswith(expected.removesuffix("..."))
    else:
        assert reason == expected
    assert "\n" not in reason
    assert "0x" not in reason, "an address would make two runs differ"
    assert "/" not in reason, "a path would make two machines differ"


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", list(BROKEN))
def test_a_broken_file_is_refused_with_its_reason(name: str) -> None:
    with pytest.raises(UndecodableError) as error:
        decode_square(BROKEN[name].make(), 8)
    check_reason(str(error.value), BROKEN[name].reason)


PROBE = """
import resource, sys, time
from pathlib import Path
from data.decode import UndecodableError, decode_square
from PIL import Image
Image.preinit()
memory, processor = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        decode_square(path, 8)
    except UndecodableError:
        continue
    raise SystemExit(f"{path.name} was decoded")
used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
print(used, time.process_time() - processor)
"""


@pytest.mark.slow
def test_bombs_are_refused_at_once_and_in_little_memory(tmp_path: Path) -> None:
    bombs = [name for name, each in BROKEN.items() if each.reason == TOO_LARGE]
    assert len(bombs) == 10
    for name in [*bombs, "png-text-bomb.png"]:
        (tmp_path / name).write_bytes(BROKEN[name].make())
    command = [sys.executable, "-W", "ignore", "-c", PROBE, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert ended.returncode == 0, ended.stderr
    kilobytes, seconds = ended.stdout.split()
    assert int(kilobytes) < 150_000  # the smallest of them would take 113 MB as 1 bit per pixel
    assert float(seconds) < 10


def test_a_folder_of_broken_files_is_prepared_without_them(tmp_path: Path) -> None:
    good = [f"good-{number}.png" for number in range(3)]
    for name, each in BROKEN.items():
        (tmp_path / name).write_bytes(each.make())
    for name in good:
        (tmp_path / name).write_bytes(save("PNG"))
    source, prepared = FolderSource(str(tmp_path)), tmp_path / "prepared"
    manifest = prepare(
        source, prepared, side=8, report=lambda done, total: None, workers=2, max_skipped=0.99
    )
    assert manifest.counts == {"train": len(good)}
    assert [skipped.name for skipped in manifest.skipped] == sorted(BROKEN)
    for skipped in manifest.skipped:
        check_reason(skipped.reason, BROKEN[skipped.name].reason)
    assert read(prepared).skipped == manifest.skipped
    images = PreparedData.open(prepared).train.gather(np.arange(len(good)))
    assert (images == decode_square(NOISE, 8)).all()
