"""The command line `rotvit`. What is slow to import is imported by the command that needs it."""

import difflib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows import data_commands, model_commands
from flows.options import (
    ConfigOption,
    OutputsOption,
    PresetOption,
    SeedOption,
    SeedsOption,
    SetOption,
    settings_of,
)
from flows.terminal_run import KilledError, RunFailedError, is_user_error, run_and_show, sentence
from training.presets import PRESETS
from training.stages import STAGES, Stage

if TYPE_CHECKING:
    from flows.display import StateRow
    from training.settings import Settings
    from training.store import StageRequest, Verdict

EXIT_FAILED, EXIT_USER_ERROR, EXIT_INTERRUPTED = 1, 2, 130

PIPED_WIDTH = 10_000
"""Characters per line of a table that no terminal shows: what reads a pipe reads lines."""

KEY_WIDTH = 100
"""Width of a terminal from which on there is room for the keys."""

STOPPED = "Stopped. The same command resumes."

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,  # rich's help takes longer to import than to read
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status.

    Returns:
        0 done, 1 a stage failed, 2 a user's mistake, 130 Ctrl-C, 128 + n ended by signal n.
    """
    # Releases of typer differ in whether they bring a click of their own, and none names the base
    # class of usage errors publicly.
    usage_error: Any = typer.BadParameter.__bases__[0]
    command = typer.main.get_command(app)
    try:
        # Not command.main(), which turns Ctrl-C into an exit status without a word.
        with command.make_context(
            "rotvit", list(sys.argv[1:] if arguments is None else arguments)
        ) as context:
            command.invoke(context)
    except typer.Exit as leaving:  # --help
        return leaving.exit_code
    except usage_error as error:
        where = error.ctx.command_path if error.ctx else "rotvit"
        return _fail(f"{_explain(error)} `{where} --help` shows what there is.", EXIT_USER_ERROR)
    except KeyboardInterrupt:
        return _fail(STOPPED, EXIT_INTERRUPTED)
    except KilledError as killed:
        return _fail(STOPPED, 128 + killed.number)
    except RunFailedError as error:
        return _fail(str(error), EXIT_FAILED)
    except BrokenPipeError:  # `rotvit status | head`; otherwise Python complains at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except Exception as error:  # a user's mistake is a line; anything else goes on as it came
        if not is_user_error(error):
            raise
        from training.errors import is_final

        return _fail(str(error), EXIT_USER_ERROR if is_final(error) else EXIT_FAILED)
    return 0


@app.callback(invoke_without_command=True)
def rotvit(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Pretrain a Vision Transformer by rotation prediction, and measure what it learned.

    Stages that are done are cached, one that was interrupted resumes: the same command again.
    """
    if version:
        from importlib import metadata

        typer.echo(f"rotvit {metadata.version('rotation-vit')}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def run(
    preset: PresetOption = None,
    config: ConfigOption = None,
    overrides: SetOption = None,
    outputs: OutputsOption = Path("outputs"),
    seed: SeedOption = None,
    seeds: SeedsOption = None,
    until: Annotated[
        str | None, typer.Option("--until", metavar="STAGE", help="Last stage to run.")
    ] = None,
    refresh: Annotated[
        list[str] | None,
        typer.Option(
            "--refresh", metavar="STAGE", help="Compute this stage again; may be given again."
        ),
    ] = None,
) -> None:
    """Run all stages."""
    settings = settings_of(preset, config, overrides, seed, seeds)
    run_and_show(settings, outputs, until=until, refresh=refresh or ())


def _add_stage_command(stage: Stage) -> None:
    @app.command(_title(stage.name), help=stage.summary, short_help=stage.summary)
    def run_stage(
        preset: PresetOption = None,
        config: ConfigOption = None,
        overrides: SetOption = None,
        outputs: OutputsOption = Path("outputs"),
        seed: SeedOption = None,
        seeds: SeedsOption = None,
    ) -> None:
        settings = settings_of(preset, config, overrides, seed, seeds)
        run_and_show(settings, outputs, until=stage.name)


def _title(stage: str) -> str:
    return stage.replace("_", "-")


for _stage in STAGES.values():
    # Those with a directory, for labelled images, are part of what needs them.
    if not _stage.directory and _stage.name != "report":
        _add_stage_command(_stage)


