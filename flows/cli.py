"""The command line `rotvit`. What is slow to import is imported by the command that needs it."""

import difflib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows import model_commands
from flows.local_run import log_path, server_is_configured, start_flow
from flows.model_commands import outputs_folder
from training.presets import PRESETS
from training.stages import STAGES, Stage, plan, refreshed

if TYPE_CHECKING:
    from training.settings import Settings

EXIT_FAILED, EXIT_USER_ERROR, EXIT_INTERRUPTED = 1, 2, 130

STOPPED = "Stopped. The same command resumes."

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,  # rich's help takes longer to import than to read
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

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


class RunFailedError(RuntimeError):
    """A stage failed, and not by a user's mistake."""


class KilledError(BaseException):
    """A signal asked this process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


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
        if not _is_user_error(error):
            raise
        return _fail(str(error), EXIT_USER_ERROR)
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
    settings = _settings(preset, config, overrides, seed, seeds)
    _run(settings, outputs, until=until, refresh=refresh or ())


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
        settings = _settings(preset, config, overrides, seed, seeds)
        _run(settings, outputs, until=stage.name, refresh=())


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
    settings = _settings(preset, config, overrides, seed, seeds)
    outputs = outputs.expanduser().resolve()
    if so_far:
        from training.report import write_so_far

        page = write_so_far(settings, outputs)
        typer.echo(f"report   {page}")
    else:
        from training.run_record import run_directory

        _run(settings, outputs, until="report", refresh=())
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
    """Say what is cached, partial or missing."""
    settings = _settings(preset, config, overrides, seed, seeds)
    rows = list(_states(settings, outputs.expanduser().resolve()))
    from rich.console import Console

    from flows import display

    Console().print(display.states_table(rows))


@app.command()
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
    settings = _settings(preset, config, given, seed, seeds)
    outputs = outputs.expanduser().resolve()
    downloads = None
    if settings.remote_sources("pretrain"):
        _run(settings, outputs, until="download", refresh=())
        from training import remote_outputs, store

        downloads = store.make_request(STAGES["download"], settings, outputs, {}).directory
        remote_outputs.fetch(downloads)
    from rich.console import Console
    from rich.progress import Progress

    from data.specs import without_secrets
    from flows import display
    from training.canary import check_path
    from training.preflight import check_outputs

    check_outputs(outputs)
    with Progress(
        console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()
    ) as bars:
        bar = bars.add_task("noise", total=None)
        verdict = check_path(
            settings,
            images=images,
            workplace=outputs,
            downloads=downloads,
            report=lambda done, total: bars.update(bar, completed=done, total=total),
        )
    Console().print(display.canary_table(verdict.readings))
    typer.echo(
        f"Noise in the form of files of {without_secrets(settings.data.source)}: {verdict.files}."
    )
    typer.echo(verdict.in_words())
    if verdict.leaks:
        raise typer.Exit(EXIT_FAILED)


@app.command()
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
    settings = _settings(preset, config, overrides, seed, seeds)
    from rich.console import Console
    from rich.progress import DownloadColumn, Progress

    from data.patience import DownloadError
    from training.shard_pushing import push

    with Progress(
        *Progress.get_default_columns(),
        DownloadColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    ) as bars:
        bar = bars.add_task("shards", total=None)
        try:
            addresses = push(
                settings,
                outputs.expanduser().resolve(),
                address,
                delete_pixels=delete_pixels,
                report=lambda done, total: bars.update(bar, completed=done, total=total),
            )
        except DownloadError as error:  # of a store that failed as often as it was asked
            raise RunFailedError(str(error)) from error
    for each in addresses:
        typer.echo(each)


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
    settings = _settings(preset, config, overrides, seed, seeds)
    from training.configure import to_yaml

    typer.echo(to_yaml(settings), nl=False)


model_commands.add_to(app)


def _settings(
    preset: str | None,
    config: Path | None,
    overrides: Sequence[str] | None,
    seed: int | None,
    seeds: int | None,
) -> "Settings":
    from training.configure import build_settings

    given = [*(overrides or ()), *([] if seeds is None else [f"evaluation.seeds={seeds}"])]
    return build_settings(preset, config=config, overrides=given, seed=seed)


def _run(settings: "Settings", outputs: Path, *, until: str | None, refresh: Sequence[str]) -> None:
    outputs = outputs.expanduser().resolve()
    again = refreshed(refresh, plan(settings, until))
    from training import preflight

    preflight.check(settings, outputs, until)
    results = None
    if not again and not server_is_configured():
        # Nobody would see that flow run, and starting a server takes longer than all the rest.
        from training.run_record import record_if_all_cached

        results = record_if_all_cached(settings, outputs, until)
    if results is None:
        results = _compute(settings, outputs, until=until, refresh=again)
    from rich.console import Console

    from flows import display

    console = Console()
    console.print(display.closing_table(results))
    for word, path in display.closing_paths(results, outputs):
        console.print(f"{word:<9}{path}", soft_wrap=True, markup=False, highlight=False)
    from training.remote_outputs import address_of

    if (address := address_of(outputs)) != str(outputs):
        stored = f"stored   {address}/runs/{results['run']}"
        console.print(stored, soft_wrap=True, markup=False, highlight=False)


def _compute(
    settings: "Settings", outputs: Path, *, until: str | None, refresh: Sequence[str]
) -> dict[str, Any]:
    from rich.console import Console

    from flows import display

    with display.shown(Console(stderr=True)), _signals_raised():
        try:
            return start_flow(settings, outputs, until, refresh)
        except Exception as error:  # whatever ended the run, the log and the way on are named
            if _is_user_error(error):
                raise
            raise RunFailedError(
                f"The run failed: {type(error).__name__}: {_sentence(str(error))} "
                f"Log: {log_path(settings, outputs)}. The same command resumes."
            ) from error


def _states(settings: "Settings", outputs: Path) -> Iterator[tuple[str, str, str]]:
    """Yield stage, state and why, in words, in the order in which stages run."""
    from training import remote_outputs, store
    from training.steps import Found, steps
    from training.wording import scores_in_words

    found = Found()
    directories = set()
    for step in steps(settings, outputs, found):
        title = _title(step.title)
        if step.request is None:
            yield title, "missing", f"needs {_title(step.lacking)}"
            continue
        verdict = store.inspect(step.request)
        if verdict.result:
            found.add(verdict.result, step.request.variant)
        if step.request.directory in directories:  # the same images prepared for both purposes
            continue
        directories.add(step.request.directory)
        if verdict.result:
            yield title, verdict.state, scores_in_words(step.stage.name, verdict.result.scores)
        elif verdict.state == "partial":
            yield title, f"partial at step {verdict.step}", "resumes there"
        elif not verdict.stale and (there := remote_outputs.newest_step(step.request)) is not None:
            yield title, f"partial at step {there}", "resumes there"
        else:
            yield title, verdict.state, verdict.why


@contextmanager
def _signals_raised() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into an exception for the `with` block.

    Without it they end this process where it stands, and Prefect's temporary server outlives it.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        raise KilledError(number)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # nohup
            signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_user_error(error: Exception) -> bool:
    from training.errors import USER_ERRORS

    return isinstance(error, USER_ERRORS)


def _fail(message: str, status: int) -> int:
    with suppress(OSError):  # the terminal may be gone
        typer.echo(" ".join(message.split()), err=True)
    return status


def _explain(error: Any) -> str:
    """Return what is wrong with the arguments; of the options, name the nearest one only."""
    if not hasattr(error, "option_name") or not hasattr(error, "possibilities"):
        return _sentence(error.format_message())
    known = [name for param in error.ctx.command.params for name in param.opts]
    near = difflib.get_close_matches(error.option_name, known, n=1)
    return f"No such option: {error.option_name}." + (f" Did you mean {near[0]}?" if near else "")


def _sentence(text: str) -> str:
    words = " ".join(text.split()) or "no reason given"
    return words if words.endswith((".", "!", "?")) else f"{words}."


if __name__ == "__main__":
    sys.exit(main())
