"""Where metrics go: `metrics.jsonl` always, Weights & Biases where it is wanted.

The only module that imports wandb, and only where it is used. Nothing that W&B does can fail or
hold up training for more than its time-outs.
"""

import json
import logging
import math
import netrc
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from training.settings import ConfigError, TrackingSettings

if TYPE_CHECKING:  # settings are checked against this module before torch is needed
    from training.runner import StageContext

logger = logging.getLogger(__name__)

PROJECTS = {"feature_analysis": "vit-feature-analysis"}
"""W&B project by stage; the others go to `PROJECT`."""

PROJECT = "vit-self-supervised-rotation"

METRICS = "metrics.jsonl"
"""File of a stage's metrics, one JSON object a line."""

_TIMEOUT_SECONDS = 10


class Tracker:
    """Writes one line per logged step; a resumed run loses none and doubles none.

    Use as a context manager. `position` is saved in every checkpoint and handed back on resume.
    """

    def __init__(self, context: "StageContext", *, position: int | None) -> None:
        self._path = context.directory / METRICS
        self._path.touch()
        size = self._path.stat().st_size
        if position is not None and size < position:
            logger.warning(
                "%s has %d bytes, the checkpoint counted %d: lines of earlier steps are lost.",
                self._path,
                size,
                position,
            )
        # Lines after the checkpoint belong to steps that are taken again.
        self._length = min(position or 0, size)
        os.truncate(self._path, self._length)
        self._file = self._path.open("ab", buffering=0)
        self._pending = b""
        """Lines for which there is no space on the disk yet."""
        self._waits = False
        self._wandb = open_wandb(context)

    def log(self, metrics: Mapping[str, float], *, step: int, epoch: float) -> None:
        """Record metrics of a step (counted from 1), at that many epochs."""
        # JSON has no nan.
        finite = {name: v if math.isfinite(v) else None for name, v in metrics.items()}
        row = {"step": step, "epoch": round(epoch, 6), **finite}
        self._pending += json.dumps(row).encode() + b"\n"
        with suppress(OSError):  # training goes on, and tries again with the next line
            self._write()
        if self._wandb is not None:
            try:
                self._wandb.log({"epoch": epoch, **metrics}, step=step)
            except Exception as error:  # whatever the service does, training goes on
                logger.warning("W&B does not take metrics any more: %s", error)
                self._wandb = None

    def position(self) -> int:
        """Return the length of the file in bytes, with all of it on disk.

        Raises:
            OSError: If lines cannot be written; they are kept, and tried again.
        """
        self._write()
        os.fsync(self._file.fileno())
        return self._length

    def _write(self) -> None:
        try:
            while self._pending:
                written = self._file.write(self._pending)
                self._length += written
                self._pending = self._pending[written:]
        except OSError as error:
            if not self._waits:
                logger.warning("Metrics cannot be written, they wait for better times: %s", error)
            self._waits = True
            raise
        self._waits = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with suppress(OSError):
            self._write()
        self._file.close()
        if self._wandb is not None:
            try:
                self._wandb.finish(exit_code=0 if kind is None else 1)
            except Exception as problem:  # as above
                logger.warning("W&B run could not be finished: %s", problem)


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """Return the rows of a stage's `metrics.jsonl`; none where it has not got one."""
    path = directory / METRICS
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue  # a line that a power cut left unfinished
    return rows


def open_wandb(context: "StageContext") -> Any:
    """Start or continue the W&B run of a stage; None where W&B is not wanted or not to be had."""
    tracking = context.settings.tracking
    mode = wandb_mode(tracking)
    if mode == "disabled":
        return None
    request = context.request
    try:
        import wandb

        return wandb.init(
            project=PROJECTS.get(request.stage, PROJECT),
            entity=tracking.wandb_entity or os.environ.get("WANDB_ENTITY"),
            group=request.run or None,
            name=request.stage,
            id=f"{request.stage}-{request.key}",  # a resumed stage continues its run
            resume="allow",
            mode="offline" if mode == "offline" else "online",
            dir=str(context.directory),
            config=request.reads,
            settings=wandb.Settings(init_timeout=_TIMEOUT_SECONDS, silent=True),
        )
    except Exception as error:  # an unreachable service must not cost a run
        logger.warning("W&B cannot be used, metrics go to metrics.jsonl only: %s", error)
        return None


def wandb_mode(tracking: TrackingSettings) -> str:
    """Return `online`, `offline` or `disabled`.

    Raises:
        ConfigError: If `tracking.wandb` is `online` and no key is found.
    """
    if tracking.wandb in {"offline", "disabled"}:
        return tracking.wandb
    if _has_key():
        return "online"
    if tracking.wandb == "online":
        raise ConfigError(
            "tracking.wandb=online needs a key, and none was found. Set WANDB_API_KEY or run "
            "`wandb login`, or set tracking.wandb=offline."
        )
    return "disabled"


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return netrc.netrc(path).authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
