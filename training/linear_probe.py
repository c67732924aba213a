"""Linear probe: a linear head on the frozen backbone's class token.

The heads are trained on features that were taken once, so nothing can change the backbone. The
same is done with the untrained network as control: a random ViT is already a fair descriptor, and
with other ways to read both, so that the headline can be compared with what others report.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from models.export import save_model
from models.vit import replace_head, set_head
from training import runner
from training.features import Backbone, Features, SplitFeatures, open_features
from training.images import open_labelled
from training.network import load_start
from training.probes import train_heads
from training.readings import class_token, readings
from training.runner import StageContext, StageOutcome
from training.settings import Settings


@dataclass(frozen=True)
class Probe:
    """The head that val chose, scored on test once.

    Attributes:
        weight: `(C, width)` and
        bias: `(C,)`: the head as a linear map of features that are not normalised.
        lr: Its learning rate.
        weight_decay: Its weight decay.
        val_top1: Its share of right answers on val.
        correct: Its right answers on test.
        total: Images of test.
    """

    weight: Tensor
    bias: Tensor
    lr: float
    weight_decay: float
    val_top1: float
    correct: int
    total: int


def compute(context: StageContext) -> StageOutcome:
    """Probe the pretrained backbone and the random one; write the backbone with its head."""
    settings, device = context.settings, context.hardware().torch_device
    images = open_labelled(context.input("data"), settings)
    read_as, classes = readings(settings.model.depth), len(images.class_names)
    total = 2 * len(read_as)

    def probe(backbone: Backbone, done: int) -> list[Probe]:
        opened = open_features(context.input("features"), backbone, images)
        features, found = opened.where_heads_train(device), []
        for number, reading in enumerate(read_as, start=done):
            context.progress(number, total, "probes", f"{backbone} backbone, {reading.name}")
            found.append(train_probe(features, settings, num_classes=classes, read=reading.read))
        return found

    probes, controls = probe("pretrained", 0), probe("random", len(read_as))
    context.progress(total, total, "probes")

    chosen, control = probes[0], controls[0]
    model = load_start(context)
    replace_head(model, images.class_names)
    set_head(model, chosen.weight, chosen.bias)
    save_model(
        model,
        context.directory / "model",
        image_size=settings.model.image_size,
        prepared_size=settings.prepared_size,
    )
    return StageOutcome(
        scores={
            "top1": chosen.correct / chosen.total,
            "correct": chosen.correct,
            "total": chosen.total,
            "val_top1": chosen.val_top1,
            "lr": chosen.lr,
            "weight_decay": chosen.weight_decay,
            "random_backbone_top1": control.correct / control.total,
            "random_backbone_correct": control.correct,
            "labels": len(images.train),
            "readings": [
                {
                    "name": reading.name,
                    "exported": found is chosen,
                    "width": found.weight.shape[1],
                    "top1": found.correct / found.total,
                    "correct": found.correct,
                    "val_top1": found.val_top1,
                    "random_top1": beside.correct / beside.total,
                    "lr": found.lr,
                    "weight_decay": found.weight_decay,
                }
                for reading, found, beside in zip(read_as, probes, controls, strict=True)
            ],
        },
        made=["model"],
    )


def train_probe(
    features: SplitFeatures,
    settings: Settings,
    *,
    num_classes: int,
    read: Callable[[Features], Tensor] = class_token,
) -> Probe:
    """Train heads of all learning rates and weight decays; val chooses one, test scores it.

    Args:
        features: Of train, val and test, on one device.
        settings: Of the run: the probe's recipe and the seed.
        num_classes: C.
        read: What of the features the heads see, `(1, N, width)`.
    """
    recipe = settings.linear_probe
    train, val, test = features.train, features.val, features.test
    heads = train_heads(
        read(train),
        train.labels,
        num_classes,
        lrs=recipe.lrs,
        weight_decays=recipe.weight_decays,
        epochs=recipe.epochs,
        batch_size=recipe.batch_size,
        seed=settings.seed,
    )
    (place,) = heads.choose(read(val), val.labels)
    on_val, on_test = (
        heads.scores(read(part), part.labels, [place])[0].item() for part in (val, test)
    )
    weight, bias = heads.folded(0, place)
    lr, weight_decay = heads.grid[place]
    return Probe(
        weight=weight,
        bias=bias,
        lr=lr,
        weight_decay=weight_decay,
        val_top1=on_val,
        correct=round(on_test * len(test.labels)),
        total=len(test.labels),
    )


if __name__ == "__main__":
    raise SystemExit(runner.main(compute))
