from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from data.transforms import (
    centre_crop_square,
    crop,
    flip,
    grey,
    jitter_colours,
    make_grey,
    normalise,
    resize,
    resized_crop,
)


def triangle_filter(size: int, side: int) -> NDArray[np.float64]:
    """Weights of an antialiased bilinear resize of one axis, by its definition."""
    scale = size / side
    reach = max(scale, 1.0)
    centres = (np.arange(side) + 0.5) * scale
    distances = np.abs(centres[:, None] - (np.arange(size) + 0.5)) / reach
    weights = np.maximum(0, 1 - distances)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


@pytest.mark.parametrize("side", [5, 16, 53])
def test_resize_matches_the_definition(rng: torch.Generator, side: int) -> None:
    images = torch.rand(2, 3, 37, 23, generator=rng)
    rows, columns = triangle_filter(37, side), triangle_filter(23, side)
    expected = np.einsum("ih,nchw,jw->ncij", rows, images.double().numpy(), columns)
    np.testing.assert_allclose(resize(images, side).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("quarter_turns", [1, 2, 3])
def test_resize_leaves_no_mark_of_orientation(rng: torch.Generator, quarter_turns: int) -> None:
    images = torch.rand(2, 3, 37, 37, generator=rng)
    turned_first = resize(torch.rot90(images, quarter_turns, dims=(-2, -1)), side=16)
    turned_last = torch.rot90(resize(images, side=16), quarter_turns, dims=(-2, -1))
    torch.testing.assert_close(turned_first, turned_last)


def test_resize_refuses_bytes() -> None:
    with pytest.raises(TypeError, match=r"got torch\.uint8"):
        resize(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), 2)


def test_centre_crop_keeps_the_middle_of_the_long_side() -> None:
    wide = np.arange(3 * 7, dtype=np.uint8).reshape(3, 7)
    middle = [[2, 3, 4], [9, 10, 11], [16, 17, 18]]
    assert centre_crop_square(wide).tolist() == middle
    assert np.asarray(centre_crop_square(Image.fromarray(wide))).tolist() == middle
    tall: NDArray[np.uint8] = np.ascontiguousarray(wide.T)
    assert centre_crop_square(tall).T.tolist() == middle
    assert np.asarray(centre_crop_square(Image.fromarray(tall))).T.tolist() == middle


def test_each_image_is_cropped_at_its_own_place(rng: torch.Generator) -> None:
    images = torch.randint(0, 256, (4, 3, 11, 7), generator=rng, dtype=torch.uint8)
    tops, lefts = torch.tensor([0, 6, 2, 5]), torch.tensor([2, 0, 1, 2])
    cropped = crop(images, tops, lefts, side=5)
    assert cropped.shape == (4, 3, 5, 5)
    for row, (top, left) in enumerate(zip(tops.tolist(), lefts.tolist(), strict=True)):
        assert torch.equal(cropped[row], images[row, :, top : top + 5, left : left + 5])


def test_crop_refuses_images_that_are_too_small() -> None:
    here = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"at least 6 x 6 px, got \(7, 5\)"):
        crop(torch.zeros(1, 3, 7, 5), here, here, side=6)


@pytest.mark.parametrize("side", [4, 13, 31])
def test_each_image_is_cropped_and_resized_as_if_it_were_alone(
    rng: torch.Generator, side: int
) -> None:
    """Shrunk, as large as before, enlarged, the whole image, a single pixel."""
    images = torch.rand(5, 3, 23, 23, generator=rng) * 2 - 1
    boxes = [(0, 9, 11), (3, 0, 13), (10, 2, 5), (0, 0, 23), (22, 7, 1)]
    tops, lefts, sides = torch.tensor(boxes).unbind(1)
    cropped = resized_crop(images, tops, lefts, sides, side)
    assert cropped.is_contiguous()
    for row, (top, left, size) in enumerate(boxes):
        alone = images[row : row + 1, :, top : top + size, left : left + size]
        torch.testing.assert_close(cropped[row : row + 1], resize(alone, side))


@pytest.mark.parametrize("side", [4, 13, 31])
def test_a_resized_crop_leaves_no_mark_of_orientation(rng: torch.Generator, side: int) -> None:
    images = torch.rand(3, 3, 23, 23, generator=rng)
    tops, lefts = torch.tensor([0, 5, 9]), torch.tensor([1, 0, 3])
    sides = torch.tensor([20, 18, 6])
    first, last = images, resized_crop(images, tops, lefts, sides, side)
    for _ in range(3):
        first, last = (torch.rot90(each, 1, dims=(-2, -1)) for each in (first, last))
        tops, lefts = 23 - lefts - sides, tops  # where the turn takes the squares
        turned_first = resized_crop(first, tops, lefts, sides, side)
        torch.testing.assert_close(turned_first, last, rtol=0, atol=1e-6)


