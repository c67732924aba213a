"""How any stage is delivered: found again, resumed, or computed, under one lock.

A stage's module has a function `compute(context) -> StageOutcome`; everything around it is here.
It ends with `raise SystemExit(runner.main(compute))`, so that
`python -P -m training.<module> DIRECTORY` runs it in a process of its own.
"""

import argparse
import json
import logging
import os
import platform
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from data.patience import DownloadError
from training import attempts, hardware, progress, stage_files, store
from training.commit import describe_commit
from training.errors import USER_ERRORS
from training.lock import locked
from training.settings import Settings
from training.stages import STAGES
from training.stopping import EXIT_RESUME, Stopped, StopRequest, end_with
from training.store import StageRequest, StageResult
from training.wandb_process import Tracking

logger = logging.getLogger(__name__)

EXIT_USER_ERROR = 2
"""Exit status where one of `USER_ERRORS` ended a stage."""


@dataclass(frozen=True, kw_only=True)
class StageOutcome:
    """What a stage's computation returns.

    Attributes:
        scores: What was measured. The same on every computation of a key.
        timing: What was measured and differs each time.
        made: Files and folders below the stage's directory that make up the result.
        digest: Identity of what was made, where hashing `made` is not it.
        wall_seconds_before: Time spent in earlier attempts.
        resumed_from: Step that this attempt started at; none from the beginning.
    """

    scores: dict[str, Any]
    timing: dict[str, float] = field(default_factory=dict)
    made: Sequence[str] = ()
    digest: str | None = None
    wall_seconds_before: float = 0.0
    resumed_from: int | None = None


@dataclass(frozen=True)
class StageContext:
    """What a stage's computation is given."""

    request: StageRequest
    stop: StopRequest

    @property
    def settings(self) -> Settings:
        """All settings of the run; only those that the stage `reads` may change its result."""
        return self.request.settings

    @property
    def directory(self) -> Path:
        """Where the stage writes."""
        return self.request.directory

    def input(self, role: str) -> Path:
        """Directory of the stage that fills a role."""
        return self.request.inputs[role].directory

    @property
    def compile_cache(self) -> Path:
        """Folder of what was compiled, for all stages; safe to delete."""
        return self.request.outputs / ".cache" / "compile"

    def hardware(self, *, passes: float | None = None) -> hardware.Hardware:
        """Return what this key computes on, decided by its first attempt.

        Args:
            passes: Forward passes of one image that the training of the network is worth; none
                where nothing is trained. Must be given before a stored decision is asked for.
        """
        model = self.settings.model
        return hardware.decide_once(
            self.directory,
            self.settings.hardware,
            embed_dim=model.embed_dim,
            operations=None if passes is None else passes * model.operations_per_image,
        )

    def progress(
        self, done: int, total: int, unit: str, detail: str = "", resumed_from: int = 0
    ) -> None:
        """Report how far the stage is."""
        stage = self.request.title
        progress.report(progress.Progress(stage, done, total, unit, detail, resumed_from))


Compute = Callable[[StageContext], StageOutcome]


def run_stage(
    request: StageRequest, compute: Compute, stop: StopRequest | None = None
) -> StageResult:
    """Return a stage's result: the one that is there, or a new one.

    Of two processes that ask for the same key at once, one computes and the other waits.

    Raises:
        Stopped: If `stop` was requested; the state is saved.
        OutputsError: If the disk is full.
        ConfigError: If W&B is to be online without a key.
        Exception: What `compute` raises.
    """
    # Not `or`: a request that nobody has made yet is false.
    stop = StopRequest() if stop is None else stop
    with (
        stage_files.full_disk_explained(request.outputs),
        locked(attempts.lock_path(request), what=request.title, give_up=lambda: bool(stop)),
    ):
        found = attempts.begin(request)
        if found:
            return found
        started = time.monotonic()
        with Tracking(request) as tracking:
            outcome = compute(StageContext(request, stop))
            result = _finish(request, outcome, seconds=time.monotonic() - started)
            tracking.done()
        if request.stage != "pretrain":  # its last checkpoint is worth its place on the disk
            shutil.rmtree(request.directory / stage_files.CHECKPOINTS, ignore_errors=True)
        return result