@app.command(help=STAGES["report"].summary, short_help=STAGES["report"].summary)
def report(
    preset: PresetOption = None,
    config: ConfigOption = None,
    overrides: SetOption = None,
    outputs: OutputsOption = Path("outputs"),
    seed: SeedOption = None,
    seeds: SeedsOption = None,
    so_far: Annotated[
        bool,
        typer.Option(
            "--so-far", help="Report what there is, also while the run is going; train nothing."
        ),
    ] = False,
    show: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
) -> None:
    """Run the stages that are missing, then write the report; with --open show it."""
    settings = settings_of(preset, config, overrides, seed, seeds)
    outputs = outputs.expanduser().resolve()
    if so_far:
        from training.report import write_so_far

        page = write_so_far(settings, outputs)
        typer.echo(f"report   {page}")
    else:
        from training.run_record import run_directory

        run_and_show(settings, outputs, until="report")
        page = run_directory(settings, outputs) / "report" / "index.html"
    if show:
        import webbrowser

        if not webbrowser.open(page.as_uri()):
            typer.echo(f"No browser was found. Open {page.as_uri()} in one.", err=True)


@app.command()
def status(
    preset: PresetOption = None,
    config: ConfigOption = None,
    overrides: SetOption = None,
    outputs: OutputsOption = Path("outputs"),
    seed: SeedOption = None,
    seeds: SeedsOption = None,
) -> None:
    """Say what is cached, partial or missing, and what of it is being computed."""
    settings = settings_of(preset, config, overrides, seed, seeds)
    rows = list(_states(settings, outputs.expanduser().resolve()))
    from rich.console import Console

    from flows import display

    console = Console(width=None if sys.stdout.isatty() else PIPED_WIDTH)
    console.print(display.states_table(rows, keys=console.width >= KEY_WIDTH))


@app.command()
def presets() -> None:
    """List the presets."""
    from rich.console import Console

    from flows import display

    Console().print(display.presets_table(PRESETS))


@app.command()
def config(
    preset: PresetOption = None,
    config: ConfigOption = None,
    overrides: SetOption = None,
    outputs: Annotated[Path | None, typer.Option("--outputs", hidden=True)] = None,
    seed: SeedOption = None,
    seeds: SeedsOption = None,
) -> None:
    """Print all settings as YAML that --config accepts."""
    # --outputs is no setting; it is taken so that the options of a run can be pasted here.
    settings = settings_of(preset, config, overrides, seed, seeds)
    from training.configure import to_yaml

    typer.echo(to_yaml(settings), nl=False)


for _commands in (data_commands, model_commands):
    _commands.add_to(app)


def _states(settings: "Settings", outputs: Path) -> Iterator["StateRow"]:
    """Yield what is said of each stage, in the order in which stages run."""
    from flows.display import StateRow
    from training import store
    from training.steps import Found, steps

    found = Found()
    directories = set()
    for step in steps(settings, outputs, found):
        title = _title(step.title)
        if step.request is None:
            yield StateRow(title, "missing", f"needs {_title(step.lacking)}", "")
            continue
        verdict = store.inspect(step.request)
        if verdict.result:
            found.add(verdict.result, step.request.variant)
        directory = step.request.directory
        if directory in directories:  # the same images prepared for both purposes
            continue
        directories.add(directory)
        state, why = _state(step.request, verdict)
        is_there = verdict.result or state != "missing" or directory.exists()
        yield StateRow(title, state, why, step.request.key if is_there else "")


def _state(request: "StageRequest", verdict: "Verdict") -> tuple[str, str]:
    """Return the state of a stage, and why it is so."""
    from training import attempts, remote_outputs
    from training.lock import holder
    from training.wording import scores_in_words

    if verdict.result:
        return verdict.state, scores_in_words(request.stage, verdict.result.scores)
    saved = verdict.step if verdict.state == "partial" else None
    if saved is None and not verdict.stale:
        saved = remote_outputs.newest_step(request)
    who = holder(attempts.lock_path(request))
    at_it = f"{who} computes it" if who else None
    if saved is not None:
        return f"partial at step {saved}", at_it or "resumes there"
    return verdict.state, at_it or verdict.why


def _fail(message: str, status: int) -> int:
    with suppress(OSError):  # the terminal may be gone
        typer.echo(" ".join(message.split()), err=True)
    return status


def _explain(error: Any) -> str:
    """Return what is wrong with the arguments; of the options, name the nearest one only."""
    if not hasattr(error, "option_name") or not hasattr(error, "possibilities"):
        return sentence(error.format_message())
    known = [name for param in error.ctx.command.params for name in param.opts]
    near = difflib.get_close_matches(error.option_name, known, n=1)
    return f"No such option: {error.option_name}." + (f" Did you mean {near[0]}?" if near else "")


if __name__ == "__main__":
    sys.exit(main())
