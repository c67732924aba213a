"""Rotation pretraining as it is done elsewhere: a plain PyTorch loop, and transformers' Trainer.

Both read image files and decode, crop, mirror, turn and normalise them one by one, in each epoch
anew. Network, loss, rates, batch size and the images of a step are those of our own pretraining.

Dimension key: B = images in the batch, S = image side, in pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from transformers import ViTForImageClassification
from turns import Turns

from data.processors import available_processors
from data.rotation import NUM_ROTATIONS, ROTATION_NAMES
from data.transforms import MEAN, STD
from models.vit import build_vit, to_device
from training import hardware, optim
from training.settings import HardwareSettings, Settings

PLAIN_WORKERS = 2
"""Loader processes of the plain loop; two are what examples and the first version of this project
have."""


@dataclass(frozen=True)
class Job:
    """What is to be trained, on what.

    Attributes:
        settings: Of our own pretraining.
        files: The images; enough for an epoch of as many steps as are measured.
        scratch: A folder to write in.
    """

    settings: Settings
    files: Sequence[Path]
    scratch: Path

    @property
    def learning_rate(self) -> float:
        """The peak rate."""
        recipe = self.settings.pretrain
        return optim.scaled_lr(recipe.base_lr, recipe.samples_per_step)

    def network(self) -> ViTForImageClassification:
        """Return the network on the CPU."""
        return build_vit(
            **self.settings.model.model_dump(),
            num_labels=NUM_ROTATIONS,
            label_names=ROTATION_NAMES,
            seed=self.settings.seed,
        )


class TurnedPhotos(Dataset[dict[str, Tensor]]):
    """Image files, each in all four turns.

    Torchvision's usual transforms, a picture at a time. That pixels are turned after they were
    normalised, once for all turns, is quicker than what is usual.
    """

    def __init__(self, files: Sequence[Path], side: int) -> None:
        """Read nothing yet; `side` is S."""
        self._files = files
        self._prepare = transforms.Compose(
            [
                transforms.Resize(side),
                transforms.CenterCrop(side),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        with Image.open(self._files[index]) as picture:
            image: Tensor = self._prepare(picture.convert("RGB"))
        turned = [torch.rot90(image, turns, dims=(-2, -1)) for turns in range(NUM_ROTATIONS)]
        return {"pixel_values": torch.stack(turned), "labels": torch.arange(NUM_ROTATIONS)}


def join(examples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return a batch: `pixel_values` `(4*B, 3, S, S)` and `labels` `(4*B,)`, as ViT takes them."""
    return {name: torch.cat([example[name] for example in examples]) for name in examples[0]}


def train_plainly(job: Job, turns: Turns) -> None:
    """Train in float32, eagerly, with a loop of the usual kind."""
    turns.begin()
    device = _prepare_torch()
    recipe = job.settings.pretrain
    model = to_device(job.network(), torch.device(device)).train()
    loader = DataLoader(
        TurnedPhotos(job.files, job.settings.model.image_size),
        batch_size=recipe.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=PLAIN_WORKERS,
        collate_fn=join,
        pin_memory=device == "cuda",
    )
    optimizer = AdamW(
        model.parameters(), job.learning_rate, betas=(0.9, 0.95), weight_decay=recipe.weight_decay
    )
    schedule = CosineAnnealingLR(optimizer, T_max=len(loader))
    for batch in loader:
        images, labels = batch["pixel_values"].to(device), batch["labels"].to(device)
        loss = functional.cross_entropy(model(images).logits, labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if recipe.clip_norm is not None:
            clip_grad_norm_(model.parameters(), recipe.clip_norm)
        optimizer.step()
        schedule.step()
        turns.step_ended()


def train_with_defaults(job: Job, turns: Turns) -> None:
    """Train with transformers' Trainer as it is when nothing is asked of it."""
    _train_with_trainer(job, turns, {})


def train_at_its_best(job: Job, turns: Turns) -> None:
    """Train with the settings of transformers' Trainer that make it fastest."""
    _train_with_trainer(job, turns, best_of_trainer(job.settings))


def best_of_trainer(settings: Settings) -> dict[str, Any]:
    """Return the arguments that make transformers' Trainer fastest on this machine.

    bfloat16 where the hardware computes in it, by the rule that our own training follows.
    """
    found = hardware.decide(HardwareSettings())
    return {
        "bf16": found.precision == "bfloat16",
        "torch_compile": True,
        "optim": "adamw_torch_fused",
        "dataloader_num_workers": available_processors(),
        "dataloader_persistent_workers": True,
    }


def _train_with_trainer(job: Job, turns: Turns, arguments: dict[str, Any]) -> None:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Turnstile(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.step_ended()

    turns.begin()
    recipe = job.settings.pretrain
    trainer = Trainer(
        model=job.network(),
        args=TrainingArguments(
            output_dir=str(job.scratch),
            use_cpu=_prepare_torch() == "cpu",
            num_train_epochs=1,
            per_device_train_batch_size=recipe.batch_size,
            dataloader_drop_last=True,
            learning_rate=job.learning_rate,
            lr_scheduler_type="cosine",
            adam_beta1=0.9,
            adam_beta2=0.95,
            weight_decay=recipe.weight_decay,
            max_grad_norm=recipe.clip_norm or 0.0,
            # Nothing but training: no bar, no service that it reports to, no checkpoint.
            disable_tqdm=True,
            report_to="none",
            save_strategy="no",
            remove_unused_columns=False,
            **arguments,
        ),
        train_dataset=TurnedPhotos(job.files, job.settings.model.image_size),
        data_collator=join,
        callbacks=[Turnstile()],
    )
    trainer.train()


def _prepare_torch() -> str:
    """Give torch as many threads as our own training has; return the device's name."""
    torch.set_num_threads(available_processors())
    return "cuda" if torch.cuda.is_available() else "cpu"
