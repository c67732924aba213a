import io
import json
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from data.decode import decode_square
from data.duplicates import (
    NEAR,
    has_copy,
    hashes_from_text,
    hashes_to_text,
    perceptual_hashes,
)
from data.prepared import PreparedData
from data.shards import digest_of, file_sha256

SIDE = 48


def scene(seed: int) -> Image.Image:
    """A picture of 240 x 180 px that has as much in it as a photo: a few dozen ellipses."""
    rng = np.random.default_rng(seed)
    picture = Image.new("RGB", (240, 180), tuple(rng.integers(0, 256, 3).tolist()))
    draw = ImageDraw.Draw(picture)
    for _ in range(40):
        x, y, width, height = rng.uniform((-40, -40, 10, 10), (220, 160, 120, 120))
        colour = tuple(rng.integers(0, 256, 3).tolist())
        draw.ellipse((x, y, x + width, y + height), fill=colour)
    return picture


def copied(picture: Image.Image, quality: int, scale: float = 1, margin: int = 0) -> bytes:
    width, height = picture.size
    picture = picture.crop((margin, margin, width - margin, height - margin))
    file = io.BytesIO()
    picture.resize((round(240 * scale), round(180 * scale))).save(file, "JPEG", quality=quality)
    return file.getvalue()


def hashes(images: list[Any]) -> NDArray[np.uint64]:
    return perceptual_hashes(np.stack([decode_square(image, SIDE) for image in images]))


@pytest.mark.parametrize(
    "options",
    [{"quality": 95}, {"quality": 50}, {"quality": 85, "scale": 0.5}, {"quality": 85, "scale": 2}],
    ids=str,
)
def test_a_copy_as_another_file_is_found(options: dict[str, Any]) -> None:
    scenes = [scene(seed) for seed in range(30)]
    originals, copies = hashes(list(scenes)), hashes([copied(each, **options) for each in scenes])
    for number in range(30):
        assert has_copy(copies[number : number + 1], originals).all()
        assert not has_copy(copies[number : number + 1], np.delete(originals, number, 0)).any()


def test_other_pictures_are_not_taken_for_copies() -> None:
    many = hashes([scene(seed) for seed in range(200)])
    assert not has_copy(many[:100], many[100:]).any()


def test_turned_and_mirrored_pictures_are_others() -> None:
    square = np.stack([decode_square(scene(0), SIDE)])
    others = [np.rot90(square, 1, (1, 2)), np.rot90(square, 2, (1, 2)), square[:, :, ::-1]]
    for other in others:
        assert not has_copy(perceptual_hashes(square), perceptual_hashes(other)).any()


@pytest.mark.parametrize("side", [5, 8, 9, 47])
def test_a_hash_says_where_it_gets_brighter(side: int) -> None:
    ramp = np.linspace(0, 255, side)
    to_the_right = np.broadcast_to(ramp[None, :, None], (side, side, 3)).astype(np.uint8)
    downwards = to_the_right.transpose(1, 0, 2)
    flat = np.full_like(downwards, 77)
    found = perceptual_hashes(np.stack([to_the_right, downwards, flat]))
    every = 2**64 - 1
    if side >= 9:
        assert found.tolist() == [[every, 0], [0, every], [0, 0]]
    else:  # cells share pixels, still nothing rises across the ramp
        assert found[0, 1] == 0
        assert found[1, 0] == 0
        assert found[2].tolist() == [0, 0]


def test_a_copy_is_what_a_count_of_all_bits_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.duplicates._ROWS", 7)
    monkeypatch.setattr("data.duplicates._COLUMNS", 11)
    rng = np.random.default_rng(0)
    first = rng.integers(0, 2**64, (40, 2), dtype=np.uint64)
    second = first[rng.integers(0, 40, 60)].copy()
    for number, flips in enumerate(rng.integers(0, 20, 60)):
        for bit in rng.choice(128, flips, replace=False):
            second[number, bit // 64] ^= np.uint64(1) << np.uint64(bit % 64)
    for most in (0, 5, NEAR):
        near = [
            [
                sum((a ^ b).bit_count() for a, b in zip(one, other, strict=True)) <= most
                for other in second.tolist()
            ]
            for one in first.tolist()
        ]
        for one, other, pairs in (
            (first, second, near),
            (second, first, list(zip(*near, strict=True))),
        ):
            expected = [any(row) for row in pairs]
            assert len(set(expected)) == 2
            assert has_copy(one, other, most).tolist() == expected
    assert has_copy(first, second[:0]).tolist() == [False] * 40


def test_many_hashes_are_compared_in_seconds() -> None:
    rng = np.random.default_rng(0)
    many = rng.integers(0, 2**64, (100_000, 2), dtype=np.uint64)
    started = time.process_time()
    assert not has_copy(many[:1000], many[1000:]).any()
    assert time.process_time() - started < 5  # 0.1 s on a quiet processor


def test_text_gives_the_hashes_back() -> None:
    some = np.random.default_rng(0).integers(0, 2**64, (3, 2), dtype=np.uint64)
    assert np.array_equal(hashes_from_text(hashes_to_text(list(some[:, None]))), some)
    assert hashes_from_text("").shape == (0, 2)


def test_prepared_images_bring_their_hashes(
    make_prepared: Callable[..., PreparedData], tmp_path: Path
) -> None:
    prepared = make_prepared(7, 3)
    assert prepared.test is not None
    expected = perceptual_hashes(prepared.train.gather(np.arange(7)))
    assert np.array_equal(prepared.train.hashes(), expected)
    assert len(prepared.test.hashes()) == 3

    record = tmp_path / "prepared" / "train-00000.json"
    content = json.loads(record.read_bytes())
    del content["digest"]
    stored = content.pop("hashes")  # as an earlier version wrote it
    assert np.array_equal(hashes_from_text(stored), expected)
    record.write_text(json.dumps({**content, "digest": digest_of(content)}), encoding="utf-8")
    manifest = tmp_path / "prepared" / "manifest.json"
    found = json.loads(manifest.read_bytes())
    found["shards"]["train"][0]["record_sha256"] = file_sha256(record)
    manifest.write_text(json.dumps(found), encoding="utf-8")
    assert np.array_equal(PreparedData.open(tmp_path / "prepared").train.hashes(), expected)


def test_who_has_a_copy_is_found_among_many() -> None:
    generator = np.random.default_rng(5)
    first = generator.integers(0, 2**63, (150, 2), dtype=np.uint64)
    second = generator.integers(0, 2**63, (9000, 2), dtype=np.uint64)
    for row, flipped in ((3, 0), (70, 2**12 - 1), (71, 2**13 - 1), (149, 2**40 + 1)):
        second[row * 7] = first[row] ^ np.array([flipped, 0], dtype=np.uint64)
        second[row * 11] = first[row + 0] ^ np.array([flipped & 63, flipped & ~63], dtype=np.uint64)
    found = np.flatnonzero(has_copy(first, second))
    assert found.tolist() == [3, 70, 149]


def test_pictures_that_are_all_alike_take_no_more_memory() -> None:
    alike = np.zeros((20_000, 2), dtype=np.uint64)
    tracemalloc.start()
    try:
        assert has_copy(alike[:2000], alike).all()
        assert tracemalloc.get_traced_memory()[1] < 20e6  # as pairs, they would be 640 MB
    finally:
        tracemalloc.stop()


def test_the_search_can_be_given_up() -> None:
    def stop() -> None:
        raise InterruptedError

    hashes = np.zeros((3, 2), dtype=np.uint64)
    with pytest.raises(InterruptedError):
        has_copy(hashes, hashes, give_up=stop)
