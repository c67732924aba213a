"""The recipes: settings of every training, from pretraining to the heads of the linear probe."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from training.section import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, Section

LayerDecay = Annotated[float, Field(gt=0, le=1)]


class RecipeSettings(Section):
    """What all training stages have in common."""

    epochs: PositiveInt
    """Passes over the training images."""
    batch_size: PositiveInt
    """Source images per optimiser step."""
    base_lr: PositiveFloat
    """Peak learning rate for 256 samples per step; the one used is scaled linearly with the
    samples per step (Goyal et al. 2017)."""
    weight_decay: NonNegativeFloat = 0.05
    """Decoupled decay (AdamW); biases, norms, position and class token are exempt."""
    warmup_epochs: NonNegativeFloat
    """Epochs of linear warm-up, counted within `epochs`; cosine decay follows."""
    clip_norm: PositiveFloat | None = 1.0
    """Largest norm of the whole gradient; none switches clipping off."""
    flip: bool = True
    """Mirror images left-right at random, before any rotation."""
    crop_scale: Annotated[float, Field(gt=0, le=1)] | None = None
    """Smallest part of the prepared image's area that is shown: squares of random area, up to the
    whole, at random places, are resized to the input size on the device. Common for photos: 0.08 to
    0.35. None shows crops of the input size, unresized."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Stochastic depth: probability with which the branches of the last block are left out for a
    sample; linearly less below (Huang et al. 2016, as in DeiT). Off by default."""
    accumulation_steps: PositiveInt = 1
    """Parts that each step's batch is computed in, one after the other, before one update: the
    same samples per step in less memory. Must divide `batch_size`."""

    def most_processes(self, limit: int) -> int:
        """Return the largest number of processes, up to a limit, that can divide each step."""
        images = self.batch_size // self.accumulation_steps
        return next(count for count in range(limit, 0, -1) if images % count == 0)

    @model_validator(mode="after")
    def _parts_are_equal(self) -> Self:
        if self.batch_size % self.accumulation_steps:
            raise ValueError(
                f"accumulation_steps must divide batch_size, or the parts of a step would differ; "
                f"got {self.accumulation_steps} and {self.batch_size}."
            )
        return self

    @model_validator(mode="after")
    def _warmup_ends(self) -> Self:
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs must be smaller than epochs, or the learning rate never reaches "
                f"its peak; got {self.warmup_epochs:g} and {self.epochs}. "
                "For a short run set warmup_epochs=0."
            )
        return self


class PretrainSettings(RecipeSettings):
    """Rotation prediction (Gidaris et al. 2018)."""

    epochs: PositiveInt = 5
    batch_size: PositiveInt = 256
    base_lr: PositiveFloat = 1.5e-4
    warmup_epochs: NonNegativeFloat = 1
    rotations: Literal["all", "random"] = "all"
    """All four turns of each image in the same step, or one at random per image."""
    image_size: PositiveInt | None = None
    """Side at which images are shown, in pixels, where it is to be smaller than `model.image_size`
    (and cheaper); the stages after it interpolate the position embeddings (Touvron et al. 2019).
    None for the same size."""
    pool: Literal["cls", "mean"] = "cls"
    """What the backbone learns from: a head on the class token, or one on the mean of the patch
    tokens. The exported head reads the class token either way (with mean it learns beside the other
    one and passes nothing on), and the rotation accuracy is that head's."""
    colour_jitter: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Change brightness, contrast and saturation of each image by factors up to this far from 1
    (Howard 2013), the same in all its turns."""
    greyscale: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Probability with which an image loses its colours, in all its turns (as in SimCLR, Chen et
    al. 2020)."""
    patch_rotation: NonNegativeFloat = 0.0
    """Weight of a second loss, over that of the first: each patch of an image is turned by itself,
    and its token says how (PatchRot, Chhabra et al. 2022, where both weigh the same). These images
    are not counted as samples. 0 is off."""
    patch_gap: PositiveFloat = 0.25
    """With `patch_rotation`: width that is dropped between two patches, over that of a patch, so
    that edges do not go on from one to the next (1 in PatchRot); at least 2 pixels."""
    ema: Fraction | None = None
    """Share that an exponential average of the weights keeps in every step, such as 0.999; the
    averaged weights are evaluated and exported (Polyak and Juditsky 1992). None for no average."""

    @property
    def samples_per_step(self) -> int:
        """Rotated images per optimiser step."""
        return self.batch_size * (4 if self.rotations == "all" else 1)


class LinearProbeSettings(Section):
    """A linear head on the frozen backbone's class token."""

    epochs: PositiveInt = 100
    """Passes over the frozen features."""
    batch_size: PositiveInt = 256
    """Features per step."""
    lrs: tuple[PositiveFloat, ...] = Field((0.01, 0.03, 0.1, 0.3, 1.0), min_length=1)
    """Learning rates that are tried; val chooses."""
    weight_decays: tuple[NonNegativeFloat, ...] = Field((0.0, 1e-4, 1e-3, 1e-2), min_length=1)
    """Weight decays that are tried; val chooses."""


class LabelledSettings(RecipeSettings):
    """What trainings on labels have in common."""

    epochs: PositiveInt = 30
    batch_size: PositiveInt = 64
    warmup_epochs: NonNegativeFloat = 3
    patience: PositiveInt | None = None
    """Epochs without a better val score after which training stops; none trains them all. The
    best epoch's weights are kept either way."""


class FinetuneSettings(LabelledSettings):
    """Head and last blocks, trained from the probed backbone."""

    base_lr: PositiveFloat = 1e-3
    start_from: Literal["probe", "previous"] = "probe"
    """Where finetune_2 starts: from the probed backbone, as finetune_1 does, or from
    finetune_1's result (as the project that this one redoes did)."""
    layer_decay: LayerDecay | None = None
    """Learning rate of each block over that of the block above it, as in BEiT (Bao et al. 2022) and
    MAE; the head's is the whole one, the last norm's and the last block's the first below. None, as
    1, trains all at one rate."""


class FinetuneAllSettings(LabelledSettings):
    """All of the network, trained from the probed backbone; see `transfer.finetune_all`."""

    base_lr: PositiveFloat = 5e-4
    layer_decay: LayerDecay | None = None
    """Learning rate of each block over that of the block above it; see `finetune.layer_decay`."""


class FromScratchSettings(LabelledSettings):
    """The same network on the same labels, without pretraining."""

    base_lr: PositiveFloat = 1e-3
    weights: Literal["normal", "xavier"] = "xavier"
    """How the first ones are drawn. A baseline of few labels gets far further with Xavier's; for
    pretraining the normal distribution of transformers gives the better features."""
