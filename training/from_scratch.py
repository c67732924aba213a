"""The baseline: the same network on the same labels, without pretraining.

It has a recipe of its own, because a learning rate, or first weights, that suit pretraining can
make a network without it look far worse than it is.
"""

from training import runner
from training.images import open_labelled
from training.network import build_model
from training.runner import StageContext, StageOutcome
from training.supervised import train_classifier


def compute(context: StageContext) -> StageOutcome:
    """Train all of a fresh network on the labelled images."""
    images = open_labelled(context.input("data"), context.settings, context.is_stopped)
    weights = context.settings.from_scratch.weights
    model = build_model(context, images.class_names, weights)
    return train_classifier(context, model, images, section="from_scratch")


if __name__ == "__main__":
    raise SystemExit(runner.main(compute))
