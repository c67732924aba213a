"""The command line `rotvit`. What is slow to import is imported by the command that needs it."""

import difflib
import http.client
import logging
import os
import signal
import ssl
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from training.presets import PRESETS
from training.stages import STAGES, Stage, plan, stage_named

if TYPE_CHECKING:
    from training.settings import Settings

EXIT_FAILED, EXIT_USER_ERROR, EXIT_INTERRUPTED = 1, 2, 130

STOPPED = "Stopped. The same command resumes."

PREFECT_DEFAULTS = {
    # As in pyproject.toml, which Prefect reads in the project's own directory only.
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",  # the same for Prefect's client, which prints a notice otherwise
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_EXTRA_LOGGERS": "training,models,data",
    # Its console lines and tracebacks; they are in the log file.
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_HANDLERS_DEBUG_LEVEL": "CRITICAL",
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
    "GOMP_SPINCOUNT": "1000",  # not Prefect's: see training/hardware.py
}
"""Environment of a run, where the user has not set it otherwise."""

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,  # rich's help takes longer to import than to read
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
logger = logging.getLogger(__name__)

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
    Path, typer.Option("--outputs", metavar="DIR", help="Where everything is written.")
]
SeedOption = Annotated[
    int | None, typer.Option("--seed", metavar="N", help="Of weights, order and augmentation.")
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
        return _fail(f"{_explain(error)} `rotvit --help` shows what there is.", EXIT_USER_ERROR)
    except KeyboardInterrupt:
        return _fail(STOPPED, EXIT_INTERRUPTED)
    except KilledError as killed:
        return _fail(STOPPED, 128 + killed.number)
    except RunFailedError as error:
        return _fail(str(error), EXIT_FAILED)
    except BrokenPipeError:  # `rotvit status | head`; otherwise Python complains at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except Exception as error:
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
    settings = _settings(preset, config, overrides, seed)
    _run(settings, outputs, until=until, refresh=refresh or ())


def _add_stage_command(stage: Stage) -> None:
    @app.command(_title(stage.name), help=stage.summary, short_help=stage.summary)
    def run_stage(
        preset: PresetOption = None,
        config: ConfigOption = None,
        overrides: SetOption = None,
        outputs: OutputsOption = Path("outputs"),
        seed: SeedOption = None,
    ) -> None:
        settings = _settings(preset, config, overrides, seed)
        _run(settings, outputs, until=stage.name, refresh=())


def _title(stage: str) -> str:
    return stage.replace("_", "-")


for _stage in STAGES.values():
    if not _stage.directory:  # the others, for labelled images, are part of what needs them
        _add_stage_command(_stage)


@app.command()
def status(
    preset: PresetOption = None,
    config: ConfigOption = None,
    overrides: SetOption = None,
    outputs: OutputsOption = Path("outputs"),
    seed: SeedOption = None,
) -> None:
    """Say what is cached, partial or missing."""
    settings = _settings(preset, config, overrides, seed)
    rows = list(_states(settings, outputs.expanduser().resolve()))
    from rich.console import Console

    from flows import display

    Console().print(display.states_table(rows))


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
) -> None:
    """Print all settings as YAML that --config accepts."""
    # --outputs is no setting; it is taken so that the options of a run can be pasted here.
    settings = _settings(preset, config, overrides, seed)
    from training.settings import to_yaml

    typer.echo(to_yaml(settings), nl=False)


def start_flow(
    settings: "Settings", outputs: Path, until: str | None, refresh: Sequence[str]
) -> dict[str, Any]:
    """Run the flow in this process and return the content of `results.json`.

    Prefect uses the server of `PREFECT_API_URL` or of the active profile, else one of its own for
    the time of the run.

    Args:
        settings: Everything that the run depends on.
        outputs: Absolute.
        until: Last stage to run; none for all.
        refresh: Stages to compute again.
    """
    for name, value in PREFECT_DEFAULTS.items():
        os.environ.setdefault(name, value)
    logger.info("Starting Prefect.")
    from prefect import tags

    from flows.rotation_vit import rotation_vit
    from flows.service import OUR_TAG

    # After the import: it configures logging anew.
    with _logging_to(_log_path(settings, outputs)):
        _check_server()
        _start_server()
        try:
            with tags(OUR_TAG):
                return rotation_vit(
                    settings=settings, outputs=outputs, until=until, refresh=tuple(refresh)
                )
        except BaseException:
            logging.getLogger("rotvit").exception("The run ended early.")
            raise


def _settings(
    preset: str | None, config: Path | None, overrides: Sequence[str] | None, seed: int | None
) -> "Settings":
    from training.settings import build_settings

    return build_settings(preset, config=config, overrides=overrides or (), seed=seed)


