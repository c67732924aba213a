"""The report's scores: the rows of its headline table, and what they say in a sentence."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from training.probes import wilson_interval
from training.seeds import Spread
from training.store import StageResult

Spreads = Mapping[str, Mapping[str, Spread]]
"""What several seeds gave, by stage and score; nothing for one seed."""

TITLES = {
    "download": "Download",
    "download_transfer": "Download for transfer",
    "prepare_data": "Prepare data",
    "prepare_transfer_data": "Prepare transfer data",
    "pretrain": "Pretrain",
    "features": "Features",
    "linear_probe": "Linear probe",
    "frozen_tokens": "Frozen tokens",
    "finetune_1": "Fine-tune, last block",
    "finetune_2": "Fine-tune, last two blocks",
    "finetune_all": "Fine-tune, all",
    "from_scratch": "From scratch",
    "feature_analysis": "Feature analysis",
    "label_efficiency": "Label efficiency",
}
"""What people read for each stage, in the order of the report."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """One row of the headline table.

    Attributes:
        name: What was measured, in words.
        note: How.
        score: Share of right answers on test; of several seeds the mean.
        correct: Right answers, where they were counted and there is one seed.
        total: Answers, where they were counted and there is one seed.
        control: Whether it is there to be compared with.
        spread: Between seeds, where there are several.
    """

    name: str
    note: str
    score: float
    correct: int | None
    total: int | None
    control: bool = False
    spread: Spread | None = None

    @property
    def whiskers(self) -> tuple[float, float]:
        """Lower and upper end of what is drawn around the score."""
        if self.spread:
            return self.score - self.spread.std, self.score + self.spread.std
        return self.interval or (self.score, self.score)

    @property
    def interval(self) -> tuple[float, float] | None:
        """95% Wilson interval, where the answers were counted."""
        if self.correct is None or not self.total:
            return None
        return wilson_interval(self.correct, self.total)


def rotation_score(result: StageResult, spreads: Spreads) -> Score:
    """Return how well the pretext task is solved."""
    return _score(
        "Rotation",
        "which of four ways a test image was turned",
        result,
        ("rotation_accuracy", "correct"),
        spreads,
    )


def class_scores(results: Mapping[str, StageResult], spreads: Spreads) -> Iterator[Score]:
    """Yield the rows about classes: first the controls, then what is compared with them."""
    if "linear_probe" in results:
        yield _score(
            "Random backbone",
            "linear probe of the untrained network",
            results["linear_probe"],
            ("random_backbone_top1", "random_backbone_correct"),
            spreads,
            control=True,
        )
    if "from_scratch" in results:
        note = "same network and labels, not pretrained"
        yield _top1(results["from_scratch"], note, spreads, control=True)
    for name, note in (
        ("linear_probe", "linear head on the frozen backbone"),
        ("finetune_1", "head and last block trained"),
        ("finetune_2", "head and last two blocks trained"),
        ("finetune_all", "all of the network trained"),
    ):
        if name in results:
            yield _top1(results[name], note, spreads)


def _top1(result: StageResult, note: str, spreads: Spreads, *, control: bool = False) -> Score:
    return _score(TITLES[result.stage], note, result, ("top1", "correct"), spreads, control=control)


def _score(
    name: str,
    note: str,
    result: StageResult,
    measured: tuple[str, str],
    spreads: Spreads,
    *,
    control: bool = False,
) -> Score:
    """Return a row; `measured` are the names of the share and of the count that it is of."""
    share, count = measured
    spread = spreads.get(result.stage, {}).get(share)
    if spread:
        return Score(
            name=name,
            note=note,
            score=spread.mean,
            correct=None,
            total=None,
            control=control,
            spread=spread,
        )
    return Score(
        name=name,
        note=note,
        score=result.scores[share],
        correct=result.scores.get(count),
        total=result.scores.get("total"),
        control=control,
    )


def class_chance(results: Mapping[str, StageResult]) -> float | None:
    """Return the score of guessing a class; none without classes."""
    data = results.get("prepare_transfer_data") or results.get("prepare_data")
    classes = len(data.scores.get("classes", ())) if data else 0
    return 1 / classes if classes else None


def summary(results: Mapping[str, StageResult], spreads: Spreads) -> Iterator[str]:
    """Say in sentences what the tables say in numbers."""

    def measured(stage: str, name: str = "top1") -> float:
        spread = spreads.get(stage, {}).get(name)
        return spread.mean if spread else float(results[stage].scores[name])

    if "pretrain" in results:
        score = measured("pretrain", "rotation_accuracy")
        yield (
            "Trained without any label to tell which way up an image is, the network is right for "
            f"{score:.0%} of the turned test images; guessing gives 25%."
        )
    if "linear_probe" in results:
        probe = results["linear_probe"].scores
        labels = f"With {probe['labels']:,} labels, a" if "labels" in probe else "A"
        yield (
            f"{labels} linear head on its frozen features names {measured('linear_probe'):.0%} of "
            "the test images right; on those of the untrained network, "
            f"{measured('linear_probe', 'random_backbone_top1'):.0%}."
        )
    tuned = [name for name in ("finetune_1", "finetune_2", "finetune_all") if name in results]
    if tuned and "from_scratch" in results:
        # The best of several test scores would flatter.
        chosen = max(tuned, key=lambda name: float(results[name].scores["val_top1"]))
        yield (
            f"Fine-tuned it reaches {measured(chosen):.0%}, where the same network trained from "
            f"scratch on the same labels reaches {measured('from_scratch'):.0%}."
        )
