"""Linear probe: a linear head on the frozen backbone's class token.

The backbone is read once, so nothing can change it; the heads are trained on what it said. The
same is done with the untrained network as control: a random ViT is already a fair descriptor.
"""

from dataclasses import dataclass

from transformers import ViTForImageClassification

from models.export import save_model
from models.vit import replace_head, set_head, to_device
from training import runner
from training.features import extract_features
from training.hardware import Hardware
from training.images import LabelledImages, open_labelled
from training.network import build_model, load_start
from training.probes import Heads, train_heads
from training.runner import StageContext, StageOutcome


@dataclass(frozen=True)
class _Probe:
    """The head that val chose, scored on test once."""

    heads: Heads
    chosen: int
    val_top1: float
    correct: int
    total: int


def compute(context: StageContext) -> StageOutcome:
    """Probe the pretrained backbone and the random one; write the backbone with its head."""
    settings, hardware = context.settings, context.hardware()
    side = settings.model.image_size
    images = open_labelled(context.input("data"), settings)

    model = to_device(load_start(context), hardware.torch_device)
    context.progress(0, 2, "backbones", "pretrained")
    probe = _probe(model, images, context, hardware)
    context.progress(1, 2, "backbones", "random, as control")
    random_model = to_device(build_model(context), hardware.torch_device)
    control = _probe(random_model, images, context, hardware)
    context.progress(2, 2, "backbones")

    replace_head(model, images.class_names)
    set_head(model, *probe.heads.folded(0, probe.chosen))
    save_model(
        model, context.directory / "model", image_size=side, prepared_size=settings.prepared_size
    )
    lr, weight_decay = probe.heads.grid[probe.chosen]
    return StageOutcome(
        scores={
            "top1": probe.correct / probe.total,
            "correct": probe.correct,
            "total": probe.total,
            "val_top1": probe.val_top1,
            "lr": lr,
            "weight_decay": weight_decay,
            "random_backbone_top1": control.correct / control.total,
            "random_backbone_correct": control.correct,
            "labels": len(images.train),
        },
        made=["model"],
    )


def _probe(
    model: ViTForImageClassification,
    images: LabelledImages,
    context: StageContext,
    hardware: Hardware,
) -> _Probe:
    recipe, side = context.settings.linear_probe, context.settings.model.image_size
    train, val, test = (
        extract_features(model, subset, side=side, hardware=hardware)
        for subset in (images.train, images.val, images.test)
    )
    heads = train_heads(
        train.final_cls[None],
        train.labels,
        len(images.class_names),
        lrs=recipe.lrs,
        weight_decays=recipe.weight_decays,
        epochs=recipe.epochs,
        batch_size=recipe.batch_size,
        seed=context.settings.seed,
    )
    chosen = heads.choose(val.final_cls[None], val.labels)[0]
    on_val, _ = heads.scores(val.final_cls[None], val.labels)
    on_test, _ = heads.scores(test.final_cls[None], test.labels)
    return _Probe(
        heads=heads,
        chosen=chosen,
        val_top1=float(on_val[0, chosen]),
        correct=round(float(on_test[0, chosen]) * len(test.labels)),
        total=len(test.labels),
    )


if __name__ == "__main__":
    raise SystemExit(runner.main(compute))