def _run(settings: "Settings", outputs: Path, *, until: str | None, refresh: Sequence[str]) -> None:
    outputs = outputs.expanduser().resolve()
    planned = [stage.name for stage in plan(settings, until)]
    again = [stage_named(name).name for name in refresh]
    for name in again:
        if name not in planned:
            from training.settings import ConfigError

            raise ConfigError(
                f"--refresh takes stages that this command runs: "
                f"{', '.join(map(_title, planned))}; got {_title(name)!r}."
            )
    from training import preflight

    preflight.check(settings, outputs, until)
    results = None
    if not again and not _server_is_configured():
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


def _compute(
    settings: "Settings", outputs: Path, *, until: str | None, refresh: Sequence[str]
) -> dict[str, Any]:
    from rich.console import Console

    from flows import display

    with display.shown(Console(stderr=True)), _signals_raised():
        try:
            return start_flow(settings, outputs, until, refresh)
        except Exception as error:
            if _is_user_error(error):
                raise
            raise RunFailedError(
                f"The run failed: {type(error).__name__}: {_sentence(str(error))} "
                f"Log: {_log_path(settings, outputs)}. The same command resumes."
            ) from error


def _server_is_configured() -> bool:
    """Whether Prefect has a server that outlives the run, as its profiles say without it."""
    if os.environ.get("PREFECT_API_URL"):
        return True
    home = Path(os.environ.get("PREFECT_HOME", "~/.prefect")).expanduser()
    profiles = Path(os.environ.get("PREFECT_PROFILES_PATH", home / "profiles.toml"))
    try:
        return "PREFECT_API_URL" in profiles.read_text(encoding="utf-8")
    except OSError:
        return False


def _states(settings: "Settings", outputs: Path) -> Iterator[tuple[str, str, str]]:
    """Yield stage, state and why, in words, in the order in which stages run."""
    from training import store
    from training.store import StageResult
    from training.wording import scores_in_words

    results: dict[str, StageResult] = {}
    directories = set()
    for stage in plan(settings):
        lacking = [name for name in stage.needs(settings).values() if name not in results]
        if lacking:
            yield _title(stage.name), "missing", f"needs {_title(lacking[0])}"
            continue
        request = store.make_request(stage, settings, outputs, results)
        verdict = store.inspect(request)
        if verdict.result:
            results[stage.name] = verdict.result
        if request.directory in directories:  # the same images prepared for both purposes
            continue
        directories.add(request.directory)
        if verdict.result:
            words = scores_in_words(stage.name, verdict.result.scores)
            yield _title(stage.name), verdict.state, words
        elif verdict.state == "partial":
            yield _title(stage.name), f"partial at step {verdict.step}", "resumes there"
        else:
            yield _title(stage.name), verdict.state, verdict.why


def _check_server() -> None:
    """Look whether the server that Prefect is to use answers, before Prefect waits for it.

    Raises:
        ConfigError: If it does not within five seconds.
    """
    from prefect.settings import PREFECT_API_URL

    url = PREFECT_API_URL.value()
    if not url:
        return
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5):
            pass
    except (urllib.error.HTTPError, http.client.HTTPException, ssl.SSLError, ValueError):
        pass  # it answers, or Prefect knows better what the address means
    except OSError as error:
        from training.settings import ConfigError

        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLError):
            return
        raise ConfigError(
            f"Prefect's server must answer at PREFECT_API_URL={url}, it does not ({reason}). "
            "Start it (make ui, or prefect server start), or run without one: "
            "env -u PREFECT_API_URL PREFECT_PROFILE=ephemeral rotvit ..."
        ) from error


def _start_server() -> None:
    """Start Prefect's temporary server now, deaf to Ctrl-C, if one is needed.

    A terminal sends Ctrl-C to the server too. With the server gone, the flow tries for a minute
    to report its end, and then fails on that (seen with Prefect 3.8.8). A blocked signal stays
    blocked in child processes, so the thread that starts the server blocks it.
    """
    from prefect.client.orchestration import get_client

    problems: list[Exception] = []

    def start() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
        try:
            get_client(sync_client=True)
        except Exception as error:
            problems.append(error)

    thread = threading.Thread(target=start, daemon=True)
    thread.start()
    thread.join()  # here Ctrl-C is heard
    if problems:
        raise problems[0]


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


@contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    """Append everything that is logged, Prefect's lines and tracebacks included, to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setLevel(logging.INFO)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


def _log_path(settings: "Settings", outputs: Path) -> Path:
    from training.run_record import run_name

    return outputs / "runs" / run_name(settings) / "log.txt"


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
