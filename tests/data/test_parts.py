"""Which part a process takes next."""

from pathlib import Path

import pytest

from data.claims import Claims, Plan
from data.parts import Part, PartsLeft, parts_of


@pytest.fixture
def claims(tmp_path: Path) -> Claims:
    return Claims(tmp_path)


@pytest.fixture
def plan(claims: Claims) -> Plan:
    return claims.invite({})


def take(left: PartsLeft) -> str | None:
    with left.claimed() as part:
        return part.name if part else None


def parts(count: int) -> list[Part]:
    return parts_of({"train": 10 * count}, 10)


def test_parts_cover_every_image_once() -> None:
    found = [(part.name, part.first, part.count) for part in parts_of({"train": 11, "test": 3}, 4)]
    assert found == [
        ("train-00000", 0, 4),
        ("train-00001", 4, 4),
        ("train-00002", 8, 3),
        ("test-00000", 0, 3),
    ]


def test_alone_the_leader_goes_from_the_first_to_the_last(claims: Claims, plan: Plan) -> None:
    left = PartsLeft(parts(5), claims, plan, leads=True)
    assert [take(left) for _ in range(6)] == [*(f"train-0000{n}" for n in range(5)), None]
    assert not left


def test_a_helper_begins_in_the_middle_of_the_longest_stretch_and_goes_on_from_there(
    claims: Claims, plan: Plan
) -> None:
    left = PartsLeft(parts(9), claims, plan, leads=False)
    left.made(parts(9)[2])
    assert [take(left) for _ in range(4)] == [f"train-0000{n}" for n in (6, 7, 8, 4)]


def test_a_helper_leaps_over_what_others_work_on(claims: Claims, plan: Plan) -> None:
    left = PartsLeft(parts(8), claims, plan, leads=False)
    with claims.claim("train-00004", plan), claims.claim("train-00006", plan):
        assert [take(left) for _ in range(3)] == [f"train-0000{n}" for n in (2, 3, 1)]


def test_a_part_that_could_not_be_made_is_left(claims: Claims, plan: Plan) -> None:
    left = PartsLeft(parts(2), claims, plan, leads=True)
    with pytest.raises(MemoryError), left.claimed():
        raise MemoryError
    assert take(left) == "train-00000"


def test_nothing_is_to_be_had_where_others_hold_everything(claims: Claims, plan: Plan) -> None:
    left = PartsLeft(parts(2), claims, plan, leads=True)
    with claims.claim("train-00000", plan), claims.claim("train-00001", plan):
        assert take(left) is None
        assert left.makers_here() == 3
    assert len(left) == 2