def main(compute: Compute, arguments: Sequence[str] | None = None) -> int:
    """Run a stage in this process, from the `config.yaml` in its directory.

    Returns:
        The exit status: 0 done, 2 a user's mistake, 75 stopped and saved, 1 anything else.
    """
    parser = argparse.ArgumentParser(description="Run one stage from its directory.")
    parser.add_argument("directory", type=Path, help="holds the config.yaml of the stage")
    parser.add_argument("--events", action="store_true", help="write JSON lines for a parent")
    parser.add_argument("--parent", type=int, help="process to end with, once the state is saved")
    options = parser.parse_args(arguments)
    _log_to_stdout(events=options.events)
    stop = StopRequest()
    emit = _emit if options.events else lambda **event: None
    try:
        with progress.listening(lambda item: emit(progress=astuple(item))):
            request = store.read_config(options.directory)
            if STAGES[request.stage].resumes:
                stop.listen(parent=options.parent)
            else:  # nothing to save, nothing to wait for
                end_with(options.parent)
            result = run_stage(request, compute, stop)
    except (Stopped, InterruptedError) as stopped:
        logger.info("%s", stopped)
        return EXIT_RESUME
    except USER_ERRORS as error:
        emit(error={"type": type(error).__name__, "message": str(error)})
        if not options.events:
            logger.error("%s", error)
        return EXIT_USER_ERROR
    except DownloadError as error:  # a server's, which no traceback explains
        emit(error={"type": type(error).__name__, "message": str(error)})
        if not options.events:
            logger.error("%s", error)
        return 1
    except Exception as error:
        emit(error={"type": type(error).__name__, "message": str(error)})
        traceback.print_exc()
        return 1
    emit(result=result.model_dump(mode="json"))
    logger.info("%s is %s: %s", request.title, result.status, result.directory)
    return 0


def _finish(request: StageRequest, outcome: StageOutcome, *, seconds: float) -> StageResult:
    # Before the result that vouches for them, and before the checkpoints go.
    stage_files.sync_files(request.directory, outcome.made)
    files = stage_files.record_files(request.directory, list(outcome.made))
    digest = outcome.digest or stage_files.digest_of(
        {
            "scores": outcome.scores,
            "files": {name: record.sha256 for name, record in files.items()},
        }
    )
    status: Literal["computed", "resumed"] = (
        "computed" if outcome.resumed_from is None else "resumed"
    )
    result = StageResult(
        stage=request.stage,
        key=request.key,
        directory=request.directory,
        status=status,
        wall_seconds=outcome.wall_seconds_before + seconds,
        digest=digest,
        scores=outcome.scores,
        timing=outcome.timing,
        inputs={role: item.digest for role, item in request.inputs.items()},
        files=files,
        environment=describe_environment(),
    )
    content = result.model_dump_json(indent=1).encode()
    store.write_atomically(request.directory / "result.json", content)
    return result


def describe_environment() -> dict[str, Any]:
    """Return commit, versions, hardware and time, for the record."""
    packages = ("torch", "torchvision", "transformers", "datasets", "numpy")
    commit = describe_commit()
    return {
        **({"commit": commit} if commit else {}),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
        **hardware.describe(),
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _emit(**event: Any) -> None:
    try:
        sys.stdout.write(json.dumps(event) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:  # the parent died; the stage saves its state before it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _EventHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _emit(log=[record.levelno, record.name, record.getMessage()])


def _log_to_stdout(*, events: bool) -> None:
    handler: logging.Handler = _EventHandler() if events else logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    for name in ("training", "models", "data"):
        logging.getLogger(name).setLevel(logging.INFO)
    logging.getLogger().addHandler(handler)
