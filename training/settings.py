"""Every setting of a run, with its unit. Building a `Settings` checks it.

Defaults are those of the mission (ImageNet-1k at 160 px); a preset (`training/presets.py`) names
what differs. Those of the trainings are in `training/recipes.py`. Whatever builds settings (the
command line, a YAML file, a deployment, the form in Prefect's UI) goes through the same validation.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, model_validator

from data.specs import is_remote
from training.presets import PRESETS
from training.recipes import (
    FinetuneAllSettings,
    FinetuneSettings,
    FromScratchSettings,
    LinearProbeSettings,
    PretrainSettings,
    RecipeSettings,
)
from training.section import Fraction, PositiveFloat, PositiveInt, Section


class ConfigError(ValueError):
    """A setting, or a combination of settings, that cannot run."""


class ModelSettings(Section):
    """The Vision Transformer (Dosovitskiy et al. 2021)."""

    image_size: PositiveInt = 160
    """Side of the square input, in pixels."""
    patch_size: PositiveInt = 16
    """Side of a patch, in pixels; must divide `image_size`."""
    embed_dim: PositiveInt = 512
    """Width of the tokens; must be a multiple of `num_heads`."""
    depth: PositiveInt = 8
    """Number of blocks."""
    num_heads: PositiveInt = 8
    """Attention heads per block."""
    mlp_ratio: PositiveFloat = 4.0
    """Hidden width of the MLP over `embed_dim`."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout probability after embeddings, attention and MLP."""

    @property
    def operations_per_image(self) -> float:
        """Floating-point operations of one image's forward pass: its products of matrices."""
        patches, width = (self.image_size // self.patch_size) ** 2, self.embed_dim
        tokens = patches + 1
        embedding = patches * 3 * self.patch_size**2 * width
        block = tokens * (4 + 2 * self.mlp_ratio) * width**2 + 2 * tokens**2 * width
        return 2 * (embedding + self.depth * block)  # a product and a sum for each weight

    @model_validator(mode="after")
    def _sizes_divide(self) -> Self:
        if self.image_size % self.patch_size:
            raise ValueError(
                f"model.image_size must be a multiple of model.patch_size, got "
                f"{self.image_size} and {self.patch_size}. Try model.image_size="
                f"{_nearest_multiple(self.image_size, self.patch_size)}."
            )
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"model.embed_dim must be a multiple of model.num_heads, got "
                f"{self.embed_dim} and {self.num_heads}. Try model.embed_dim="
                f"{_nearest_multiple(self.embed_dim, self.num_heads)}."
            )
        return self


