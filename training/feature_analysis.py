"""Feature analysis: what each layer knows, from the embedding to the last block.

Rotation features are often better some layers below the top, so every layer gets a linear probe
and a nearest-neighbour score, on features that were taken in one pass over the images. The mean of
the patch tokens is the headline: at the embedding the class token has seen no pixel.
"""

from dataclasses import dataclass

from torch import Tensor

from models.vit import layer_names
from training import runner
from training.features import Backbone, Features, SplitFeatures, open_features
from training.images import open_labelled
from training.probes import knn_accuracy, train_heads
from training.runner import StageContext, StageOutcome
from training.settings import Settings


@dataclass(frozen=True)
class LayerScores:
    """Test scores by layer."""

    mean: list[float]
    cls: list[float]
    knn: list[float]


def compute(context: StageContext) -> StageOutcome:
    """Score every layer of the pretrained backbone, and of a random one as control."""
    settings, device = context.settings, context.hardware().torch_device
    images = open_labelled(context.input("data"), settings)

    def score(backbone: Backbone) -> LayerScores:
        features = open_features(context.input("features"), backbone, images)
        return score_layers(
            features.where_heads_train(device), settings, num_classes=len(images.class_names)
        )

    context.progress(0, 2, "backbones", "pretrained")
    found = score("pretrained")
    context.progress(1, 2, "backbones", "random, as control")
    control = score("random")
    context.progress(2, 2, "backbones")
    layers = [
        {
            "layer": layer,
            "name": name,
            "top1": found.mean[layer],
            "cls_top1": found.cls[layer],
            "knn_top1": found.knn[layer],
            "random_top1": control.mean[layer],
            "random_cls_top1": control.cls[layer],
            "random_knn_top1": control.knn[layer],
        }
        for layer, name in enumerate(layer_names(settings.model.depth))
    ]
    best = max(layers, key=lambda row: float(str(row["top1"])))
    return StageOutcome(
        scores={
            "layers": layers,
            "best_layer": best["name"],
            "best_top1": best["top1"],
            "total": len(images.test),
            "labels": len(images.train),
        }
    )


def score_layers(features: SplitFeatures, settings: Settings, *, num_classes: int) -> LayerScores:
    """Probe every layer's mean token and class token, and let its neighbours vote."""
    recipe, train, test = settings.linear_probe, features.train, features.test

    def pooled(features: Features) -> Tensor:
        return features.rows[:-1]

    heads = train_heads(
        pooled(train),
        train.labels,
        num_classes,
        lrs=recipe.lrs,
        weight_decays=recipe.weight_decays,
        epochs=recipe.epochs,
        batch_size=recipe.batch_size,
        seed=settings.seed,
    )
    chosen = heads.choose(pooled(features.val), features.val.labels)
    on_test, _ = heads.scores(pooled(test), test.labels)
    scores = [float(on_test[row, best]) for row, best in enumerate(chosen)]
    return LayerScores(
        mean=scores[: train.layers],
        cls=scores[train.layers :],
        knn=[
            knn_accuracy(
                train.mean[layer],
                train.labels,
                test.mean[layer],
                test.labels,
                k=min(settings.feature_analysis.knn_k, len(train.labels)),
            )
            for layer in range(train.layers)
        ],
    )


if __name__ == "__main__":
    raise SystemExit(runner.main(compute))
