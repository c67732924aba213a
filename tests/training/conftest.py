"""What several tests of stages need: a result that no stage has computed."""

from collections.abc import Callable
from pathlib import Path

import pytest

from training.store import StageResult

Made = Callable[..., StageResult]


@pytest.fixture
def made() -> Made:
    """Make the result of a stage: `(stage, directory, key=..., digest=...)`."""

    def make(stage: str, directory: Path, *, key: str = "k", digest: str = "d") -> StageResult:
        return StageResult(
            stage=stage,
            key=key,
            directory=directory,
            status="computed",
            wall_seconds=1.0,
            digest=digest,
            scores={},
        )

    return make
