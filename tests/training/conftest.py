"""What tests of stages need: results that no stage has computed, a stage that takes no time."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from training import store
from training.configure import validate
from training.runner import Compute, StageContext, StageOutcome
from training.settings import Settings, merge
from training.stages import STAGES
from training.store import StageRequest, StageResult

Made = Callable[..., StageResult]
Request = Callable[..., StageRequest]


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


@pytest.fixture
def request_pretrain(tmp_path: Path, tiny_values: dict[str, Any], made: Made) -> Request:
    """Build the request of `pretrain`, with changed settings or other input data."""

    def build(changes: dict[str, Any] | None = None, *, data_digest: str = "d") -> StageRequest:
        settings: Settings = validate(merge(tiny_values, changes or {}))
        data = made("prepare_data", tmp_path / "prepared", digest=data_digest)
        return store.make_request(
            STAGES["pretrain"], settings, tmp_path / "outputs", {"prepare_data": data}
        )

    return build


@pytest.fixture
def compute() -> Compute:
    """Compute next to nothing, as a stage: a folder `model` with ten bytes."""

    def write(context: StageContext) -> StageOutcome:
        (context.directory / "model").mkdir(exist_ok=True)
        (context.directory / "model" / "weights").write_bytes(b"0123456789")
        return StageOutcome(scores={"top1": 0.5}, made=["model"])

    return write
