"""How often a stage is tried."""

import pytest

from tasks.delivery import attempts_without_progress


@pytest.mark.parametrize(
    ("steps", "fruitless"),
    [
        ([], 0),
        ([0], 1),
        ([0, 0, 0], 3),
        ([5], 0),
        ([5, 9, 12], 0),
        ([5, 5], 1),
        ([5, 0, 5], 2),
        ([5, 5, 6], 0),
    ],
)
def test_only_attempts_that_get_no_further_count(steps: list[int], fruitless: int) -> None:
    assert attempts_without_progress(steps) == fruitless
