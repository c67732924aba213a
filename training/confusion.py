"""What a classifier takes for what: a matrix of counts, or its most frequent mistakes.

Dimension key: N = answers, C = classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MOST_CLASSES = 20
"""Classes that a matrix of confusions has room for; of more, the frequent ones are listed."""

FREQUENT = 12
"""Confusions that are listed then."""


@dataclass(frozen=True, kw_only=True)
class Confusion:
    """What was taken for what.

    Attributes:
        title: Whose answers they are.
        names: Of the C classes.
        counts: `C` rows, the true classes, of `C` columns, the answers.
    """

    title: str
    names: Sequence[str]
    counts: Sequence[Sequence[int]]

    @property
    def total(self) -> int:
        """Answers in all."""
        return sum(map(sum, self.counts))

    @property
    def right(self) -> int:
        """Right ones among them."""
        return sum(row[label] for label, row in enumerate(self.counts))

    @property
    def fits(self) -> bool:
        """Whether a matrix of it can be read."""
        return len(self.names) <= MOST_CLASSES

    @property
    def frequent(self) -> list[tuple[str, str, int]]:
        """The most frequent mistakes: true class, answer, how often."""
        found = [
            (-count, true, said)
            for true, row in enumerate(self.counts)
            for said, count in enumerate(row)
            if count and true != said
        ]
        return [
            (self.names[true], self.names[said], -count)
            for count, true, said in sorted(found)[:FREQUENT]
        ]


def count_confusions(title: str, names: Sequence[str], true: Tensor, said: Tensor) -> Confusion:
    """Count what was taken for what.

    Args:
        title: Whose answers they are.
        names: Of the C classes.
        true: `(N,)`, int64, the classes, on the CPU.
        said: `(N,)`, int64, the answers, on the CPU.
    """
    size = len(names)
    counts = torch.bincount(true * size + said, minlength=size * size).reshape(size, size)
    return Confusion(title=title, names=list(names), counts=counts.tolist())