class DataSettings(Section):
    """Which images to pretrain on and how they are prepared."""

    source: str = "imagenet-1k"
    """Where images come from: drawn10, imagenette, imagenet-1k, cifar10,
    hub:<owner>/<name>[@revision][:config], folder:<path>, parquet:<glob or address>, or a source
    that a package of yours registers."""
    test_source: str | None = None
    """Source of the test split; by default the source's own, or `test_fraction` of its images."""
    crop_margin: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Extra side to store and to crop from at random, as a fraction of `model.image_size`."""
    val_fraction: Fraction = 0.1
    """Share of the train split held out for choices (stratified by class where labelled)."""
    test_fraction: Fraction = 0.1
    """Share of the images held out as test split where the source has none of its own."""
    split_seed: int = 0
    """Seed of the splits and of the labelled subset; the run's `seed` leaves them alone."""
    format: Literal["raw", "jpeg"] = "raw"
    """How prepared images are stored, those of the transfer too. Raw takes 98 GB for ImageNet-1k at
    160 px and is read at no cost; jpeg (quality 95, tables without a direction) takes about a fifth
    of that, some noise (41 dB) and a processor's time for decoding in every epoch."""
    max_skipped: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Share of unreadable images above which preparation stops with an error."""
    leave_out_test_copies: bool = False
    """Pretrain without the images that are, or nearly are, test images of pretraining or
    transfer. Off by default, as in the work that figures are compared with."""


class TransferSettings(Section):
    """The labelled images that the pretrained backbone is measured on."""

    source: str | None = "imagenette"
    """Where labelled images come from; none takes `data.source`."""
    test_source: str | None = None
    """Source of the test split; none takes the source's own (or `data.test_source`, where
    `transfer.source` is none)."""
    labels: PositiveInt | None = None
    """Labelled training images used, the same ones by every stage; none uses all."""
    finetune_all: bool = False
    """Fine-tune the whole network too (the stage finetune_all), as a third arm."""


class FeatureAnalysisSettings(Section):
    """A probe and nearest neighbours on every layer."""

    knn_ks: tuple[PositiveInt, ...] = Field((1, 5, 20), min_length=1)
    """How many neighbours vote (cosine similarity); each number has a score, the largest one is
    the headline. More than there are labelled images means all of them."""


class EvaluationSettings(Section):
    """How much of what is measured is chance, and how it grows with the labels."""

    seeds: PositiveInt = 1
    """Seeds that everything trained on labels is done with: `seed` and those that follow it. With
    several, mean and standard deviation are reported."""
    pretraining: Literal["shared", "own"] = "shared"
    """Whether all seeds start from the one backbone of `seed`, or each pretrains its own. Shared
    says how much the training on labels varies, own how much the whole method does."""
    label_fractions: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        (0.01, 0.05, 0.1, 0.5, 1.0), min_length=1
    )
    """Shares of the train split's labels that the curves of label efficiency have points at,
    ascending: nested subsets, stratified, with an image of each class at least."""
    trained_curves: bool = False
    """Fine-tune (the last two blocks) and train from scratch at each of these points too, under
    every seed; in batches of all the labels where there are fewer than a batch. Off by default:
    it takes as many trainings."""
    least_steps: PositiveInt = 300
    """Optimiser steps that a training of these curves takes at least, in more epochs where few
    labels make few steps; neither arm would have learned much otherwise."""

    @model_validator(mode="after")
    def _fractions_ascend(self) -> Self:
        fractions = self.label_fractions
        if list(fractions) != sorted(set(fractions)):
            raise ValueError(
                "evaluation.label_fractions must ascend, each a fraction once, got "
                f"{list(fractions)}. Try {sorted(set(fractions))}."
            )
        return self


class CheckpointSettings(Section):
    """When training saves its state, and when it gives up. Cannot change results."""

    every_seconds: PositiveFloat = 300.0
    """Longest time between two checkpoints, in seconds; each epoch ends with one besides."""
    every_steps: PositiveInt | None = None
    """Steps between two checkpoints, in addition to the rule above; none for no such rule."""
    max_skipped_steps: PositiveInt = 10
    """Steps in a row that may be skipped because their loss or gradient is not finite; that many
    end the run, with its last good checkpoint untouched."""


class HardwareSettings(Section):
    """What the run may use. Rules decide once per stage key; a resume decides the same."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where tensors live; auto takes a CUDA device where there is one."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of forward and backward passes; weights and optimiser state stay float32. Auto takes
    bfloat16 where the hardware computes in it."""
    compile: Literal["auto", True, False] = "auto"
    """Compile the network with `torch.compile` for training: a minute or so at the start, fewer
    passes over memory afterwards, and other last bits. Auto does so on a GPU, where the training is
    long enough to pay for it and what compiling needs is here."""
    data_on_device: Literal["auto", True, False] = "auto"
    """Whether training images stay on the GPU once they were sent there, as bytes, so that later
    epochs read nothing from the host. Auto does so where they take little of the GPU's free memory.
    Cannot change results."""
    frozen_tokens: Literal["auto", "always", "never"] = "auto"
    """Compute only once what the blocks that fine-tuning leaves alone make of the labelled images,
    and keep it on disk as bfloat16. For images that are the same in every epoch
    (`finetune.flip=false`, no `finetune.crop_scale`, `data.crop_margin=0`): auto does it there if
    what is kept takes at most 16 GiB and half of the free disk, always does it whatever the
    size."""
    processes: Literal["auto"] | PositiveInt = "auto"
    """Processes that a training, or taking features, is divided among, on one machine: each
    computes an equal part of every batch, on a GPU of its own where there are GPUs. Must divide the
    batches (and their `accumulation_steps`). Auto takes as many as there are GPUs, or fewer that
    divide, and one on a CPU. No part of a key: another number goes on where this one stopped, and
    changes results by their rounding, and the numbers that dropout draws."""
    threads: PositiveInt | None = None
    """CPU threads of the computation (of each process of it), and of decoding. None takes the
    processors that this process may use by its affinity and the quotas of its control groups, and
    for the computation no more than `OMP_NUM_THREADS`, where that is set."""


class TrackingSettings(Section):
    """Where metrics go besides `metrics.jsonl`. Cannot change results."""

    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """Weights & Biases; auto is online where a key is found and disabled elsewhere, offline keeps
    what is to be sent for `wandb sync`."""
    wandb_entity: str | None = None
    """User or team that owns the W&B projects; none takes `WANDB_ENTITY` or the account's own."""
    wandb_secret: str | None = None
    """Prefect Secret block that holds the key for W&B; none takes `WANDB_API_KEY` or `.netrc`."""
    log_every_steps: PositiveInt = 20
    """Steps between two logged losses; each one waits for the device."""


