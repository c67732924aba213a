"""The parts of a preparation, a shard each: which images, what is left to make, who makes what."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

from data.claims import Claims, Plan
from data.records import Split


@dataclass(frozen=True, slots=True)
class Part:
    """The source images that go into one shard."""

    split: Split
    first: int
    """Number of its first image in the split."""
    count: int
    """Images, those included that turn out to be unusable."""
    name: str
    """Of the shard."""


def parts_of(counts: Mapping[Split, int], size: int) -> list[Part]:
    """Divide the images of each split into parts of `size`; the last one may be smaller."""
    return [
        Part(split, first, min(size, count - first), f"{split}-{first // size:05d}")
        for split, count in counts.items()
        for first in range(0, count, size)
    ]


class PartsLeft:
    """The parts that are not made yet, as one of the processes that make them knows them."""

    def __init__(self, parts: Sequence[Part], claims: Claims, plan: Plan, *, leads: bool) -> None:
        """Take all parts for not made yet.

        Args:
            parts: All of them, in the order of the images.
            claims: On them.
            plan: What they belong to.
            leads: Whether this process takes them from the first one on. Another begins in the
                middle of the longest stretch that is left, and goes on from there, so that each
                reads what lies together.
        """
        self._left = dict(enumerate(parts))
        self._claims, self._plan, self._leads = claims, plan, leads
        self._last = -2

    def __iter__(self) -> Iterator[Part]:
        """Yield what is left."""
        yield from list(self._left.values())

    def __len__(self) -> int:
        return len(self._left)

    def made(self, part: Part) -> None:
        """Take off a part that is made."""
        self._left = {number: each for number, each in self._left.items() if each != part}

    @contextmanager
    def claimed(self) -> Iterator[Part | None]:
        """Hold a part for the `with` block, which makes it; None where others hold all."""
        free = sorted(self._left)
        while free:
            number = self._choose(free)
            part = self._left[number]
            with self._claims.claim(part.name, self._plan) as mine:
                if mine:
                    self._last = number
                    yield part
                    self.made(part)
                    return
            free.remove(number)
        yield None

    def makers_here(self) -> int:
        """Count the processes that make a part just now on this one's processors, it included."""
        others = (part.name for number, part in self._left.items() if number != self._last)
        return 1 + self._claims.held_here(others)

    def _choose(self, free: Sequence[int]) -> int:
        if self._leads:
            return free[0]
        if self._last + 1 in free:
            return self._last + 1
        # Numbers that follow each other are as far from their places as each other.
        grouped = groupby(enumerate(free), key=lambda item: item[1] - item[0])
        stretches = [[number for _, number in group] for _, group in grouped]
        longest = max(stretches, key=len)
        return longest[len(longest) // 2]
