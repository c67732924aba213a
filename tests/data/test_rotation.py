import numpy as np
import pytest
import torch

from data.rotation import make_rotation_batch, rotate_each, turn_patches


def test_label_k_means_k_quarter_turns_counter_clockwise() -> None:
    image = torch.tensor([[[[1, 2], [3, 4]]]])
    rotated, labels = make_rotation_batch(image)
    assert labels.tolist() == [0, 1, 2, 3]
    assert rotated[:, 0].tolist() == [
        [[1, 2], [3, 4]],
        [[2, 4], [1, 3]],
        [[4, 3], [2, 1]],
        [[3, 1], [4, 2]],
    ]


def test_matches_numpy_on_random_images(rng: torch.Generator) -> None:
    images = torch.rand(5, 3, 8, 8, generator=rng)
    rotated, labels = make_rotation_batch(images)
    assert labels.dtype == torch.int64
    for row, label in enumerate(labels.tolist()):
        expected = np.rot90(images[row % 5].numpy(), k=label, axes=(1, 2))
        np.testing.assert_array_equal(rotated[row].numpy(), expected)


def test_no_pixel_value_is_invented(rng: torch.Generator) -> None:
    images = torch.rand(2, 3, 7, 7, generator=rng)
    rotated, _ = make_rotation_batch(images)
    for copy in rotated.reshape(4, -1):
        assert torch.equal(copy.sort().values, images.flatten().sort().values)


def test_each_image_gets_its_own_turn_and_the_same_one_as_in_the_full_batch(
    rng: torch.Generator,
) -> None:
    images = torch.rand(7, 3, 5, 5, generator=rng)
    before = images.clone()
    turns = torch.tensor([3, 0, 2, 1, 1, 3, 0])
    rotated, _ = make_rotation_batch(images)
    expected = rotated.view(4, 7, 3, 5, 5)[turns, torch.arange(7)]
    assert torch.equal(rotate_each(images, turns), expected)
    assert torch.equal(images, before)


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 3, 8, 9)])
def test_rejects_what_it_cannot_turn(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="square images") as error:
        make_rotation_batch(torch.zeros(shape))
    assert str(shape) in str(error.value)
    with pytest.raises(ValueError, match="rotate_each needs square images"):
        rotate_each(torch.zeros(shape), torch.zeros(shape[0], dtype=torch.int64))


def test_rejects_a_wrong_number_of_turns() -> None:
    with pytest.raises(ValueError, match=r"\(3,\), got \(2,\)"):
        rotate_each(torch.zeros(3, 1, 5, 5), torch.zeros(2, dtype=torch.int64))


def test_patches_are_turned_in_their_places() -> None:
    """Cells of 4 x 4, of which the inner 2 x 2 are kept, by hand and without a resize."""
    image = torch.arange(64.0).view(1, 1, 8, 8)
    turned = turn_patches(image, torch.tensor([[[0, 1], [2, 3]]]), patch_size=2, gap=2)
    assert turned[0, 0].tolist() == [
        [9, 10, 14, 22],
        [17, 18, 13, 21],
        [50, 49, 53, 45],
        [42, 41, 54, 46],
    ]


def test_patches_without_turns_and_gaps_are_the_image(rng: torch.Generator) -> None:
    images = torch.rand(2, 3, 12, 12, generator=rng)
    none = torch.zeros(2, 3, 3, dtype=torch.int64)
    assert torch.equal(turn_patches(images, none, patch_size=4, gap=0), images)


def test_each_patch_is_turned_like_an_image(rng: torch.Generator) -> None:
    images = torch.rand(5, 3, 20, 20, generator=rng)
    turns = torch.randint(4, (5, 4, 4), generator=rng)
    turned = turn_patches(images, turns, patch_size=3, gap=2)
    for image, result, own in zip(images.numpy(), turned.numpy(), turns.tolist(), strict=True):
        for row in range(4):
            for column in range(4):
                patch = image[:, 5 * row + 1 : 5 * row + 4, 5 * column + 1 : 5 * column + 4]
                expected = np.rot90(patch, own[row][column], axes=(1, 2))
                found = result[:, 3 * row : 3 * row + 3, 3 * column : 3 * column + 3]
                np.testing.assert_array_equal(found, expected)


def test_images_of_any_size_are_resized_for_the_gaps(rng: torch.Generator) -> None:
    turns = torch.randint(4, (2, 2, 2), generator=rng)
    turned = turn_patches(torch.rand(2, 3, 16, 16, generator=rng), turns, patch_size=8, gap=2)
    assert turned.shape == (2, 3, 16, 16)


@pytest.mark.parametrize("gap", [-2, 3])
def test_gaps_that_would_put_patches_off_their_centres_are_refused(gap: int) -> None:
    with pytest.raises(ValueError, match="gap must be even"):
        turn_patches(torch.rand(1, 1, 8, 8), torch.zeros(1, 2, 2).long(), patch_size=4, gap=gap)


@pytest.mark.parametrize("quarter_turns", [1, 2, 3])
@pytest.mark.parametrize("gap", [2, 4, 8])
def test_resizing_for_the_gaps_marks_all_turns_alike(
    rng: torch.Generator, gap: int, quarter_turns: int
) -> None:
    """Patches of a turned image are the turned patches of the image, so of noise any turn is as
    likely as any other; cells cut off their middle would have other phases of the resize."""
    images, none = torch.rand(2, 3, 32, 32, generator=rng), torch.zeros(2, 4, 4).long()
    turned_first = turn_patches(
        torch.rot90(images, quarter_turns, dims=(-2, -1)), none, patch_size=8, gap=gap
    )
    turned_last = turn_patches(images, none, patch_size=8, gap=gap)
    turned_last = torch.rot90(turned_last, quarter_turns, dims=(-2, -1))
    torch.testing.assert_close(turned_first, turned_last)
