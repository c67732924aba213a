"""Rotation pretraining: train a backbone to tell which way up an image is.

Every image is shown turned by 0, 90, 180 and 270 degrees in the same step, and the network says
which turn it sees (Gidaris et al., ICLR 2018, https://arxiv.org/abs/1803.07728).
"""

from dataclasses import replace

import numpy as np
from torch import Tensor, nn
from torch.nn import functional

from data.loaders import Batch, Batches, eval_batches
from data.randomness import derive_seed, uniform
from data.reading import send
from data.rotation import (
    NUM_ROTATIONS,
    ROTATION_NAMES,
    make_rotation_batch,
    rotate_each,
    turn_patches,
)
from data.splits import Subset
from models.drop_path import drop_paths
from models.export import save_model
from models.pretraining_heads import PretrainingNetwork
from training import loop, runner
from training.evaluation import Score, evaluate
from training.hardware import keeps_images
from training.images import as_pretrained_on, open_pretraining
from training.network import build_model
from training.runner import StageContext, StageOutcome
from training.settings import Settings


def compute(context: StageContext) -> StageOutcome:
    """Pretrain on the prepared images, from the newest checkpoint where there is one."""
    settings, recipe = context.settings, context.settings.pretrain
    side, shown = settings.model.image_size, settings.pretrain_size
    other = "transfer_data" in context.request.inputs
    splits, left_out = open_pretraining(
        context.input("data"),
        settings,
        context.input("transfer_data") if other else None,
        stop=context.is_stopped,
    )
    hardware = context.hardware(passes=passes_of_training(settings, len(splits.train)))
    device = hardware.torch_device
    model = hardware.place(build_model(context, ROTATION_NAMES, image_size=shown))
    drop_paths(model, recipe.drop_path)
    batches = Batches(
        splits.train,
        batch_size=recipe.batch_size,
        side=side,
        flip=recipe.flip,
        seed=settings.seed,
        device=device,
        crop_scale=recipe.crop_scale,
        colour_jitter=recipe.colour_jitter,
        greyscale=recipe.greyscale,
        keep_on_device=keeps_images(settings.hardware, device, images=splits.train),
        share=context.team.share,
    )

    network: nn.Module = model
    if recipe.pool == "mean" or recipe.patch_rotation:
        network = PretrainingNetwork(
            model,
            mean=recipe.pool == "mean",
            patches=recipe.patch_rotation > 0,
            seed=derive_seed(settings.seed, "heads"),
        )
    forward = context.for_training(network)

    def compute_loss(batch: Batch) -> Tensor:
        seen = as_pretrained_on(batch.images, settings)
        if recipe.rotations == "all":
            images, turns = make_rotation_batch(seen)
        else:
            drawn = uniform(settings.seed, batch.epoch, batch.ids, "rotation")
            turns = send((drawn * NUM_ROTATIONS).astype("int64"), device)
            images = rotate_each(seen, turns)
        with hardware.autocast():
            answers = forward(images)
        loss = functional.cross_entropy(answers.logits.float(), turns)
        if recipe.pool == "mean":
            loss = loss + functional.cross_entropy(answers.mean_logits.float(), turns)
        if recipe.patch_rotation:
            loss = loss + recipe.patch_rotation * patch_loss(batch)
        return loss

    def patch_loss(batch: Batch) -> Tensor:
        """Each image once more, with every patch turned by itself."""
        patch, count = settings.model.patch_size, shown // settings.model.patch_size
        patches = batch.ids[:, None] * count**2 + np.arange(count**2)
        drawn = uniform(settings.seed, batch.epoch, patches, "patch rotation")
        turns = send((drawn * NUM_ROTATIONS).astype("int64"), device)
        images = turn_patches(
            batch.images,
            turns.view(-1, count, count),
            patch_size=patch,
            gap=2 * max(1, round(recipe.patch_gap * patch / 2)),
        )
        with hardware.autocast():
            answers = forward(images, patches=True)
        return functional.cross_entropy(answers.logits.float().flatten(0, 1), turns.flatten())

    def score(subset: Subset) -> Score:
        batches = eval_batches(
            subset,
            batch_size=recipe.batch_size,
            side=side,
            device=device,
            share=context.team.share,
        )
        return evaluate(
            model,
            (replace(each, images=as_pretrained_on(each.images, settings)) for each in batches),
            hardware=hardware,
            stop=context.stop,
            rotations=True,
            team=context.team,
        )

    def evaluate_on_val() -> dict[str, float]:
        found = score(splits.val)
        return {"val/loss": found.loss, "val/rotation_accuracy": found.accuracy}

    state = loop.train(
        context,
        loop.Task(
            model=model,
            recipe=recipe,
            section="pretrain",
            steps_per_epoch=batches.steps_per_epoch,
            samples_per_step=recipe.samples_per_step,
            batches=batches.epoch,
            compute_loss=compute_loss,
            evaluate=evaluate_on_val,
            ema=recipe.ema,
            network=network,
        ),
        seed=settings.seed,
    )
    test = score(splits.test)
    if context.team.is_first:
        save_model(
            model,
            context.directory / "model",
            image_size=shown,
            prepared_size=round(settings.prepared_size * shown / side),
        )
    return StageOutcome(
        scores={
            "rotation_accuracy": test.accuracy,
            "correct": test.correct,
            "total": test.total,
            "val_rotation_accuracy": state.val_scores["val/rotation_accuracy"],
            "epochs": recipe.epochs,
            "steps": state.step,
            "skipped_steps": state.skipped_steps,
            "images": len(splits.train),
            **({"left_out": left_out} if settings.data.leave_out_test_copies else {}),
        },
        timing={"samples_per_second": state.step * recipe.samples_per_step / state.train_seconds},
        made=["model"],
        wall_seconds_before=state.wall_seconds_before,
        resumed_from=state.resumed_from,
    )


def passes_of_training(settings: Settings, images: int) -> float:
    """Return what pretraining is worth in forward passes of one image at `model.image_size`.

    Args:
        settings: Of the run.
        images: That it trains on.
    """
    recipe, sizes = settings.pretrain, settings.model
    shown = sizes.model_copy(update={"image_size": settings.pretrain_size})
    share = shown.operations_per_image / sizes.operations_per_image
    each = recipe.samples_per_step / recipe.batch_size + (recipe.patch_rotation > 0)
    return recipe.epochs * images * each * share * loop.PASSES_PER_STEP


if __name__ == "__main__":
    raise SystemExit(runner.main(compute))
