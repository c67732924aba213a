"""Variants: a run's stages once more, under other seeds or with fewer labels.

A variant is nothing but other settings. Its stages have keys, checkpoints and results like any
others, resume like them, and are found again in every run. What it has in common with the run (the
prepared images, and the backbone where pretraining is shared) is the run's own.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from data.splits import label_counts, train_size
from training.configure import override
from training.recipes import LabelledSettings
from training.settings import Settings
from training.stages import STAGES, Stage, plan, transfer_data
from training.store import StageResult

SEEDED = (
    *("linear_probe", "finetune_1", "finetune_2", "finetune_all", "from_scratch"),
    "label_efficiency",
)
"""Stages that are repeated under every seed; `pretrain` besides, where each has its own."""

CURVES = ("finetune_2", "from_scratch")
"""Stages that are repeated with every number of labels, for curves beside the probe's."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A run's stages under other settings.

    Attributes:
        name: What differs, as people read it; unique within the run.
        overrides: The same as `path.to.setting=value`, all of it.
        settings: With these.
        stages: What is computed, in this order.
        builds_on: Variant whose results are used where this one computes none; none for the run.
    """

    name: str
    overrides: tuple[str, ...]
    settings: Settings
    stages: tuple[Stage, ...]
    builds_on: str | None = None


def variants(
    settings: Settings, results: Mapping[str, StageResult], until: str | None = None
) -> list[Variant]:
    """Return the variants that `evaluation` asks for, each after those that it builds on.

    Args:
        settings: Of the run.
        results: Of the run's own stages, by name. How many labels a fraction comes to is known
            once the labelled images are prepared; before that, variants of it are left out.
        until: Last stage of the run; nothing is repeated that it does not have.
    """
    found = list(_other_seeds(settings, until))
    data = results.get(transfer_data(settings))
    if not settings.evaluation.trained_curves or data is None or not data.scores["classes"]:
        return [variant for variant in found if variant.stages]
    seeds: list[tuple[Settings, Variant | None]] = [(settings, None)]
    seeds += [(variant.settings, variant) for variant in found]
    counts, classes = data.scores["counts"], len(data.scores["classes"])
    for one, seed in seeds:
        found += _fewer_labels(one, seed, counts, classes, until)
    return [variant for variant in found if variant.stages]


def _other_seeds(settings: Settings, until: str | None) -> Iterator[Variant]:
    own = settings.evaluation.pretraining == "own"
    targets = ("pretrain", *SEEDED) if own else SEEDED
    kept = () if own else ("pretrain", "features", "frozen_tokens")
    for seed in range(settings.seed + 1, settings.seed + settings.evaluation.seeds):
        overrides = (f"seed={seed}",)
        changed = override(settings, overrides)
        yield Variant(
            name=f"seed {seed}",
            overrides=overrides,
            settings=changed,
            stages=_stages(changed, targets, kept, until),
        )


def _fewer_labels(
    settings: Settings,
    seed: Variant | None,
    counts: Mapping[str, int],
    classes: int,
    until: str | None,
) -> Iterator[Variant]:
    """Yield a variant for each fraction of the labels, but for the one that a run has anyway.

    Args:
        settings: Of the run, under the seed in question.
        seed: Variant of that seed; none for the run's own.
        counts: Prepared images by split.
        classes: Of the images.
        until: Last stage of the run.
    """
    data = settings.data
    images = train_size(counts, val_fraction=data.val_fraction, test_fraction=data.test_fraction)
    for labels in label_counts(settings.evaluation.label_fractions, images, classes):
        if labels == (settings.transfer.labels or images):
            continue
        overrides = (f"transfer.labels={labels}", *_recipes(settings, labels))
        changed = override(settings, overrides)
        name = f"{labels} labels"
        yield Variant(
            name=f"{name}, {seed.name}" if seed else name,
            overrides=(*(seed.overrides if seed else ()), *overrides),
            settings=changed,
            stages=_stages(changed, CURVES, ("pretrain", "features"), until),
            builds_on=seed.name if seed else None,
        )


def _recipes(settings: Settings, labels: int) -> Iterator[str]:
    """Yield what the training stages need to be changed in to learn from so few labels.

    A batch is no larger than there are labels, and there are epochs for
    `evaluation.least_steps` steps; warm-up and patience, which are counted in epochs, keep their
    proportion.
    """
    recipes: dict[str, LabelledSettings] = {
        "finetune": settings.finetune,
        "from_scratch": settings.from_scratch,
    }
    if settings.hardware.processes != "auto" and any(
        labels < recipe.batch_size for recipe in recipes.values()
    ):
        yield "hardware.processes=1"  # so few images are not worth more, nor can all be divided
    for section, recipe in recipes.items():
        batch_size = min(recipe.batch_size, labels)
        if batch_size != recipe.batch_size:
            yield f"{section}.batch_size={batch_size}"
            if batch_size % recipe.accumulation_steps:
                yield f"{section}.accumulation_steps=1"
        epochs = math.ceil(settings.evaluation.least_steps / (labels // batch_size))
        if epochs > recipe.epochs:
            longer = epochs / recipe.epochs
            yield f"{section}.epochs={epochs}"
            yield f"{section}.warmup_epochs={recipe.warmup_epochs * longer:g}"
            if recipe.patience is not None:
                yield f"{section}.patience={math.ceil(recipe.patience * longer)}"


def _stages(
    settings: Settings, targets: tuple[str, ...], kept: tuple[str, ...], until: str | None
) -> tuple[Stage, ...]:
    """Return the targets that a run has, and what they need, without what is the run's own."""
    planned = [stage.name for stage in plan(settings, until)]
    wanted = {
        stage.name
        for target in targets
        if target in planned
        for stage in plan(settings, target)
        if stage.name not in kept and not stage.name.startswith(("download", "prepare"))
    }
    return tuple(stage for name, stage in STAGES.items() if name in wanted)
