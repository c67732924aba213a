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
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import astuple, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from torch import nn

from data.patience import DownloadError
from training import attempts, data_parallel, hardware, launching, progress, stage_files, store
from training.commit import describe_commit
from training.data_parallel import ALONE, PeerError, Team, TeamError
from training.errors import EXIT_USER_ERROR, USER_ERRORS
from training.lock import locked
from training.settings import Settings
from training.stages import STAGES, Stage
from training.stopping import EXIT_RESUME, Stopped, StopRequest, end_with
from training.store import StageRequest, StageResult
from training.wandb_process import Tracking

logger = logging.getLogger(__name__)


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
    team: Team = ALONE
    """The processes that compute it together."""
    _decided: list[hardware.Hardware] = field(
        default_factory=list, init=False, repr=False, compare=False
    )
    """What `hardware` returned at first: what there is to say about it is said once."""

    @property
    def settings(self) -> Settings:
        """All settings of the run; only those that the stage `reads` may change its result."""
        return self.request.settings

    @property
    def directory(self) -> Path:
        """Where the stage writes."""
        return self.request.directory

    def is_stopped(self) -> bool:
        """Whether somebody asks for an early end; for what waits for images, at any depth.

        Not where several processes divide the images: they end together, after a step (`Team`), as
        one that left by itself would leave the others waiting and the state unsaved.
        """
        return self.team.count == 1 and bool(self.stop)

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
                where nothing is trained. Those of the first call decide.
        """
        if self._decided:
            return self._decided[0]
        model = self.settings.model
        found = self.team.from_first(
            lambda: hardware.decide_once(
                self.directory,
                self.settings.hardware,
                operations=None if passes is None else passes * model.operations_per_image,
                processes=self.team.count,
            )
        )
        if not self.team.is_first:  # which has done so
            hardware.use_threads(found.threads)
        self._decided.append(found)
        return found

    def for_training(self, network: nn.Module) -> Callable[..., Any]:
        """Return what calls a network in a training step, in all processes that train it."""
        parallel = self.team.parallel(network)
        return self.hardware().for_training(parallel, cache=self.compile_cache)

    def progress(
        self, done: int, total: int, unit: str, detail: str = "", resumed_from: int = 0
    ) -> None:
        """Report how far the stage is."""
        if not self.team.is_first:
            return
        stage = self.request.title
        progress.report(progress.Progress(stage, done, total, unit, detail, resumed_from))


Compute = Callable[[StageContext], StageOutcome]

Helping = Callable[[StageContext], Callable[[], None]]
"""Returns what a process does, again and again, while it waits for another one that computes its
stage: a part of the work, as long as there is one to be had. It writes no result."""


def run_stage(
    request: StageRequest,
    compute: Compute,
    stop: StopRequest | None = None,
    team: Team = ALONE,
    helping: Helping | None = None,
) -> StageResult:
    """Return a stage's result: the one that is there, or a new one.

    Of two processes that ask for the same key at once, one computes; the other waits, and helps
    where it can.

    Args:
        request: For the stage.
        compute: What the stage computes.
        stop: Whether somebody asks for an early end.
        team: The processes that compute together, of which this one is the first; the others are in
            `help_with_stage`.
        helping: What to do while another process computes it; nothing where it cannot be shared.

    Raises:
        Stopped: If `stop` was requested; the state is saved.
        OutputsError: If the disk is full.
        ConfigError: If W&B is to be online without a key.
        Exception: What `compute` raises.
    """
    # Not `or`: a request that nobody has made yet is false.
    stop = StopRequest() if stop is None else stop
    meanwhile = helping(StageContext(request, stop)) if helping else None
    with (
        stage_files.full_disk_explained(request.outputs),
        _begun(request, stop, team, meanwhile) as found,
    ):
        if found:
            return found
        started = time.monotonic()
        with Tracking(request) as tracking:
            outcome = compute(StageContext(request, stop, team))
            result = _finish(request, outcome, seconds=time.monotonic() - started)
            tracking.done()
        if request.stage != "pretrain":  # its last checkpoint is worth its place on the disk
            shutil.rmtree(request.directory / stage_files.CHECKPOINTS, ignore_errors=True)
        return result


def help_with_stage(request: StageRequest, compute: Compute, stop: StopRequest, team: Team) -> None:
    """Compute a stage's part of a process that is not the first; see `run_stage`."""
    if team.may_begin(stop):
        compute(StageContext(request, stop, team))


