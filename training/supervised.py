"""Training a classifier on labelled images: fine-tuning and the from-scratch baseline."""

from typing import Literal

from torch import Tensor
from torch.nn import functional
from transformers import ViTForImageClassification

from data.loaders import Batch, Batches, eval_batches
from data.splits import Subset
from models.drop_path import drop_paths
from models.export import save_model
from models.vit import to_device
from training import loop
from training.evaluation import Score, evaluate
from training.images import LabelledImages
from training.runner import StageContext, StageOutcome
from training.settings import FinetuneAllSettings, FinetuneSettings, FromScratchSettings


def train_classifier(
    context: StageContext,
    model: ViTForImageClassification,
    images: LabelledImages,
    section: Literal["finetune", "finetune_all", "from_scratch"],
) -> StageOutcome:
    """Train what is trainable in `model`, keep the best epoch on val, score it on test once.

    Args:
        context: Of the stage; its directory receives checkpoints, metrics and `model/`.
        model: On the CPU; parameters that require a gradient are trained.
        images: Labelled images.
        section: Name of the recipe among the settings: epochs, batch size, rates, patience.
    """
    settings, hardware = context.settings, context.hardware()
    recipe: FinetuneSettings | FinetuneAllSettings | FromScratchSettings
    recipe = getattr(settings, section)
    device, side = hardware.torch_device, settings.model.image_size
    drop_paths(to_device(model, device), recipe.drop_path)
    batches = Batches(
        images.train,
        batch_size=recipe.batch_size,
        side=side,
        flip=recipe.flip,
        seed=settings.seed,
        device=device,
    )

    forward = hardware.for_training(model)

    def compute_loss(batch: Batch) -> Tensor:
        assert batch.labels is not None  # the labelled images of a transfer source
        with hardware.autocast():
            logits = forward(batch.images).logits
        return functional.cross_entropy(logits.float(), batch.labels)

    def score(subset: Subset) -> Score:
        return evaluate(
            model,
            eval_batches(subset, batch_size=recipe.batch_size, side=side, device=device),
            hardware=hardware,
            stop=context.stop,
        )

    def evaluate_on_val() -> dict[str, float]:
        found = score(images.val)
        return {"val/loss": found.loss, "val/top1": found.accuracy}

    state = loop.train(
        context,
        loop.Task(
            model=model,
            recipe=recipe,
            section=section,
            steps_per_epoch=batches.steps_per_epoch,
            samples_per_step=recipe.batch_size,
            batches=batches.epoch,
            compute_loss=compute_loss,
            evaluate=evaluate_on_val,
            score="val/top1",
            patience=recipe.patience,
            layer_decay=None if isinstance(recipe, FromScratchSettings) else recipe.layer_decay,
        ),
        seed=settings.seed,
    )
    test = score(images.test)
    save_model(
        model, context.directory / "model", image_size=side, prepared_size=settings.prepared_size
    )
    return StageOutcome(
        scores={
            "top1": test.accuracy,
            "correct": test.correct,
            "total": test.total,
            "val_top1": state.best_score,
            "best_epoch": state.best_epoch,
            "epochs": state.evaluated_epochs,
            "steps": state.step,
            "skipped_steps": state.skipped_steps,
            "labels": len(images.train),
        },
        timing={"samples_per_second": state.step * recipe.batch_size / state.train_seconds},
        made=["model"],
        wall_seconds_before=state.wall_seconds_before,
        resumed_from=state.resumed_from,
    )
