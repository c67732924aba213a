"""Options that several commands share, and the settings that they amount to."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from training.presets import PRESETS

if TYPE_CHECKING:
    from training.settings import Settings


def outputs_folder(place: object) -> Path:
    """Return the folder of the outputs that a user names, by its path or an address."""
    text = str(place)
    if ":/" not in text:  # the usual case, for which nothing has to be imported
        return Path(text)
    from training.remote_outputs import local_folder
    from training.stage_files import OutputsError

    try:
        return local_folder(text)
    except OutputsError as error:  # click says nothing of what other errors say
        raise typer.BadParameter(str(error)) from error


PresetOption = Annotated[
    str | None,
    typer.Option("--preset", metavar="NAME", help=f"{', '.join(PRESETS)}; drawn by default."),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="YAML file, as `rotvit config` prints it."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="One setting; may be given again. `NAME=none` unsets it.",
    ),
]
OutputsOption = Annotated[
    Path,
    typer.Option(
        "--outputs",
        metavar="DIR",
        parser=outputs_folder,
        help="Where everything is written: a folder, or an address (s3://bucket/prefix).",
    ),
]
SeedOption = Annotated[
    int | None, typer.Option("--seed", metavar="N", help="Of weights, order and augmentation.")
]
SeedsOption = Annotated[
    int | None,
    typer.Option("--seeds", metavar="N", help="How many seeds, for means and their spread."),
]


def settings_of(
    preset: str | None,
    config: Path | None,
    overrides: Sequence[str] | None,
    seed: int | None,
    seeds: int | None,
) -> "Settings":
    """Return the settings that these options amount to.

    Raises:
        ConfigError: If they name or hold what cannot be.
    """
    from training.configure import build_settings

    given = [*(overrides or ()), *([] if seeds is None else [f"evaluation.seeds={seeds}"])]
    return build_settings(preset, config=config, overrides=given, seed=seed)
