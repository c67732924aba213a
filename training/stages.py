"""The stages of a run: what each builds on, which settings it reads, its numerics version.

This table holds no computation and imports no torch, so that keys and states are known in
milliseconds. What a stage computes is in the module of its name.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # pydantic takes longer to import than `rotvit --help` may take
    from training.settings import Settings

_SPLITS = ("data.val_fraction", "data.test_fraction", "data.split_seed")
_LABELLED = ("transfer.labels", *_SPLITS)
_ARITHMETIC = ("hardware.precision", "hardware.compile")

TRAINED_BLOCKS = {"finetune_1": 1, "finetune_2": 2}
"""Blocks that a fine-tuning trains, counted from the head, by stage; the others train all."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage, declared.

    Attributes:
        name: Stem of its module and files.
        summary: One line for help texts.
        reads: Dotted names of the settings, or of whole sections, that can change its result.
        reads_where_set: Names of settings, also within what it reads, that came later and are read
            only where they are not at their default, which is off, so that results from before
            they came stay valid.
        needs: Given the settings, which stage fills each role that this one builds on.
        version: Numerics version: raised by hand when the same settings would give another
            result. A test with golden losses fails when results change and this was not raised.
        resumes: Whether an attempt that is told to stop saves what the next one goes on from.
        recipe: Section of the settings that says how it trains: a long training, of which a GPU
            takes one at a time; nothing where it is none.
        divides: Whether several processes divide its images among them, as they do in trainings.
        module: Where it is computed, below `training`; the name itself unless said.
        directory: Folder below the outputs; the name itself unless said.
    """

    name: str
    summary: str
    reads: tuple[str, ...]
    needs: Callable[["Settings"], Mapping[str, str]]
    reads_where_set: tuple[str, ...] = ()
    version: int = 1
    resumes: bool = False
    recipe: str = ""
    divides: bool = False
    module: str = ""
    directory: str = ""

    @property
    def module_name(self) -> str:
        """Name of the module below `training` that computes it."""
        return self.module or self.name

    @property
    def trains(self) -> bool:
        """Whether it is a long training."""
        return bool(self.recipe)

    @property
    def takes_processes(self) -> bool:
        """Whether several processes can compute it together."""
        return self.trains or self.divides


def transfer_data(settings: "Settings") -> str:
    """Name of the stage that prepares the labelled images."""
    return "prepare_data" if settings.transfer_is_pretrain_data else "prepare_transfer_data"


def _needs_pretrain(settings: "Settings") -> dict[str, str]:
    needs = {"data": "prepare_data"}
    if settings.data.leave_out_test_copies and not settings.transfer_is_pretrain_data:
        needs["transfer_data"] = "prepare_transfer_data"
    return needs


def _needs_download(
    stage: str, data: Literal["pretrain", "transfer"]
) -> Callable[["Settings"], Mapping[str, str]]:
    """Return what a preparing stage needs: a download, if its images are not here already."""

    def needs(settings: "Settings") -> dict[str, str]:
        return {"download": stage} if settings.remote_sources(data) else {}

    return needs


def _needs_finetune(settings: "Settings", start: str = "linear_probe") -> dict[str, str]:
    needs = {"start": start, "data": transfer_data(settings)}
    return {**needs, "tokens": "frozen_tokens"} if settings.uses_frozen_tokens else needs


def _needs_finetune_2(settings: "Settings") -> dict[str, str]:
    previous = settings.finetune.start_from == "previous"
    return _needs_finetune(settings, "finetune_1" if previous else "linear_probe")


def _needs_report(settings: "Settings") -> dict[str, str]:
    names = [name for name in STAGES if name != "report"]
    if not settings.transfer.finetune_all:
        names.remove("finetune_all")
    if settings.transfer_is_pretrain_data:
        names.remove("prepare_transfer_data")
    if not settings.uses_frozen_tokens:
        names.remove("frozen_tokens")
    data = [name for name in names if name.startswith("prepare")]
    downloads = {stage for name in data for stage in STAGES[name].needs(settings).values()}
    return {name: name for name in names if not name.startswith("download") or name in downloads}


_ALL = (
    Stage(
        name="download",
        summary="Download the images to pretrain on, where they are not here already.",
        reads=(),  # only the names of the sources: see store.make_request
        needs=lambda settings: {},
        resumes=True,
    ),
    Stage(
        name="download_transfer",
        summary="The same for the labelled images, where they come from elsewhere.",
        reads=(),
        needs=lambda settings: {},
        resumes=True,
        module="download",
        directory="download",
    ),
    Stage(
        name="prepare_data",
        summary="Decode, crop and store the images to pretrain on.",
        reads=(),  # what it depends on is the content of the sources: see store.make_request
        needs=_needs_download("download", "pretrain"),
        resumes=True,
    ),
    Stage(
        name="prepare_transfer_data",
        summary="The same for the labelled images, where they come from elsewhere.",
        reads=(),
        needs=_needs_download("download_transfer", "transfer"),
        resumes=True,
        module="prepare_data",
        directory="prepare_data",
    ),
    Stage(
        name="pretrain",
        summary="Train the backbone to tell which way up an image is.",
        reads=("seed", "model", "pretrain", *_ARITHMETIC, *_SPLITS),
        reads_where_set=(
            "data.leave_out_test_copies",
            "pretrain.crop_scale",
            "pretrain.drop_path",
            "pretrain.image_size",
            "pretrain.pool",
            "pretrain.colour_jitter",
            "pretrain.greyscale",
            "pretrain.patch_rotation",
            "pretrain.patch_gap",
            "pretrain.ema",
        ),
        needs=_needs_pretrain,
        version=3,
        resumes=True,
        recipe="pretrain",
    ),
    Stage(
        name="features",
        summary="Take the features of every layer of the frozen backbone, and of a random one.",
        reads=("seed", "hardware.precision", *_SPLITS),
        needs=lambda settings: {"start": "pretrain", "data": transfer_data(settings)},
        divides=True,
    ),
    Stage(
        name="linear_probe",
        summary="Train a linear head on the frozen backbone, and on a random one as control.",
        reads=("seed", "linear_probe", *_LABELLED),
        needs=lambda settings: {
            "start": "pretrain",
            "features": "features",
            "data": transfer_data(settings),
        },
        version=4,
    ),
    Stage(
        name="frozen_tokens",
        summary="Compute once what the frozen blocks make of the labelled images, to fine-tune.",
        # Nothing of the fine-tuning and no seed, so that both and all of theirs share it.
        reads=("hardware.precision", "hardware.frozen_tokens", *_LABELLED),
        needs=lambda settings: {"start": "pretrain", "data": transfer_data(settings)},
    ),
    Stage(
        name="finetune_1",
        summary="Train the head and the last block, from the probed backbone.",
        reads=("seed", "finetune", *_ARITHMETIC, *_LABELLED),
        reads_where_set=("finetune.crop_scale", "finetune.drop_path", "finetune.layer_decay"),
        needs=_needs_finetune,
        version=2,
        resumes=True,
        recipe="finetune",
        module="finetune",
    ),
    Stage(
        name="finetune_2",
        summary="Train the head and the last two blocks, from the probed backbone.",
        reads=("seed", "finetune", *_ARITHMETIC, *_LABELLED),
        reads_where_set=("finetune.crop_scale", "finetune.drop_path", "finetune.layer_decay"),
        needs=_needs_finetune_2,
        version=2,
        resumes=True,
        recipe="finetune",
        module="finetune",
    ),
    Stage(
        name="finetune_all",
        summary="Train all of the network, from the probed backbone.",
        reads=("seed", "finetune_all", *_ARITHMETIC, *_LABELLED),
        needs=lambda settings: {"start": "linear_probe", "data": transfer_data(settings)},
        resumes=True,
        recipe="finetune_all",
        module="finetune",
    ),
    Stage(
        name="from_scratch",
        summary="Train the same network on the same labels without pretraining.",
        reads=("seed", "model", "from_scratch", *_ARITHMETIC, *_LABELLED),
        reads_where_set=("from_scratch.crop_scale", "from_scratch.drop_path"),
        needs=lambda settings: {"data": transfer_data(settings)},
        version=3,
        resumes=True,
        recipe="from_scratch",
    ),
    Stage(
        name="feature_analysis",
        summary="Probe every layer, from the embedding to the last block.",
        reads=("seed", "feature_analysis", "linear_probe", *_LABELLED),
        needs=lambda settings: {"features": "features", "data": transfer_data(settings)},
        version=3,
    ),
    Stage(
        name="label_efficiency",
        summary="Probe the frozen backbone with more and more labels, and a random one as control.",
        reads=("seed", "linear_probe", "evaluation.label_fractions", *_SPLITS),
        needs=lambda settings: {"features": "features", "data": transfer_data(settings)},
        version=2,
    ),
    Stage(
        name="report",
        summary="Tables and figures of all stages as one page.",
        reads=("preset", "seed", "evaluation"),
        needs=_needs_report,
        version=3,
    ),
)

STAGES: dict[str, Stage] = {stage.name: stage for stage in _ALL}
"""Every stage by name, in the order in which they run."""


def stage_named(name: str) -> Stage:
    """Look a stage up by its name, written with `-` or `_`.

    Raises:
        ConfigError: If there is none of that name.
    """
    stem = name.replace("-", "_")
    if stem not in STAGES:
        from training.settings import ConfigError

        known = ", ".join(stage.replace("_", "-") for stage in STAGES)
        raise ConfigError(f"A stage must be one of {known}; got {name!r}.")
    return STAGES[stem]


def plan(settings: "Settings", until: str | None = None) -> list[Stage]:
    """Return the stages to run, in order: all of them, or `until` and what it needs.

    Raises:
        ConfigError: If `until` names no stage.
    """
    wanted: set[str] = set()

    def want(name: str) -> None:
        wanted.add(name)
        for needed in STAGES[name].needs(settings).values():
            want(needed)

    want(stage_named(until or "report").name)
    return [stage for stage in _ALL if stage.name in wanted]


def refreshed(names: Iterable[str], planned: Iterable[Stage]) -> list[str]:
    """Return the stages to compute again, written with `-` or `_`, by their names.

    Raises:
        ConfigError: If one is no stage, or none of those that run.
    """
    found = [stage_named(name).name for name in names]
    running = [stage.name for stage in planned]
    for name in found:
        if name not in running:
            from training.settings import ConfigError

            known = ", ".join(name.replace("_", "-") for name in running)
            raise ConfigError(
                f"What to refresh must be among the stages that run: {known}; got "
                f"{name.replace('_', '-')!r}."
            )
    return found
