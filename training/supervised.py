"""Training a classifier on labelled images: fine-tuning and the from-scratch baseline."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional
from transformers import ViTForImageClassification

from data.loaders import Batch, Batches, TokenBatches, eval_batches, token_eval_batches
from data.tokens import Tokens
from models.boundary import LastBlocks
from models.drop_path import drop_paths
from models.export import save_model
from training import loop
from training.evaluation import evaluate
from training.hardware import keeps_images
from training.images import LabelledImages
from training.recipes import FinetuneAllSettings, FinetuneSettings, FromScratchSettings
from training.runner import StageContext, StageOutcome


@dataclass(frozen=True)
class FrozenTokens:
    """What frozen blocks made of the images to train and to choose on.

    Attributes:
        blocks: How many blocks, counted from the head, there are above them.
        train: Of the labelled images.
        val: Of the validation images.
    """

    blocks: int
    train: Tokens
    val: Tokens


def train_classifier(
    context: StageContext,
    model: ViTForImageClassification,
    images: LabelledImages,
    section: Literal["finetune", "finetune_all", "from_scratch"],
    tokens: FrozenTokens | None = None,
) -> StageOutcome:
    """Train what is trainable in `model`, keep the best epoch on val, score it on test once.

    Where there are tokens, steps and choices are made from them, in the same order and with the
    same labels; they differ from a pass through the whole network by their rounding to bfloat16.
    The test score is always that of the whole network on images: of the model that is saved.

    Args:
        context: Of the stage; its directory receives checkpoints, metrics and `model/`.
        model: On the CPU; parameters that require a gradient are trained.
        images: Labelled images.
        section: Name of the recipe among the settings: epochs, batch size, rates, patience.
        tokens: Of the same images; nothing below them may be trained.
    """
    settings = context.settings
    recipe: FinetuneSettings | FinetuneAllSettings | FromScratchSettings
    recipe = getattr(settings, section)
    parameters = [(p.numel(), p.requires_grad) for p in model.parameters()]
    trained = sum(size for size, is_trained in parameters if is_trained)
    share = trained / sum(size for size, _ in parameters)
    passes = (share if tokens else 1) + share * (loop.PASSES_PER_STEP - 1)
    hardware = context.hardware(passes=recipe.epochs * len(images.train) * passes)
    device, side = hardware.torch_device, settings.model.image_size
    drop_paths(hardware.place(model), recipe.drop_path)
    team = context.team
    network: nn.Module
    batches: Batches | TokenBatches
    val_batches: Callable[[], Iterable[Batch]]
    if tokens:
        network = LastBlocks(model, tokens.blocks)
        batches = TokenBatches(
            tokens.train,
            batch_size=recipe.batch_size,
            seed=settings.seed,
            device=device,
            share=team.share,
        )
        val_batches = partial(token_eval_batches, tokens.val, recipe.batch_size, device, team.share)
    else:
        network = model
        batches = Batches(
            images.train,
            batch_size=recipe.batch_size,
            side=side,
            flip=recipe.flip,
            seed=settings.seed,
            device=device,
            crop_scale=recipe.crop_scale,
            keep_on_device=keeps_images(settings.hardware, device, images=images.train),
            share=team.share,
        )
        val_batches = partial(eval_batches, images.val, recipe.batch_size, side, device, team.share)
    forward = context.for_training(network)

    def compute_loss(batch: Batch) -> Tensor:
        assert batch.labels is not None  # the labelled images of a transfer source
        with hardware.autocast():
            logits = forward(batch.images).logits
        return functional.cross_entropy(logits.float(), batch.labels)

    def evaluate_on_val() -> dict[str, float]:
        found = evaluate(network, val_batches(), hardware=hardware, stop=context.stop, team=team)
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
    test = evaluate(
        model,
        eval_batches(images.test, recipe.batch_size, side, device, team.share),
        hardware=hardware,
        stop=context.stop,
        team=team,
    )
    if team.is_first:
        save_model(
            model,
            context.directory / "model",
            image_size=side,
            prepared_size=settings.prepared_size,
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
