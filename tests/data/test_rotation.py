import numpy as np
import pytest
import torch

from data.rotation import make_rotation_batch, rotate_each


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
