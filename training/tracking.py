"""Weights & Biases: one run per stage, told by a process of its own beside the stage.

`python -m training.tracking DIRECTORY MODE PID`. It reads what the stage writes anyway
(`config.yaml`, `metrics.jsonl`, `result.json`), so what W&B missed while it was away is sent later.
The only module that imports wandb.
"""

import json
import logging
import os
import re
import secrets
import signal
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.specs import without_secrets
from training import attempts, store
from training.lock import locked
from training.metrics_file import MetricsTail
from training.stage_files import TRACKING
from training.store import StageRequest, StageResult
from training.wandb_key import find_key
from training.wandb_process import DONE

if TYPE_CHECKING:
    import wandb

PROJECTS = {"feature_analysis": "vit-feature-analysis"}
"""W&B project by stage; the others go to `PROJECT`."""

PROJECT = "vit-self-supervised-rotation"

INIT_SECONDS = 30.0
"""Longest time that opening a run takes; the stage does not wait for it."""

REQUEST_SECONDS = 20.0
"""Longest time that a request may take before it is made again."""

RETRY_SECONDS = 60.0
"""Time between two tries to open a run."""

READ_EVERY_SECONDS = 1.0
"""Time between two looks at the metrics."""


def artifact_name(request: StageRequest) -> str:
    """Return the name of a stage's artifact in W&B: that of the stage, and of the variant."""
    return re.sub(r"[^\w.-]+", "-", request.title)


class _Ending:
    """How the stage ended, as the process hears it. From then on its own time is limited."""

    def __init__(self, directory: str, background_seconds: float) -> None:
        self.is_done = False
        self.seconds = background_seconds
        self._directory = directory
        self._heard = threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()

    def wait(self, seconds: float) -> bool:
        """Wait for it that long; return whether it has come."""
        return self._heard.wait(seconds)

    def _listen(self) -> None:
        self.is_done = sys.stdin.buffer.readline() == DONE
        self._heard.set()
        time.sleep(self.seconds)
        _say_what_lacks(self._directory, f"it has not taken all in {self.seconds:g} s")
        os._exit(1)  # whatever wandb waits for


class _Note:
    """Which W&B run is the stage's, and the last step that it was told, for a resumed stage.

    The id has a random part: others may compute the same key, and W&B takes no id again whose run
    was deleted.
    """

    def __init__(self, request: StageRequest) -> None:
        self._path = request.directory / TRACKING / "run.json"
        try:
            found = json.loads(self._path.read_bytes())
            self.run_id, self.told = str(found["id"]), int(found["step"])
        except (OSError, ValueError, KeyError):
            self.run_id = f"{request.stage}-{request.key}-{secrets.token_hex(3)}"
            self.write(told=-1)

    def write(self, told: int) -> None:
        self.told = told
        content = json.dumps({"id": self.run_id, "step": told}).encode()
        store.write_atomically(self._path, content)


class _History:
    """Rows of the metrics file on their way to W&B: each step once, and whole.

    Steps that a resume takes again are left out. The newest step waits for the next one, as an
    evaluation may belong to it too; where the stage ends early, it is left to the resume.
    """

    def __init__(self, run: "wandb.Run", told: int) -> None:
        self.told = told
        self._run, self._step, self._row = run, told, dict[str, Any]()

    def add(self, row: Mapping[str, Any]) -> None:
        step = row["step"]
        if step > self._step:
            self.flush()
            self._step = step
        if step == self._step > self.told:
            self._row |= {name: value for name, value in row.items() if value is not None}

    def flush(self) -> None:
        if self._row:
            self._run.log(self._row, step=self._step, commit=True)
            self.told, self._row = self._step, {}


