"""Linear probe: a linear head on the frozen backbone's class token.

The heads are trained on features that were taken once, so nothing can change the backbone. The
same is done with the untrained network as control: a random ViT is already a fair descriptor.
"""

from dataclasses import dataclass

from models.export import save_model
from models.vit import replace_head, set_head
from training import runner
from training.features import Backbone, SplitFeatures, open_features
from training.images import open_labelled
from training.network import load_start
from training.probes import Heads, train_heads
from training.runner import StageContext, StageOutcome
from training.settings import Settings


@dataclass(frozen=True)
class Probe:
    """The head that val chose, scored on test once."""

    heads: Heads
    place: int
    """Of the chosen head among those of the only layer."""
    val_top1: float
    correct: int
    total: int


def compute(context: StageContext) -> StageOutcome:
    """Probe the pretrained backbone and the random one; write the backbone with its head."""
    settings, device = context.settings, context.hardware().torch_device
    images = open_labelled(context.input("data"), settings)

    def probe(backbone: Backbone) -> Probe:
        features = open_features(context.input("features"), backbone, images)
        return train_probe(
            features.where_heads_train(device), settings, num_classes=len(images.class_names)
        )

    context.progress(0, 2, "backbones", "pretrained")
    chosen = probe("pretrained")
    context.progress(1, 2, "backbones", "random, as control")
    control = probe("random")
    context.progress(2, 2, "backbones")

    model = load_start(context)
    replace_head(model, images.class_names)
    set_head(model, *chosen.heads.folded(0, chosen.place))
    save_model(
        model,
        context.directory / "model",
        image_size=settings.model.image_size,
        prepared_size=settings.prepared_size,
    )
    lr, weight_decay = chosen.heads.grid[chosen.place]
    return StageOutcome(
        scores={
            "top1": chosen.correct / chosen.total,
            "correct": chosen.correct,
            "total": chosen.total,
            "val_top1": chosen.val_top1,
            "lr": lr,
            "weight_decay": weight_decay,
            "random_backbone_top1": control.correct / control.total,
            "random_backbone_correct": control.correct,
            "labels": len(images.train),
        },
        made=["model"],
    )


def train_probe(features: SplitFeatures, settings: Settings, *, num_classes: int) -> Probe:
    """Train heads of all learning rates and weight decays; val chooses one, test scores it."""
    recipe = settings.linear_probe
    train, val, test = features.train, features.val, features.test
    heads = train_heads(
        train.final_cls,
        train.labels,
        num_classes,
        lrs=recipe.lrs,
        weight_decays=recipe.weight_decays,
        epochs=recipe.epochs,
        batch_size=recipe.batch_size,
        seed=settings.seed,
    )
    place = heads.choose(val.final_cls, val.labels)[0]
    on_val, _ = heads.scores(val.final_cls, val.labels)
    on_test, _ = heads.scores(test.final_cls, test.labels)
    return Probe(
        heads=heads,
        place=place,
        val_top1=float(on_val[0, place]),
        correct=round(float(on_test[0, place]) * len(test.labels)),
        total=len(test.labels),
    )


if __name__ == "__main__":
    raise SystemExit(runner.main(compute))
