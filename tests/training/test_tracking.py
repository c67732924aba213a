import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from training import store
from training.runner import StageContext
from training.settings import TrackingSettings, merge, validate
from training.stages import STAGES
from training.stopping import StopRequest
from training.store import StageResult
from training.tracking import Tracker, wandb_mode

ContextOf = Callable[..., StageContext]


@pytest.fixture
def context_of(tmp_path: Path, tiny_values: dict[str, Any]) -> ContextOf:
    def build(wandb: str = "disabled") -> StageContext:
        settings = validate(merge(tiny_values, {"tracking": {"wandb": wandb}}))
        data = StageResult(
            stage="prepare_data",
            key="k",
            directory=tmp_path,
            status="computed",
            wall_seconds=1,
            digest="d",
            scores={},
        )
        request = store.make_request(
            STAGES["pretrain"], settings, tmp_path, {"prepare_data": data}, "a-run"
        )
        request.directory.mkdir(parents=True, exist_ok=True)
        return StageContext(request, StopRequest())

    return build


def steps(context: StageContext) -> list[int]:
    lines = (context.directory / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def test_a_resume_takes_back_the_lines_after_the_checkpoint(context_of: ContextOf) -> None:
    context = context_of()
    with Tracker(context, position=None) as tracker:
        tracker.log({"train/loss": 1.0}, step=1, epoch=0.5)
        tracker.log({"train/loss": 0.9}, step=2, epoch=1.0)
        position = tracker.position()
        tracker.log({"train/loss": 0.8}, step=3, epoch=1.5)
    with Tracker(context, position=position) as tracker:
        tracker.log({"train/loss": 0.8}, step=3, epoch=1.5)
    assert steps(context) == [1, 2, 3]


def test_a_fresh_start_keeps_no_old_lines(context_of: ContextOf) -> None:
    context = context_of()
    for _ in range(2):
        with Tracker(context, position=None) as tracker:
            tracker.log({"train/loss": 1.0}, step=1, epoch=1.0)
    assert steps(context) == [1]


def test_lines_wait_for_space_on_a_full_disk_and_none_is_lost(
    context_of: ContextOf, caplog: pytest.LogCaptureFixture
) -> None:
    context = context_of()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Tracker(context, position=None) as tracker:
        tracker.log({"train/loss": 1.0}, step=1, epoch=0.25)
        try:  # room for half a line more
            size = (context.directory / "metrics.jsonl").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, before[1]))
            tracker.log({"train/loss": 1.0}, step=2, epoch=0.5)
            tracker.log({"train/loss": 1.0}, step=3, epoch=0.75)
            with pytest.raises(OSError, match="too large"):
                tracker.position()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert caplog.text.count("wait for better times") == 1
        tracker.log({"train/loss": 1.0}, step=4, epoch=1.0)
        assert steps(context) == [1, 2, 3, 4]
        assert tracker.position() == (context.directory / "metrics.jsonl").stat().st_size


def test_a_file_shorter_than_the_checkpoint_says_is_told(
    context_of: ContextOf, caplog: pytest.LogCaptureFixture
) -> None:
    context = context_of()
    with Tracker(context, position=None) as tracker:
        tracker.log({"train/loss": 1.0}, step=1, epoch=1.0)
        position = tracker.position()
    os.truncate(context.directory / "metrics.jsonl", 10)
    with Tracker(context, position=position):
        assert f"has 10 bytes, the checkpoint counted {position}" in caplog.text


def test_auto_is_online_with_a_key_and_off_without(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert wandb_mode(TrackingSettings()) == "disabled"
    monkeypatch.setenv("WANDB_API_KEY", "k")
    assert wandb_mode(TrackingSettings()) == "online"
    monkeypatch.delenv("WANDB_API_KEY")
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password k\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert wandb_mode(TrackingSettings()) == "online"
    assert wandb_mode(TrackingSettings(wandb="disabled")) == "disabled"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:wandb")
def test_offline_keeps_the_run_for_a_later_upload(context_of: ContextOf) -> None:
    context = context_of("offline")
    with Tracker(context, position=None) as tracker:
        tracker.log({"train/loss": 1.0}, step=1, epoch=1.0)
        position = tracker.position()
    with Tracker(context, position=position) as tracker:  # a resume continues the same run
        tracker.log({"train/loss": 0.5}, step=2, epoch=2.0)
    runs = list((context.directory / "wandb").glob("offline-run-*"))
    assert len(runs) == 2
    for run in runs:
        assert run.name.endswith(f"pretrain-{context.request.key}")
        (records,) = run.glob("*.wandb")
        assert b"train/loss" in records.read_bytes()
