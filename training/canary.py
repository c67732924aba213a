"""The canary on a user's own files: does the data path of a run tell which way up noise was?

Noise in files like the user's goes the whole way of the run: preparation, training and evaluation
batches, the four turns. What a classifier can read from it then, a network would learn as well,
instead of the photos.
"""

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from data.canary import marks, probe_rotation
from data.downloaded_source import Scratch
from data.loaders import Batch, Batches, eval_batches
from data.lookalikes import LookalikeSource, kinds_in_words, kinds_of
from data.patience import Patience
from data.prepare import prepare
from data.prepared import PreparedData, PreparedSplit
from data.processors import available_processors
from data.rotation import make_rotation_batch
from data.sources import open_source
from data.splits import Subset
from training.images import as_pretrained_on
from training.probes import wilson_interval
from training.settings import ConfigError, Settings

SAMPLE_FILES = 64
"""Files of the source whose form is copied."""

LEAST_IMAGES = 150
"""Noise images with fewer of which nothing could be said; a third of them is learned from."""

Z_999 = 3.2905
"""Of 99.9 % intervals: four shares are judged, and a clean path must not be called leaking."""

_BATCH = 50  # images; no more is held in memory than the marks of all and one batch

Marked = tuple[NDArray[np.float64], NDArray[np.int64]]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How often a small classifier told the turn of noise that it had not seen."""

    batches: Literal["training", "evaluation"]
    question: str
    chance: float
    """Share of right answers of a guess."""
    share: float
    """Share of its right answers, over all four turns of each image."""
    images: int
    """Images in four turns each. The turns count as one answer: a classifier that treats them alike
    is right or wrong on all of them."""

    @property
    def interval(self) -> tuple[float, float]:
        """99.9 % Wilson interval of the share."""
        return wilson_interval(round(self.share * self.images), self.images, Z_999)

    @property
    def leaks(self) -> bool:
        """Whether it is better than a guess."""
        return self.interval[0] > self.chance


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the canary found."""

    files: str
    """What the files are like, in words."""
    readings: tuple[Reading, ...]

    @property
    def leaks(self) -> bool:
        """Whether any of the readings is better than a guess."""
        return any(reading.leaks for reading in self.readings)

    def in_words(self) -> str:
        """Say it in one sentence, with a way out where there is something to be done."""
        if not self.leaks:
            return (
                "Clean: noise in such files goes through this data path without a mark of its "
                "orientation that the classifier can read."
            )
        worst = max(self.readings, key=lambda reading: reading.interval[0] - reading.chance)
        return (
            f"Leaking: of {worst.batches} batches of noise in such files the classifier tells "
            f"{worst.question} {worst.share:.1%} of the time, a guess {worst.chance:.0%}, and a "
            "network would learn that mark instead of the photos. Marks of the files (JPEG blocks "
            "and tables) fade the more they are shrunk: take larger files or a smaller "
            "model.image_size."
        )


def check_path(
    settings: Settings,
    *,
    images: int,
    workplace: Path,
    downloads: Path | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Verdict:
    """Send noise in files like those to pretrain on through the data path of a run.

    Args:
        settings: Of the run; `data.source` is the one whose files are copied in form.
        images: Noise images, at least `LEAST_IMAGES`; the more, the fainter a mark is found.
        workplace: Existing folder for the prepared noise, which is removed in the end.
        downloads: Directory of the download, where the source is remote.
        report: Called with the number of images prepared so far and in all.

    Raises:
        ConfigError: If there are too few `images`.
        DatasetError: If the source cannot be read, or the noise not be prepared.
    """
    if images < LEAST_IMAGES:
        raise ConfigError(
            f"--images must be at least {LEAST_IMAGES} to say anything, got {images}."
        )
    with tempfile.TemporaryDirectory(dir=workplace, prefix=".canary-") as folder:
        scratch = Scratch(directory=Path(folder) / "fetched", patience=Patience())
        source = open_source(
            settings.data.source, settings.data.test_source, downloads=downloads, scratch=scratch
        )
        kinds = kinds_of(source.sample("train", SAMPLE_FILES))
        scratch.remove()
        learned = images // 3
        noise = LookalikeSource(kinds, train=learned, test=images - learned, seed=settings.seed)
        prepare(
            noise,
            Path(folder) / "prepared",
            side=settings.prepared_size,
            report=report,
            workers=settings.hardware.threads or available_processors(),
            pixel_format=settings.data.format,
        )
        prepared = PreparedData.open(Path(folder) / "prepared")
        assert prepared.test is not None
        train, test = _whole(prepared.train), _whole(prepared.test)
        learned_from = _turned(_training_batches(train, settings), settings)
        in_training = _turned(_training_batches(test, settings), settings)
        in_evaluation = _turned(_evaluation_batches(test, settings), settings)
        readings = [
            *(_read(learned_from, in_training, "training", turns) for turns in (4, 2)),
            *(_read(learned_from, in_evaluation, "evaluation", turns) for turns in (4, 2)),
        ]
    return Verdict(files=kinds_in_words(kinds), readings=tuple(readings))


def _whole(split: PreparedSplit) -> Subset:
    return Subset(split, np.arange(len(split), dtype=np.int64))


def _training_batches(subset: Subset, settings: Settings) -> Iterable[Batch]:
    batches = Batches(
        subset,
        batch_size=_BATCH,
        side=settings.model.image_size,
        flip=settings.pretrain.flip,
        seed=settings.seed,
        device=torch.device("cpu"),
        crop_scale=settings.pretrain.crop_scale,
        colour_jitter=settings.pretrain.colour_jitter,
        greyscale=settings.pretrain.greyscale,
    )
    return batches.epoch(0)


def _evaluation_batches(subset: Subset, settings: Settings) -> Iterable[Batch]:
    return eval_batches(subset, _BATCH, settings.model.image_size, torch.device("cpu"))


def _turned(batches: Iterable[Batch], settings: Settings) -> Marked:
    """Return the marks of all four turns of each image, and the turns."""
    found, turns = [], []
    for batch in batches:
        turned, labels = make_rotation_batch(as_pretrained_on(batch.images, settings))
        found.append(marks(turned.numpy()))
        turns.append(labels.numpy())
    return np.concatenate(found), np.concatenate(turns)


def _read(
    learned_from: Marked, tested_on: Marked, of: Literal["training", "evaluation"], turns: int
) -> Reading:
    share = probe_rotation(
        (learned_from[0], learned_from[1] % turns), (tested_on[0], tested_on[1] % turns)
    )
    return Reading(
        batches=of,
        question="the turn" if turns == 4 else "0 or 180° from 90 or 270°",
        chance=1 / turns,
        share=share,
        images=len(tested_on[0]) // 4,
    )