class Settings(Section):
    """Everything that a run depends on."""

    preset: Annotated[str, Field(json_schema_extra={"enum": list(PRESETS)})] = "drawn"
    """Which named set of values the ones given here are laid over."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of weights, order, augmentation and dropout."""
    data: DataSettings = DataSettings()
    model: ModelSettings = ModelSettings()
    pretrain: PretrainSettings = PretrainSettings()
    transfer: TransferSettings = TransferSettings()
    linear_probe: LinearProbeSettings = LinearProbeSettings()
    finetune: FinetuneSettings = FinetuneSettings()
    finetune_all: FinetuneAllSettings = FinetuneAllSettings()
    from_scratch: FromScratchSettings = FromScratchSettings()
    feature_analysis: FeatureAnalysisSettings = FeatureAnalysisSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    hardware: HardwareSettings = HardwareSettings()
    tracking: TrackingSettings = TrackingSettings()

    @model_validator(mode="before")
    @classmethod
    def _lay_over_preset(cls, given: Any) -> Any:
        """Fill in the preset's values where none are given."""
        if not isinstance(given, Mapping):
            return given
        name = given.get("preset", "drawn")
        if not isinstance(name, str) or name not in PRESETS:
            raise ValueError(
                f"preset must be one of {', '.join(PRESETS)}, got {name!r}."
                + nearest(str(name), PRESETS)
            )
        return merge(PRESETS[name].values, given)

    @model_validator(mode="after")
    def _pretraining_size_fits(self) -> Self:
        size, model = self.pretrain.image_size, self.model
        if size is not None and (size > model.image_size or size % model.patch_size):
            raise ValueError(
                f"pretrain.image_size must be a multiple of model.patch_size ({model.patch_size}) "
                f"and at most model.image_size ({model.image_size}), got {size}."
            )
        return self

    @model_validator(mode="after")
    def _frozen_tokens_are_of_use(self) -> Self:
        if self.hardware.frozen_tokens == "always" and not self.uses_frozen_tokens:
            raise ValueError(
                "hardware.frozen_tokens=always needs images that are the same in every epoch, got "
                f"finetune.flip={str(self.finetune.flip).lower()}, "
                f"finetune.crop_scale={self.finetune.crop_scale or 'none'} and "
                f"data.crop_margin={self.data.crop_margin:g}. Set finetune.flip=false, "
                "finetune.crop_scale=none and data.crop_margin=0, or hardware.frozen_tokens=auto."
            )
        return self

    @model_validator(mode="after")
    def _processes_divide_batches(self) -> Self:
        count = self.hardware.processes
        if count == "auto":
            return self
        sections = ["pretrain", "finetune", "from_scratch"]
        sections += ["finetune_all"] if self.transfer.finetune_all else []
        for section in sections:
            recipe: RecipeSettings = getattr(self, section)
            if recipe.batch_size % (count * recipe.accumulation_steps):
                raise ValueError(
                    f"hardware.processes must divide {section}.batch_size"
                    + (
                        f" / {section}.accumulation_steps ({recipe.batch_size} / "
                        f"{recipe.accumulation_steps})"
                        if recipe.accumulation_steps > 1
                        else f" ({recipe.batch_size})"
                    )
                    + f", or the parts of a step would differ; got {count}. Try "
                    f"hardware.processes={recipe.most_processes(count)}."
                )
        return self

    @property
    def pretrain_size(self) -> int:
        """Side in pixels at which pretraining shows images."""
        return self.pretrain.image_size or self.model.image_size

    @property
    def uses_frozen_tokens(self) -> bool:
        """Whether fine-tuning reads what frozen blocks made of the images, unless too large."""
        recipe = self.finetune
        augments = recipe.flip or recipe.crop_scale or self.prepared_size > self.model.image_size
        return self.hardware.frozen_tokens != "never" and not augments

    @model_validator(mode="after")
    def _seeds_are_seeds(self) -> Self:
        if self.seed + self.evaluation.seeds > 2**31:
            raise ValueError(
                f"seed + evaluation.seeds must be at most {2**31}, got {self.seed} and "
                f"{self.evaluation.seeds}. Lower one of them."
            )
        return self

    @property
    def prepared_size(self) -> int:
        """Side in pixels at which images are stored."""
        return round(self.model.image_size * (1 + self.data.crop_margin))

    @property
    def transfer_is_pretrain_data(self) -> bool:
        """Whether pretraining and transfer read the same prepared images."""
        return self.transfer_source == (self.data.source, self.data.test_source)

    def remote_sources(self, data: Literal["pretrain", "transfer"]) -> list[str]:
        """Return those of the sources of these images that must be downloaded first."""
        own = (self.data.source, self.data.test_source)
        specs = own if data == "pretrain" else self.transfer_source
        found = [spec for spec in specs if spec is not None and is_remote(spec)]
        return list(dict.fromkeys(found))

    @property
    def transfer_source(self) -> tuple[str, str | None]:
        """Source and test source of the labelled images."""
        if self.transfer.source is None:
            return self.data.source, self.transfer.test_source or self.data.test_source
        return self.transfer.source, self.transfer.test_source


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return `below` with the values of `above` laid over it, section by section."""
    merged = dict(below)
    for name, value in above.items():
        if isinstance(value, BaseModel):
            value = value.model_dump()
        old = merged.get(name)
        merged[name] = (
            merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
        )
    return merged


def nearest(name: str, names: Iterable[str]) -> str:
    """Return a hint at the known name that is most like a misspelt one, or nothing."""
    names = list(names)
    last = name.rpartition(".")[2]
    # A right name in the wrong section is nearer than a similar one.
    close = [known for known in names if known.rpartition(".")[2] == last]
    close = close or difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def _nearest_multiple(value: int, of: int) -> int:
    return max(1, (value + of // 2) // of) * of
