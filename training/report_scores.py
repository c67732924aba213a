"""The report's scores: the rows of its headline table, and what they say in a sentence."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from training.probes import wilson_interval
from training.store import StageResult

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
}
"""What people read for each stage, in the order of the report."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """One row of the headline table.

    Attributes:
        name: What was measured, in words.
        note: How.
        score: Share of right answers on test.
        correct: Right answers, where they were counted.
        total: Answers, where they were counted.
        control: Whether it is there to be compared with.
    """

    name: str
    note: str
    score: float
    correct: int | None
    total: int | None
    control: bool = False

    @property
    def interval(self) -> tuple[float, float] | None:
        """95% Wilson interval, where the answers were counted."""
        if self.correct is None or not self.total:
            return None
        return wilson_interval(self.correct, self.total)


def rotation_score(result: StageResult) -> Score:
    """Return how well the pretext task is solved."""
    return Score(
        name="Rotation",
        note="which of four ways a test image was turned",
        score=result.scores["rotation_accuracy"],
        correct=result.scores.get("correct"),
        total=result.scores.get("total"),
    )


def class_scores(results: Mapping[str, StageResult]) -> Iterator[Score]:
    """Yield the rows about classes: first the controls, then what is compared with them."""
    if "linear_probe" in results:
        probe = results["linear_probe"].scores
        yield Score(
            name="Random backbone",
            note="linear probe of the untrained network",
            score=probe["random_backbone_top1"],
            correct=probe.get("random_backbone_correct"),
            total=probe.get("total"),
            control=True,
        )
    if "from_scratch" in results:
        note = "same network and labels, not pretrained"
        yield _top1(results["from_scratch"], note, control=True)
    for name, note in (
        ("linear_probe", "linear head on the frozen backbone"),
        ("finetune_1", "head and last block trained"),
        ("finetune_2", "head and last two blocks trained"),
        ("finetune_all", "all of the network trained"),
    ):
        if name in results:
            yield _top1(results[name], note)


def _top1(result: StageResult, note: str, *, control: bool = False) -> Score:
    return Score(
        name=TITLES[result.stage],
        note=note,
        score=result.scores["top1"],
        correct=result.scores.get("correct"),
        total=result.scores.get("total"),
        control=control,
    )


def class_chance(results: Mapping[str, StageResult]) -> float | None:
    """Return the score of guessing a class; none without classes."""
    data = results.get("prepare_transfer_data") or results.get("prepare_data")
    classes = len(data.scores.get("classes", ())) if data else 0
    return 1 / classes if classes else None


def summary(results: Mapping[str, StageResult]) -> Iterator[str]:
    """Say in sentences what the tables say in numbers."""
    if "pretrain" in results:
        score = results["pretrain"].scores["rotation_accuracy"]
        yield (
            "Trained without any label to tell which way up an image is, the network is right for "
            f"{score:.0%} of the turned test images; guessing gives 25%."
        )
    if "linear_probe" in results:
        probe = results["linear_probe"].scores
        labels = f"With {probe['labels']:,} labels, a" if "labels" in probe else "A"
        yield (
            f"{labels} linear head on its frozen features names {probe['top1']:.0%} of the test "
            f"images right; on those of the untrained network, {probe['random_backbone_top1']:.0%}."
        )
    tuned = [
        results[name].scores["top1"]
        for name in ("finetune_1", "finetune_2", "finetune_all")
        if name in results
    ]
    if tuned and "from_scratch" in results:
        yield (
            f"Fine-tuned it reaches {max(tuned):.0%}, where the same network trained from scratch "
            f"on the same labels reaches {results['from_scratch'].scores['top1']:.0%}."
        )
