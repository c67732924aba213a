"""Which model a path means: a `model/` directory, the stage that made it, or a run.

Of a run's models, the one for classes is the one that was best on val; the test split chooses
nothing. Imports no torch.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from models.errors import ModelError
from training import remote_outputs
from training.stage_files import MODEL, sha256_of
from training.stages import stage_named
from training.store import StageResult

ON_CLASSES = ("linear_probe", "finetune_1", "finetune_2", "finetune_all")
"""Stages with a model for classes that began with the pretraining; of equals the last is taken."""

WITH_MODELS = ("pretrain", *ON_CLASSES, "from_scratch")

Kind = Literal["classes", "rotations"]


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """A run's record.

    Attributes:
        directory: `<outputs>/runs/<name>`.
        results: Content of its `results.json`.
    """

    directory: Path
    results: Mapping[str, Any]

    @property
    def stages(self) -> Mapping[str, Mapping[str, Any]]:
        """Rows of the stages, by name."""
        stages: Mapping[str, Mapping[str, Any]] = self.results["stages"]
        return stages

    def choose(self, stage: str | None, kind: Kind = "classes") -> str:
        """Return the stage whose model to use.

        Args:
            stage: The one that is wanted, written with `-` or `_`; none for the best on val.
            kind: What the model is to tell, where `stage` is none.

        Raises:
            ConfigError: If `stage` names no stage.
            ModelError: If the run has no such model.
        """
        there = [name for name in WITH_MODELS if name in self.stages]
        if stage is not None:
            chosen = stage_named(stage).name
        elif kind == "classes" and (probed := [name for name in ON_CLASSES if name in there]):
            chosen = max(reversed(probed), key=lambda name: float(self.stages[name]["val_top1"]))
        else:
            chosen = "pretrain"
        if chosen not in there:
            raise ModelError(
                f"The run {self.directory.name} must have a model of {chosen.replace('_', '-')}; "
                f"it has models of: {', '.join(there).replace('_', '-') or 'no stage'}. Choose "
                "with --stage, or run what is missing."
            )
        return chosen

    def stage_directory(self, stage: str) -> Path:
        """Return where a stage lies, also after the outputs were moved; bring it if need be."""
        row = self.stages[stage]
        moved = self.directory.parents[1] / stage / str(row["key"])
        remote_outputs.bring(moved)
        return moved if moved.is_dir() else Path(row["directory"])


def find_model(
    place: str, outputs: Path, *, stage: str | None = None, kind: Kind = "classes"
) -> Path:
    """Return the `model/` directory that is meant.

    Args:
        place: A `model/` directory, a directory that holds one (a stage's), a run's directory, or
            a run's name.
        outputs: Where the runs are, for a name.
        stage: Which model of a run.
        kind: What the model of a run is to tell, where `stage` is none.

    Raises:
        ConfigError: If `stage` names no stage.
        ModelError: If there is no model, if it is not as its stage made it, or if a stage is asked
            of what is no run.
    """
    path = Path(place).expanduser()
    for directory in (path, path / MODEL):
        if (directory / "config.json").is_file():
            if stage is not None:
                raise ModelError(
                    f"--stage chooses among the models of a run, and {path} is one model. Leave "
                    "it out, or name the run."
                )
            # A model may have been copied to elsewhere, without its stage.
            if directory.name == MODEL and (directory.parent / "result.json").is_file():
                check_unchanged(directory.parent)
            return directory
    run = find_run(place, outputs)
    made = run.stage_directory(run.choose(stage, kind))
    check_unchanged(made)
    return made / MODEL


def check_unchanged(directory: Path) -> None:
    """Make sure that the files of a stage's model are those that it made.

    Args:
        directory: The stage's.

    Raises:
        ModelError: If one of them is missing or damaged, or the stage is not finished.
    """
    path = directory / "result.json"
    try:
        result = StageResult.model_validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{directory} must be a finished stage, but its result.json cannot be read. Run the "
            "stage again."
        ) from error
    for name, record in result.files.items():
        file = directory / name
        if name.startswith(f"{MODEL}/") and (
            not file.is_file() or sha256_of(file) != record.sha256
        ):
            raise ModelError(f"{file} is missing or damaged. Run the stage again.")


def find_run(place: str, outputs: Path) -> FinishedRun:
    """Return the record of a run, by its directory or its name below `<outputs>/runs`.

    Raises:
        ModelError: If there is none, or it is damaged.
    """
    if "/" not in place:  # a name
        remote_outputs.fetch_record(outputs.expanduser() / "runs" / place)
    for directory in (Path(place).expanduser(), outputs.expanduser() / "runs" / place):
        file = directory / "results.json"
        if not file.is_file():
            continue
        try:
            results = json.loads(file.read_bytes())
            results["stages"].items()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(
                f"{file} must be the record of a run, but it is damaged. `rotvit run` with the "
                "settings of that run writes it again."
            ) from error
        return FinishedRun(directory=directory.resolve(), results=results)
    raise ModelError(
        f"{place} must be a model directory, a stage that has one, or a run (its directory, or its "
        f"name below {outputs / 'runs'}); there is none of these."
    )
