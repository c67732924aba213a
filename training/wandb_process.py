"""The process beside a stage that tells W&B about it, as the stage sees it.

All that wandb does happens there: see `training/tracking.py`. So whatever W&B does, the stage
cannot fail on it, and waits for no more than `WAIT_SECONDS`, at its end. What W&B has missed when
the process ends too, `python -m training.wandb_process DIRECTORY` tells it.
"""

import argparse
import contextvars
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from training import store
from training.stage_files import TRACKING, OutputsError
from training.store import StageRequest
from training.wandb_key import wandb_mode

logger = logging.getLogger(__name__)

COMMAND = (sys.executable, "-P", "-m", "training.tracking")
"""What starts the process; directory, mode and the stage's process follow."""

WAIT_SECONDS = 5.0
"""Longest time that a stage waits at its end; what is not sent then is sent in the background."""

BACKGROUND_SECONDS = 300.0
"""Longest time that the process outlives its stage. What W&B has not taken then stays on disk."""

A_DAY = 86_400.0

DONE = b"done\n"
"""What the process hears when the result is written; nothing where the stage ends early."""


class Tracking:
    """The process that tells W&B about a stage, seen from the stage; a context manager.

    None is started for stages without scores, and where W&B is off.

    Args:
        request: Of the stage.
        mode: `online` or `offline`; by default as the settings say.
        background_seconds: Longest time that the process outlives its stage.

    Raises:
        ConfigError: If `tracking.wandb` is `online` and no key is found.
    """

    def __init__(
        self,
        request: StageRequest,
        mode: str | None = None,
        background_seconds: float = BACKGROUND_SECONDS,
    ) -> None:
        self._request = request
        self._process: subprocess.Popen[bytes] | None = None
        mode = mode or wandb_mode(request.settings.tracking)
        unscored = request.stage.startswith(("download", "prepare", "features", "frozen"))
        if mode == "disabled" or unscored:
            return
        process, limit = str(os.getpid()), str(background_seconds)
        command = [*COMMAND, str(request.directory), mode, process, limit]
        own = request.directory / TRACKING
        environment = {
            "WANDB_ERROR_REPORTING": "false",  # nothing to third parties, unless it is asked for
            **os.environ,
            "WANDB_CACHE_DIR": str(own / "cache"),
            "WANDB_DATA_DIR": str(own / "data"),
        }
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                start_new_session=True,  # Ctrl-C is for the stage; this one may outlive it
                env=environment,
            )
        except OSError as error:
            logger.warning("W&B cannot be told about %s: %s", request.title, error)
            return
        # In a copy of the context, so that Prefect knows which run the log lines belong to.
        self._listener = threading.Thread(
            target=contextvars.copy_context().run, args=(_pass_on, self._process), daemon=True
        )
        self._listener.start()

    def done(self) -> None:
        """Say that the stage's result is written."""
        if self._process is not None and self._process.stdin is not None:
            with suppress(OSError):  # it has died
                self._process.stdin.write(DONE)

    @property
    def has_told_all(self) -> bool:
        """Whether the process has ended well."""
        return self._process is not None and self._process.returncode == 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self.wait(WAIT_SECONDS):
            logger.info(
                "W&B goes on being told about %s in the background. Should it not take all, %s",
                self._request.title,
                f"`python -m training.wandb_process {self._request.directory}` tells it later, "
                "with the key in WANDB_API_KEY or from `wandb login`.",
            )

    def wait(self, seconds: float | None = None) -> bool:
        """Let the process come to its end; return whether it has, within that time."""
        if self._process is None or self._process.stdin is None:
            return True
        self._process.stdin.close()
        self._listener.join(seconds)
        return not self._listener.is_alive()


def _pass_on(process: subprocess.Popen[bytes]) -> None:
    """Log what the process says, until it ends."""
    assert process.stdout is not None
    with process.stdout as stream:
        for line in stream:
            level, _, text = line.decode(errors="replace").strip().partition(" ")
            logger.log(int(level) if level.isdecimal() else logging.DEBUG, "%s", text)
    process.wait()


def main(arguments: Sequence[str] | None = None) -> int:
    """Tell W&B what it lacks of a stage that is done: steps, scores, artifact.

    Returns:
        The exit status: 0 where W&B has everything, 2 on a user's mistake, 1 otherwise.
    """
    parser = argparse.ArgumentParser(description="Tell W&B what it lacks of a stage that is done.")
    parser.add_argument("directory", type=Path, help="of the stage; holds its result.json")
    directory = parser.parse_args(arguments).directory
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        request = store.read_config(directory)
        if not (request.directory / "result.json").is_file():
            raise OutputsError(
                f"The stage must be done, and {directory} holds no result.json. The command that "
                "began it resumes it, and tells W&B."
            )
    except OutputsError as error:
        logger.error("%s", error)
        return 2
    # Somebody waits for it, and can end it.
    tracking = Tracking(request, mode="online", background_seconds=A_DAY)
    tracking.done()
    tracking.wait()
    return 0 if tracking.has_told_all else 1


if __name__ == "__main__":
    raise SystemExit(main())
