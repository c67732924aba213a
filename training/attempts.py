"""The beginning of an attempt at a stage: what is kept of earlier ones, and what is taken away."""

import logging
import shutil
from contextlib import suppress
from pathlib import Path

from data.claims import Claims
from training import remote_outputs
from training.lock import locked
from training.stage_files import CHECKPOINTS, HARDWARE, KEEP_TOKENS, TRACKING, newest_step
from training.stages import STAGES
from training.store import (
    StageRequest,
    StageResult,
    Verdict,
    inspect,
    write_config,
)

logger = logging.getLogger(__name__)

DOUBTED = "result.json.doubted"
"""The result of a preparation that did not verify, until all that it vouched for has been read."""


def begin(request: StageRequest) -> StageResult | None:
    """Return the result if it is there, else make the stage's directory ready to compute in.

    What must not be built on is taken away: a damaged result, or work on inputs that have been
    replaced since. Call it while holding the lock at `lock_path`.
    """
    verdict = inspect(request)
    if verdict.result:
        return verdict.result
    if verdict.stale:
        _clear(request, verdict)
    request.directory.mkdir(parents=True, exist_ok=True)
    write_config(request)
    return None


def begin_or_help(request: StageRequest) -> StageResult | None:
    """Do what `begin` does, once nobody computes the stage or at least help with it is wanted.

    Returns:
        The result if it is there; none where a process of the stage is to compute it, or to help.
    """
    wanted = Claims(request.directory).plan
    try:
        with locked(lock_path(request), what=request.title, give_up=lambda: wanted() is not None):
            return begin(request)
    except InterruptedError:
        # Of settings that are not in the key, such as threads, each process has its own. Whoever
        # computes the stage has read its config long ago: it invited others after that.
        write_config(request)
        return None


def lock_path(request: StageRequest) -> Path:
    """Return the file to lock while a stage is computed; apart from what may be deleted."""
    return request.outputs / "locks" / f"{request.directory.parent.name}-{request.key}.lock"


def refresh(request: StageRequest, run_id: str) -> None:
    """Remove what there is for a request, checkpoints included, once nobody computes it.

    Once per flow run, so that a run which is started again goes on instead of beginning anew; and
    where an earlier refresh was interrupted, its work is kept too.

    Args:
        request: What is to be computed again.
        run_id: Of the flow run, the same in all attempts at it.
    """
    with (
        remote_outputs.alone_with(request),
        locked(lock_path(request), what=request.title),
    ):
        before = remote_outputs.refreshed_by(request)
        if before == run_id:
            return
        step = newest_step(request.directory) or remote_outputs.newest_step(request)
        if before and step is not None and not (request.directory / "result.json").is_file():
            logger.warning(
                "%s goes on at step %d of the refresh that was interrupted. To begin it anew, "
                "delete %s.",
                request.title,
                step,
                request.directory,
            )
        else:
            Claims(request.directory).end()  # those who helped one that was killed write there
            remote_outputs.forget(request)
            shutil.rmtree(request.directory, ignore_errors=True)
        # Last: cut off before this, the next attempt removes what is not there.
        remote_outputs.note_refresh(request, run_id)


def progress_on_disk(request: StageRequest) -> int:
    """Return how far an unfinished stage came: a number that grows from attempt to attempt.

    Of a training the step of its newest checkpoint, of any other stage the bytes that it wrote,
    without the `config.yaml` that every attempt begins with.
    """
    if STAGES[request.stage].trains:
        return newest_step(request.directory) or 0
    written = 0
    for path in request.directory.rglob("*"):
        if path == request.directory / "config.yaml":
            continue
        with suppress(OSError):  # another process may be at work here
            written += path.stat().st_size if path.is_file() else 0
    return written


def _clear(request: StageRequest, verdict: Verdict) -> None:
    directory = request.directory
    logger.warning("%s is computed again: %s.", request.title, verdict.why)
    if request.stage.startswith("download"):
        (directory / "result.json").unlink(missing_ok=True)  # sound files are kept
        return
    if request.stage.startswith("prepare"):  # sound shards are kept, once they have been read
        with suppress(FileNotFoundError):
            (directory / "result.json").replace(directory / DOUBTED)
        return
    # A sound checkpoint of the same inputs leads to the same bytes in less time.
    kept = {HARDWARE, KEEP_TOKENS}
    if verdict.stale == "damaged":
        kept |= {"metrics.jsonl", "resumes.json", CHECKPOINTS, TRACKING}
    # Cut off anywhere, what is left must not pass for more than it is: the result goes first, and
    # last the config, which says what the checkpoints were built on.
    (directory / "result.json").unlink(missing_ok=True)
    for path in sorted(directory.iterdir(), key=lambda path: path.name == "config.yaml"):
        if path.name in kept:
            continue
        if path.is_dir():
            # The process of an earlier attempt may still be writing into TRACKING.
            shutil.rmtree(path, ignore_errors=path.name == TRACKING)
        else:
            path.unlink()
