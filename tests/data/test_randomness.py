import numpy as np
import pytest

from data.randomness import derive_seed, order_by, uniform


def splitmix64(state: int, count: int) -> list[int]:
    """The generator as its author wrote it, on Python's integers."""
    mask = 2**64 - 1
    outputs = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        outputs.append(z ^ (z >> 31))
    return outputs


def test_numbers_are_the_outputs_of_splitmix64() -> None:
    # First outputs for seed 1234567, as published with implementations in many languages.
    assert splitmix64(1234567, 3) == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]
    numbers = uniform(5, 3, np.arange(11), "order")
    expected = [z >> 11 for z in splitmix64(derive_seed(5, 3, "order"), 11)]
    assert (numbers * 2**53).astype(np.int64).tolist() == expected


def test_a_number_depends_on_its_sample_and_not_on_the_others() -> None:
    ids = np.array([7, 1_281_166, 0, 7, 3])
    together = uniform(1, 2, ids, "flip")
    alone = [uniform(1, 2, ids[i : i + 1], "flip")[0] for i in range(5)]
    assert together.tolist() == alone
    assert together[0] == together[3]


@pytest.mark.parametrize(
    "other", [(1, 0, "a"), (0, 1, "a"), (0, 0, "b"), (0, 0, 0)], ids=["seed", "epoch", "b", "0"]
)
def test_coordinates_give_unrelated_numbers(other: tuple[int, int, str | int]) -> None:
    ids = np.arange(10_000)
    seed, epoch, stream = other
    first, second = uniform(0, 0, ids, "a"), uniform(seed, epoch, ids, stream)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.04  # four standard errors


def test_numbers_are_uniform_on_the_unit_interval() -> None:
    numbers = uniform(3, 1, np.arange(20_000), "x")
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = np.bincount((numbers * 20).astype(int), minlength=20)
    assert ((counts - 1000) ** 2 / 1000).sum() < 43.8  # chi-square, 19 degrees, p = 0.001


def test_seeds_tell_parts_their_types_and_their_order_apart() -> None:
    seeds = [
        derive_seed(1, 2),
        derive_seed(2, 1),
        derive_seed(1, "2"),
        derive_seed(12),
        derive_seed("ab", "c"),
        derive_seed("a", "bc"),
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_seeds_are_the_same_on_every_machine() -> None:
    # echo -n '[0, "dropout"]' | sha256sum | cut -c1-16
    assert derive_seed(0, "dropout") == 0xE5AADFD71829A42C >> 1


@pytest.mark.parametrize("values", [10**9, 50])
def test_equal_numbers_keep_their_order(values: int) -> None:
    chance = np.random.default_rng(0).integers(0, values, 2000) / values
    assert order_by(chance).tolist() == sorted(range(2000), key=lambda number: chance[number])
    assert order_by(chance[:0]).tolist() == []