def test_resized_crop_refuses_bytes() -> None:
    here = torch.ones(1, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"got torch\.uint8\. Call normalise before"):
        resized_crop(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), here, here, here, 2)


def test_flip_mirrors_left_and_right_of_the_chosen_images() -> None:
    images = torch.tensor([[[[1, 2, 3], [4, 5, 6]]], [[[1, 2, 3], [4, 5, 6]]]])
    flipped = flip(images, torch.tensor([False, True]))
    assert flipped[:, 0].tolist() == [[[1, 2, 3], [4, 5, 6]], [[3, 2, 1], [6, 5, 4]]]


def test_normalise_maps_bytes_to_minus_one_to_one() -> None:
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, 5, 5)
    numbers = normalise(images)
    assert numbers.dtype == torch.float32
    assert numbers.is_contiguous()
    torch.testing.assert_close(numbers[1, :, 3, 4], torch.tensor([-1.0, -0.6, 1.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_normalise_refuses_what_may_be_normalised_already(dtype: Any) -> None:
    with pytest.raises(TypeError, match="needs uint8"):
        normalise(torch.zeros(1, 3, 2, 2, dtype=dtype))


def random_bytes(rng: torch.Generator, count: int = 3) -> torch.Tensor:
    return torch.randint(256, (count, 3, 6, 9), generator=rng, dtype=torch.uint8)


def as_picture(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


@pytest.mark.parametrize(
    ("place", "enhance"),
    [(0, ImageEnhance.Brightness), (1, ImageEnhance.Contrast), (2, ImageEnhance.Color)],
)
def test_colours_change_as_pillow_changes_them(
    rng: torch.Generator, place: int, enhance: Any
) -> None:
    """Each alone, against Pillow, which rounds its greys to whole numbers on the way."""
    images, factors = random_bytes(rng), torch.tensor([0.0, 0.6, 1.4])
    given = [torch.ones(3)] * 3
    given[place] = factors
    found = jitter_colours(images, *given)
    assert found.dtype == torch.uint8
    for image, factor, changed in zip(images, factors.tolist(), found, strict=True):
        expected = np.asarray(enhance(as_picture(image)).enhance(factor)).astype(int)
        difference = changed.permute(1, 2, 0).numpy().astype(int) - expected
        assert np.abs(difference).max() <= 1


def test_factors_of_one_change_nothing(rng: torch.Generator) -> None:
    images = random_bytes(rng)
    assert torch.equal(jitter_colours(images, *[torch.ones(3)] * 3), images)


def test_the_changes_are_made_one_after_the_other(rng: torch.Generator) -> None:
    """Unless something is cut off at black or white, or rounded, on the way."""
    images = (random_bytes(rng) // 4) + 90
    one, factors = torch.ones(3), torch.tensor([0.8, 1.0, 1.1])
    stepwise = jitter_colours(images, factors, one, one)
    stepwise = jitter_colours(stepwise, one, factors, one)
    stepwise = jitter_colours(stepwise, one, one, factors)
    together = jitter_colours(images, factors, factors, factors)
    assert (stepwise.int() - together.int()).abs().max() <= 2


@pytest.mark.parametrize("quarter_turns", [1, 2, 3])
def test_changing_colours_leaves_no_mark_of_orientation(
    rng: torch.Generator, quarter_turns: int
) -> None:
    images, factors = random_bytes(rng), torch.tensor([0.5, 1.3, 0.9])
    turned = torch.rot90(images, quarter_turns, dims=(-2, -1))
    chosen = torch.tensor([True, False, True])

    def jittered(each: torch.Tensor) -> torch.Tensor:
        return jitter_colours(each, factors, factors, factors)

    def greyed(each: torch.Tensor) -> torch.Tensor:
        return make_grey(each, chosen)

    for change in (jittered, greyed):
        expected = torch.rot90(change(images), quarter_turns, dims=(-2, -1))
        assert torch.equal(change(turned), expected)


def test_only_the_chosen_images_lose_their_colours(rng: torch.Generator) -> None:
    images = random_bytes(rng)
    found = make_grey(images, torch.tensor([True, False, True]))
    assert torch.equal(found[1], images[1])
    for place in (0, 2):
        expected = np.asarray(as_picture(images[place]).convert("L")).astype(int)
        for channel in found[place]:
            assert np.abs(channel.numpy().astype(int) - expected).max() <= 1
    assert (
        grey(torch.full((1, 3, 2, 2), 200, dtype=torch.uint8)).flatten().tolist()
        == [pytest.approx(200)] * 4
    )
