"""Scores of a model on a split, every image counted exactly once."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from data.loaders import Batch
from data.rotation import make_rotation_batch
from training.data_parallel import ALONE, Team
from training.hardware import Hardware
from training.stopping import StopRequest


@dataclass(frozen=True)
class Score:
    """How many of how many were right, and the mean loss in nats."""

    correct: int
    total: int
    loss: float

    @property
    def accuracy(self) -> float:
        """Share of correct answers, in [0, 1]."""
        return self.correct / self.total


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    hardware: Hardware,
    stop: StopRequest,
    rotations: bool = False,
    team: Team = ALONE,
) -> Score:
    """Score a classifier in eval mode; it is left there.

    Args:
        model: Maps images `(B, 3, S, S)` to an output with `logits` `(B, C)`.
        batches: Every image once, in any order; of several processes in one of them.
        hardware: Device and precision.
        stop: Asked after each batch.
        rotations: Score all four turns of each image against their turn, not the class.
        team: The processes that divide the images; all get the score of all images.

    Raises:
        InterruptedError: If a stop was requested.
        ValueError: If `batches` is empty, or has no labels and `rotations` is off.
    """
    model.eval()
    correct = total = 0
    loss = torch.zeros((), dtype=torch.float64)
    for batch in team.until_stopped(batches, stop):
        images, labels = batch.images, batch.labels
        if rotations:
            images, labels = make_rotation_batch(images)
        if labels is None:
            raise ValueError("evaluate needs labels, or rotations=True, which makes its own.")
        with hardware.autocast():
            logits = model(images).logits.float()
        loss += functional.cross_entropy(logits, labels, reduction="sum").double().cpu()
        correct += int((logits.argmax(dim=1) == labels).sum())
        total += len(labels)
    all_correct, all_images, all_loss = team.total(correct, total, float(loss))
    if not all_images:
        raise ValueError("evaluate got no batches; is the split empty?")
    return Score(
        correct=int(all_correct), total=int(all_images), loss=float(all_loss) / int(all_images)
    )
