"""Feature analysis: what each layer knows, from the embedding to the last block.

Rotation features are often better some layers below the top, so every layer gets a linear probe
and nearest-neighbour scores, on features that were taken in one pass over the images; and, without
labels, in how many directions they spread and how alike they are to those of the other layers. The
mean of the patch tokens is the headline: at the embedding the class token has seen no pixel.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from models.vit import layer_names
from training import runner
from training.feature_geometry import effective_rank, linear_cka
from training.features import Backbone, Features, SplitFeatures, open_features
from training.images import open_labelled
from training.probes import knn_accuracies, train_heads
from training.runner import StageContext, StageOutcome
from training.settings import Settings


@dataclass(frozen=True)
class LayerScores:
    """What was found by layer, all on test images.

    Attributes:
        mean: Top-1 of a probe on the mean of the patch tokens.
        cls: Top-1 of a probe on the class token.
        knn: Top-1 of the nearest neighbours of the mean, by their number.
        effective_rank: Of the mean.
        cka: `(L+1, L+1)`, how alike the means of two layers are.
    """

    mean: Sequence[float]
    cls: Sequence[float]
    knn: Sequence[dict[int, float]]
    effective_rank: Sequence[float]
    cka: Sequence[Sequence[float]]

    def row(self, layer: int, prefix: str = "") -> dict[str, object]:
        """Return one layer's scores by their names in the record, each after a prefix."""
        knn = self.knn[layer]
        scores = {
            "top1": self.mean[layer],
            "cls_top1": self.cls[layer],
            "knn_top1": knn[max(knn)],
            "knn": {str(k): top1 for k, top1 in knn.items()},
            "effective_rank": self.effective_rank[layer],
        }
        return {prefix + name: value for name, value in scores.items()}


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
            **found.row(layer),
            **control.row(layer, "random_"),
        }
        for layer, name in enumerate(layer_names(settings.model.depth))
    ]
    best = max(layers, key=lambda row: float(str(row["top1"])))
    return StageOutcome(
        scores={
            "layers": layers,
            "best_layer": best["name"],
            "best_top1": best["top1"],
            "cka": found.cka,
            "random_cka": control.cka,
            "total": len(images.test),
            "labels": len(images.train),
        }
    )


def score_layers(features: SplitFeatures, settings: Settings, *, num_classes: int) -> LayerScores:
    """Probe every layer's mean token and class token, let its neighbours vote, and measure it.

    Rank and similarity are those of the test images: more of them than labelled ones, as a rule.
    """
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
    on_test, _ = heads.scores(pooled(test), test.labels, chosen)
    scores = on_test[:, 0].tolist()
    ks = sorted(settings.feature_analysis.knn_ks)
    lowered = [min(k, len(train.labels)) for k in ks]

    def vote(layer: int) -> dict[int, float]:
        known, asked = train.mean[layer], test.mean[layer]
        found = knn_accuracies(known, train.labels, asked, test.labels, lowered)
        return dict(zip(ks, found, strict=True))

    return LayerScores(
        mean=scores[: train.layers],
        cls=scores[train.layers :],
        knn=[vote(layer) for layer in range(train.layers)],
        effective_rank=[effective_rank(layer) for layer in test.mean],
        cka=linear_cka(test.mean),
    )


if __name__ == "__main__":
    raise SystemExit(runner.main(compute))