def main(directory: str, mode: str, training: str, background_seconds: str) -> int:
    """Tell W&B about the stage of a directory until it ends.

    Args:
        directory: The stage's.
        mode: `online` or `offline`.
        training: Process whose use of the machine is shown.
        background_seconds: Longest time that this process outlives it.

    Returns:
        The exit status: 0 where W&B, or a file for it, has everything.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):  # the stage hears them too, and ends
        signal.signal(number, signal.SIG_IGN)
    ending = _Ending(directory, float(background_seconds))
    try:
        request = store.read_config(Path(directory))
        # The process of an earlier attempt may still be sending.
        with locked(attempts.lock_path(request).with_suffix(".wandb"), what=request.title):
            _tell(request, mode, int(training), ending)
    except Exception as error:
        _say_what_lacks(directory, error)
        return 1
    return 0


def _tell(request: StageRequest, mode: str, training: int, ending: _Ending) -> None:
    is_overtaken = ending.wait(0) and not ending.is_done
    if is_overtaken and (request.directory / "result.json").is_file():
        return  # a later attempt at the stage has told all, and how it ended
    note = _Note(request)
    run = _open(request, mode, training, ending, note)
    if run.url:
        _say(logging.INFO, f"{request.title} in W&B: {run.url}")
    # Online, W&B knows best: what was on its way when an earlier attempt died may be lost.
    history = _History(run, note.told if run.offline else run.starting_step - 1)
    tail = MetricsTail(request.directory)
    is_over = False
    while not is_over:
        is_over = ending.wait(READ_EVERY_SECONDS)  # before reading, so that nothing is missed
        for row in tail.new_rows():
            history.add(row)
        if history.told > note.told:
            note.write(history.told)
    if ending.is_done:
        _conclude(run, request, history)
        note.write(history.told)
    run.finish(exit_code=0 if ending.is_done else 1)


def _open(
    request: StageRequest, mode: str, training: int, ending: _Ending, note: _Note
) -> "wandb.Run":
    """Open the run, as soon as it can be; raise what was in the way when the stage has ended."""
    is_warned = False
    while True:
        try:
            return _init(request, mode, training, note, ending.seconds)
        except Exception as error:
            if mode == "offline" or ending.wait(0):
                raise
            if not is_warned:
                _say(
                    logging.WARNING,
                    f"W&B cannot be used; {request.title} goes on without, and W&B is tried again "
                    f"every {RETRY_SECONDS:g} s: {error}",
                )
            is_warned = True
            ending.wait(RETRY_SECONDS)
            _start_afresh()


def _start_afresh() -> None:
    """End wandb's service, which takes a run that it could not open for one in use."""
    import wandb

    wandb.teardown()


def _init(
    request: StageRequest, mode: str, training: int, note: _Note, background_seconds: float
) -> "wandb.Run":
    import wandb

    settings = request.settings
    return wandb.init(
        project=PROJECTS.get(request.stage, PROJECT),
        entity=settings.tracking.wandb_entity or os.environ.get("WANDB_ENTITY"),
        group=request.run or None,
        job_type=request.stage,
        name=request.title,
        id=note.run_id,
        resume="allow" if mode == "online" else None,
        mode="offline" if mode == "offline" else "online",
        dir=request.directory,
        config={
            "stage": request.stage,
            "key": request.key,
            "run": request.run,
            "preset": settings.preset,
            "data.source": without_secrets(settings.data.source),
            "transfer.source": without_secrets(settings.transfer_source[0]),
            **request.reads,
        },
        settings=wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            init_timeout=INIT_SECONDS,
            finish_timeout=background_seconds - 10,
            finish_timeout_raises=True,
            x_graphql_timeout_seconds=REQUEST_SECONDS,
            x_file_stream_timeout_seconds=REQUEST_SECONDS,
            x_file_stream_retry_max=10_000,  # of a minute each: a service that is away for days
            x_stats_pid=training,
        ),
    )


def _conclude(run: "wandb.Run", request: StageRequest, history: _History) -> None:
    """Send the scores, and what the stage made as an artifact."""
    import wandb

    content = (request.directory / "result.json").read_bytes()
    result = StageResult.model_validate_json(content)
    for layer in result.scores.get("layers", ()):  # of the feature analysis, which has no steps
        history.add({"step": layer["layer"], **layer})
    for point in result.scores.get("points", ()):  # of the curve over labels
        history.add({"step": point["labels"], **point})
    history.flush()
    plain = {k: v for k, v in result.scores.items() if isinstance(v, int | float | str)}
    for reading in result.scores.get("readings", ()):  # of the linear probe
        plain[f"readings/{reading['name']}"] = reading["top1"]
    run.summary.update({**plain, **result.timing, "wall_seconds": result.wall_seconds})
    if result.files:
        kind = "report" if request.stage == "report" else "model"
        artifact = wandb.Artifact(artifact_name(request), type=kind, metadata=plain)
        for name in result.files:
            path = str(request.directory / name)
            # The stage's files stay as they are: no copies are needed.
            artifact.add_file(path, name, skip_cache=True, policy="immutable")
        run.log_artifact(artifact, aliases=["latest", request.key])


def _say_what_lacks(directory: str, why: object) -> None:
    _say(logging.WARNING, f"W&B does not know all about {directory} yet: {why}")


def _say(level: int, text: str) -> None:
    """Tell the stage; it logs the line, if it is still there."""
    if key := find_key():
        text = text.replace(key, "…")
    with suppress(OSError):
        os.write(sys.stdout.fileno(), f"{level} {' '.join(text.split())}\n".encode())


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
