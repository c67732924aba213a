"""What a flow run is given, and the settings that follow from it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from prefect.runtime import flow_run
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, WithJsonSchema

from training.configure import override
from training.remote_outputs import local_folder
from training.settings import Settings
from training.stages import STAGES, stage_named


def _stage_name(name: str) -> str:
    return stage_named(name).name.replace("_", "-")


StageName = Annotated[
    str,
    AfterValidator(_stage_name),
    Field(json_schema_extra={"enum": [name.replace("_", "-") for name in STAGES]}),
]
"""A stage, as the UI's form offers them; underscores are taken, too."""


Outputs = Annotated[
    Path | str,
    BeforeValidator(str),  # a `Path` would make one slash of the two of an address
    WithJsonSchema({"type": "string"}),
]
"""The outputs folder, or its address."""


class RunParameters(BaseModel):
    """Parameters that all flows have in common."""

    settings: Settings = Settings()
    overrides: Sequence[str] = ()
    outputs: Outputs = "outputs"

    def resolved(self) -> tuple[Settings, Path]:
        """Return the settings with the overrides, and the outputs folder, absolute.

        Raises:
            ConfigError: If an override is no setting or has a value that it cannot have.
            OutputsError: If the outputs have an address that they cannot have.
        """
        return override(self.settings, self.overrides), local_folder(self.outputs)


def run_name() -> str:
    """Return the name of the current flow run: preset, data and seed."""
    given: dict[str, Any] = flow_run.parameters
    try:
        common = {name: given[name] for name in RunParameters.model_fields if name in given}
        settings, _ = RunParameters.model_validate(common).resolved()
    except ValueError:  # the run will fail on it, and say why
        return "unusable settings"
    source = settings.data.source.rpartition("/")[2]
    seeds = f"seed {settings.seed}"
    if settings.evaluation.seeds > 1:
        seeds = f"seeds {settings.seed} to {settings.seed + settings.evaluation.seeds - 1}"
    return f"{settings.preset} · {source} · {seeds}"
