"""Preparation as a stage: stopped between two images, it goes on from its finished parts."""

from pathlib import Path

import pytest

from data import prepare as preparing
from training import prepare_data, store
from training.runner import run_stage
from training.settings import Settings
from training.stages import STAGES
from training.stopping import StopRequest
from training.store import StageRequest


class StopAfter(StopRequest):
    def __init__(self, times: int) -> None:
        super().__init__()
        self.left = times

    def __bool__(self) -> bool:
        self.left -= 1
        return self.left < 0


def request(settings: Settings, outputs: Path) -> StageRequest:
    return store.make_request(STAGES["prepare_data"], settings, outputs, {})


def test_stopped_and_typed_again_it_makes_the_same_images(
    tiny_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """81 images in parts of 16."""
    monkeypatch.setattr(preparing, "SHARD_IMAGES", 16)
    whole = run_stage(request(tiny_settings, tmp_path / "whole"), prepare_data.compute)
    cut = request(tiny_settings, tmp_path / "cut")
    with pytest.raises(InterruptedError, match="of 81 images; finished parts are kept"):
        run_stage(cut, prepare_data.compute, StopAfter(40))
    kept = {path: path.stat().st_mtime_ns for path in cut.directory.glob("*.npy")}
    assert len(kept) == 2
    assert store.inspect(cut).state == "missing"
    again = run_stage(cut, prepare_data.compute)
    assert again.digest == whole.digest
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "not written a second time"
