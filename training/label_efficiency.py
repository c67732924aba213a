"""Label efficiency: what the frozen features are worth with few labels, and with many.

The probe's curve: the linear probe once more for each share of the train split's labels, on
features that were taken once, and the same on the untrained network as control. The subsets are
nested, so that a point differs from the one before it by more labels and nothing else.
"""

import torch

from data.splits import label_counts, take_labelled
from training import runner
from training.configure import override
from training.features import Backbone, SplitFeatures, open_features
from training.images import open_labelled
from training.linear_probe import Probe, train_probe
from training.runner import StageContext, StageOutcome


def compute(context: StageContext) -> StageOutcome:
    """Probe both backbones at each number of labels."""
    settings, device = context.settings, context.hardware().torch_device
    images = open_labelled(context.input("data"), override(settings, ["transfer.labels=none"]))
    counts = label_counts(
        settings.evaluation.label_fractions, len(images.train), len(images.class_names)
    )
    backbones: tuple[Backbone, ...] = ("pretrained", "random")
    total, probes = len(backbones) * len(counts), dict[tuple[Backbone, int], Probe]()
    for backbone in backbones:
        features = open_features(context.input("features"), backbone, images)
        parts = (features.train, features.val, features.test)
        headline = SplitFeatures(*(part.headline() for part in parts)).where_heads_train(device)
        for labels in counts:
            context.progress(len(probes), total, "probes", f"{backbone} backbone, {labels} labels")
            selected = take_labelled(images.train, labels, seed=settings.data.split_seed)
            some = headline.train.of(torch.from_numpy(images.train.places_of(selected)))
            probes[backbone, labels] = train_probe(
                SplitFeatures(some, headline.val, headline.test),
                settings,
                num_classes=len(images.class_names),
            )
    context.progress(total, total, "probes")
    return StageOutcome(
        scores={
            "points": [
                {
                    "labels": labels,
                    "fraction": fraction,
                    **_row(probes["pretrained", labels]),
                    **{f"random_{k}": v for k, v in _row(probes["random", labels]).items()},
                }
                for labels, fraction in counts.items()
            ],
            "total": len(images.test),
        }
    )


def _row(probe: Probe) -> dict[str, float | int]:
    return {
        "top1": probe.correct / probe.total,
        "correct": probe.correct,
        "val_top1": probe.val_top1,
        "lr": probe.lr,
        "weight_decay": probe.weight_decay,
    }


if __name__ == "__main__":
    raise SystemExit(runner.main(compute))
