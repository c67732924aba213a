"""Several seeds: mean and standard deviation of what was measured under each of them."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MEASURED = {
    "pretrain": ("rotation_accuracy",),
    "linear_probe": ("top1", "random_backbone_top1"),
    "finetune_1": ("top1",),
    "finetune_2": ("top1",),
    "finetune_all": ("top1",),
    "from_scratch": ("top1",),
}
"""Scores that are repeated, by stage."""


@dataclass(frozen=True)
class Spread:
    """One score under several seeds.

    Attributes:
        mean: Over the seeds.
        std: Standard deviation between the seeds (n - 1): of one of them, not of the mean.
        n: Seeds, two at least.
    """

    mean: float
    std: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Return the spread of two values or more."""
        return cls(statistics.fmean(values), statistics.stdev(values), len(values))


def over_seeds(
    stages: Mapping[str, Mapping[str, Any]],
    variants: Iterable[Mapping[str, Mapping[str, Any]]],
) -> dict[str, dict[str, Spread]]:
    """Return the spread of every score that was measured under several seeds, by stage and score.

    Variants with another number of labels than the run do not count: another question.

    Args:
        stages: Scores of the run's own stages, by name.
        variants: The same of each of its variants.
    """
    beside = list(variants)
    found: dict[str, dict[str, Spread]] = {}
    for stage, names in MEASURED.items():
        if stage not in stages:
            continue
        labels = stages[stage].get("labels")
        same = [one[stage] for one in beside if stage in one and one[stage].get("labels") == labels]
        if same:
            found[stage] = {
                name: Spread.of([scores[name] for scores in (stages[stage], *same)])
                for name in names
            }
    return found
