"""A run in this process: Prefect's settings for it, its server, its log file.

Nothing here imports Prefect before a run starts.
"""

import http.client
import logging
import os
import signal
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks import stage_processes

if TYPE_CHECKING:
    from training.settings import Settings

logger = logging.getLogger(__name__)

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
    if not server_is_configured():  # then `rotvit` has seen that something must be computed
        stage_processes.prepare()
    from prefect import tags

    from flows.rotation_vit import rotation_vit
    from flows.service import OUR_TAG

    # After the import: it configures logging anew.
    with _logging_to(log_path(settings, outputs)):
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


def server_is_configured() -> bool:
    """Whether Prefect has a server that outlives the run, as its profiles say without it."""
    if os.environ.get("PREFECT_API_URL"):
        return True
    home = Path(os.environ.get("PREFECT_HOME", "~/.prefect")).expanduser()
    profiles = Path(os.environ.get("PREFECT_PROFILES_PATH", home / "profiles.toml"))
    try:
        return "PREFECT_API_URL" in profiles.read_text(encoding="utf-8")
    except OSError:
        return False


def log_path(settings: "Settings", outputs: Path) -> Path:
    """Return the file to which everything is logged that a run says."""
    from training.run_record import run_name

    return outputs / "runs" / run_name(settings) / "log.txt"


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
        except Exception as error:  # raised again below, in the thread that waits
            problems.append(error)

    thread = threading.Thread(target=start, daemon=True)
    thread.start()
    thread.join()  # here Ctrl-C is heard
    if problems:
        raise problems[0]


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
