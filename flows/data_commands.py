"""Commands for images: canary, push-shards. Imports nothing heavy either."""

from pathlib import Path
from typing import Annotated

import typer

from flows.options import (
    ConfigOption,
    OutputsOption,
    PresetOption,
    SeedOption,
    SeedsOption,
    SetOption,
    settings_of,
)
from flows.terminal_run import RunFailedError, run_and_show
from training.stages import STAGES


def add_to(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    for command in (canary, push_shards):
        app.command()(command)


def canary(
    preset: PresetOption = None,
    config: ConfigOption = None,
    overrides: SetOption = None,
    outputs: OutputsOption = Path("outputs"),
    seed: SeedOption = None,
    seeds: SeedsOption = None,
    source: Annotated[
        str | None,
        typer.Option("--source", metavar="SOURCE", help="Short for --set data.source=SOURCE."),
    ] = None,
    images: Annotated[
        int,
        typer.Option("--images", metavar="N", help="Noise images; more find fainter marks."),
    ] = 3000,
) -> None:
    """Say whether your files and the data path give the rotation away.

    Noise in files like yours (sizes, JPEG tables, EXIF) goes the whole way to the network. The exit
    status is 0 if a classifier cannot tell which way up it was, and 1 if it can.
    """
    given = [*(overrides or ()), *([f"data.source={source}"] if source is not None else [])]
    settings = settings_of(preset, config, given, seed, seeds)
    outputs = outputs.expanduser().resolve()
    downloads = None
    if settings.remote_sources("pretrain"):
        run_and_show(settings, outputs, until="download")
        from training import remote_outputs, store

        downloads = store.make_request(STAGES["download"], settings, outputs, {}).directory
        remote_outputs.fetch(downloads)
    from rich.console import Console

    from data.specs import without_secrets
    from flows import display
    from training.canary import check_path
    from training.preflight import check_outputs

    check_outputs(outputs)
    with display.bar("noise") as report:
        verdict = check_path(
            settings,
            images=images,
            workplace=outputs,
            downloads=downloads,
            report=report,
        )
    Console().print(display.canary_table(verdict.readings))
    typer.echo(
        f"Noise in the form of files of {without_secrets(settings.data.source)}: {verdict.files}."
    )
    typer.echo(verdict.in_words())
    if verdict.leaks:
        raise typer.Exit(1)


def push_shards(
    address: Annotated[
        str,
        typer.Argument(
            metavar="ADDRESS", help="s3://bucket/prefix, gs://…, or a folder.", show_default=False
        ),
    ],
    preset: PresetOption = None,
    config: ConfigOption = None,
    overrides: SetOption = None,
    outputs: OutputsOption = Path("outputs"),
    seed: SeedOption = None,
    seeds: SeedsOption = None,
    delete_pixels: Annotated[
        bool,
        typer.Option("--delete-pixels", help="Then delete the images here; read them from there."),
    ] = False,
) -> None:
    """Copy prepared images to an address that trainings can read them from.

    Trainings keep what they read on a disk of their machine, ROTVIT_SHARD_CACHE, up to
    ROTVIT_SHARD_CACHE_GIB. With ROTVIT_SHARDS=ADDRESS other machines prepare nothing, and read from
    there.
    """
    settings = settings_of(preset, config, overrides, seed, seeds)
    from rich.progress import DownloadColumn

    from data.patience import DownloadError
    from flows import display
    from training.shard_pushing import push

    with display.bar("shards", DownloadColumn()) as report:
        try:
            addresses = push(
                settings,
                outputs.expanduser().resolve(),
                address,
                delete_pixels=delete_pixels,
                report=report,
            )
        except DownloadError as error:  # of a store that failed as often as it was asked
            raise RunFailedError(str(error)) from error
    for each in addresses:
        typer.echo(each)