@contextmanager
def _begun(
    request: StageRequest, stop: StopRequest, team: Team, meanwhile: Callable[[], None] | None
) -> Iterator[StageResult | None]:
    """Hold a stage's lock for the `with` block, and give the result that is there already."""
    with ExitStack() as held:
        begins = False
        try:
            held.enter_context(
                locked(
                    attempts.lock_path(request),
                    what=request.title,
                    give_up=lambda: team.is_asked_while_waiting(stop),
                    meanwhile=meanwhile,
                )
            )
            found = attempts.begin(request)
            begins = found is None
        finally:
            team.let_begin(begins)
        yield found


def main(
    compute: Compute, arguments: Sequence[str] | None = None, *, helping: Helping | None = None
) -> int:
    """Run a stage in this process, from the `config.yaml` in its directory.

    A stage that several processes can compute, and for which the settings ask for them, is run in
    these, under torch's elastic launcher. A process that the launcher has started, this one's or
    another, finds the others and runs its part; it ends here.

    Args:
        compute: What the stage computes.
        arguments: Of the command line; those of this process unless given.
        helping: See `run_stage`.

    Returns:
        The exit status: 0 done, 2 a user's mistake, 75 stopped and saved, 1 anything else.
    """
    parser = argparse.ArgumentParser(description="Run one stage from its directory.")
    parser.add_argument("directory", type=Path, help="holds the config.yaml of the stage")
    parser.add_argument("--events", action="store_true", help="write JSON lines for a parent")
    parser.add_argument("--parent", type=int, help="process to end with, once the state is saved")
    options = parser.parse_args(arguments)
    if not data_parallel.is_launched():
        _log_to_stdout(events=options.events)
        return _run(compute, options, helping)
    is_first = os.environ["RANK"] == "0"
    _log_to_stdout(events=options.events, level=logging.INFO if is_first else logging.ERROR)
    code = _run(compute, options, helping)
    # Without waiting for anything: a backend may wait for processes that are gone.
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)


def _run(compute: Compute, options: argparse.Namespace, helping: Helping | None) -> int:
    stop = StopRequest()
    emit = _emit if options.events else lambda **event: None
    try:
        with progress.listening(lambda item: emit(progress=astuple(item))):
            request = store.read_config(options.directory)
            stage, parent = STAGES[request.stage], options.parent
            recipe = getattr(request.settings, stage.recipe) if stage.recipe else None
            if data_parallel.is_launched():
                parent = os.getppid()  # the launcher, which ends when ours does
            elif stage.takes_processes:
                count = hardware.choose_processes(request.settings.hardware, recipe)
                if count > 1:
                    return _launch(stage, options, count, emit)
            if stage.resumes:
                stop.listen(parent=parent, passed_on=data_parallel.is_launched())
            else:  # nothing to save, nothing to wait for
                end_with(parent)
            team = ALONE
            if stage.takes_processes and data_parallel.is_launched():
                team = data_parallel.join()
                if recipe:
                    hardware.check_processes(team.count, recipe)
            if not team.is_first:
                help_with_stage(request, compute, stop, team)
                return 0
            result = run_stage(request, compute, stop, team, helping)
    except (Stopped, InterruptedError) as stopped:
        logger.info("%s", stopped)
        return EXIT_RESUME
    except TeamError as error:
        logger.error("%s", error)
        if not isinstance(error, PeerError):  # or the other one says more
            emit(lost=str(error))
        return 1
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


def _launch(
    stage: Stage, options: argparse.Namespace, count: int, emit: Callable[..., None]
) -> int:
    def tell(message: str) -> None:
        emit(killed=message)
        if not options.events:
            logger.error("%s", message)

    return launching.launch(
        f"training.{stage.module_name}",
        [str(options.directory), *(["--events"] if options.events else [])],
        count,
        parent=options.parent,
        tell=tell,
    )


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


def _log_to_stdout(*, events: bool, level: int = logging.INFO) -> None:
    handler: logging.Handler = _EventHandler() if events else logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    for name in ("training", "models", "data"):
        logging.getLogger(name).setLevel(level)
    logging.getLogger().addHandler(handler)
