"""Where a training was interrupted and went on: a note beside its metrics, for the report."""

import json
import logging
from pathlib import Path
from typing import TypedDict

from training.store import write_atomically

logger = logging.getLogger(__name__)

RESUMES = "resumes.json"
"""File of a stage's resumes: a list, the first resume first."""


class Resume(TypedDict):
    """One resume: the step that training went on from, and that many epochs."""

    step: int
    epoch: float


def note_start(directory: Path, *, step: int, epoch: float) -> None:
    """Note that a training starts at a step; at 0 it begins anew.

    Resumes at or after that step are forgotten: what followed them is done again. A note that
    cannot be written costs a warning.

    Args:
        directory: Of the stage.
        step: Optimiser steps done so far.
        epoch: The same in epochs.
    """
    path = directory / RESUMES
    try:
        kept = [resume for resume in read_resumes(directory) if resume["step"] < step]
        if step:
            kept.append({"step": step, "epoch": round(epoch, 6)})
            write_atomically(path, json.dumps(kept).encode() + b"\n")
        else:
            path.unlink(missing_ok=True)
    except OSError as error:  # a full disk must not keep training from going on
        logger.warning("The resume at step %d is not noted for the report: %s", step, error)


def read_resumes(directory: Path) -> list[Resume]:
    """Return a stage's resumes by step; none where nothing, or nothing readable, was noted."""
    try:
        found = json.loads((directory / RESUMES).read_bytes())
        return [{"step": int(each["step"]), "epoch": float(each["epoch"])} for each in found]
    except (OSError, ValueError, TypeError, KeyError):
        return []
