"""Feature analysis: what each layer knows, from the embedding to the last block.

Rotation features are often better some layers below the top, so every layer gets a linear probe
and a nearest-neighbour score, all from one pass over the images. The mean of the patch tokens is
the headline: at the embedding the class token has seen no pixel.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import ViTForImageClassification

from models.vit import layer_names, to_device
from training import runner
from training.features import Features, extract_features
from training.hardware import Hardware
from training.images import LabelledImages, open_labelled
from training.network import build_model, load_start
from training.probes import knn_accuracy, train_heads
from training.runner import StageContext, StageOutcome


@dataclass(frozen=True)
class _LayerScores:
    """Test scores by layer."""

    mean: list[float]
    cls: list[float]
    knn: list[float]


def compute(context: StageContext) -> StageOutcome:
    """Score every layer of the pretrained backbone, and of a random one as control."""
    hardware = context.hardware()
    images = open_labelled(context.input("data"), context.settings)
    model = to_device(load_start(context), hardware.torch_device)
    context.progress(0, 2, "backbones", "pretrained")
    found = _score_layers(model, images, context, hardware)
    context.progress(1, 2, "backbones", "random, as control")
    random_model = to_device(build_model(context), hardware.torch_device)
    control = _score_layers(random_model, images, context, hardware)
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
        for layer, name in enumerate(layer_names(context.settings.model.depth))
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


def _score_layers(
    model: ViTForImageClassification,
    images: LabelledImages,
    context: StageContext,
    hardware: Hardware,
) -> _LayerScores:
    settings = context.settings
    train, val, test = (
        extract_features(model, subset, side=settings.model.image_size, hardware=hardware)
        for subset in (images.train, images.val, images.test)
    )
    recipe = settings.linear_probe

    def pooled(features: Features) -> Tensor:
        return torch.cat([features.mean, features.cls])

    heads = train_heads(
        pooled(train),
        train.labels,
        len(images.class_names),
        lrs=recipe.lrs,
        weight_decays=recipe.weight_decays,
        epochs=recipe.epochs,
        batch_size=recipe.batch_size,
        seed=settings.seed,
    )
    chosen = heads.choose(pooled(val), val.labels)
    on_test, _ = heads.scores(pooled(test), test.labels)
    scores = [float(on_test[row, best]) for row, best in enumerate(chosen)]
    layers = len(train.mean)
    return _LayerScores(
        mean=scores[:layers],
        cls=scores[layers:],
        knn=[
            knn_accuracy(
                train.mean[layer],
                train.labels,
                test.mean[layer],
                test.labels,
                k=min(settings.feature_analysis.knn_k, len(train.labels)),
            )
            for layer in range(layers)
        ],
    )


if __name__ == "__main__":
    raise SystemExit(runner.main(compute))
