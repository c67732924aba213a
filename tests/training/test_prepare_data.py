"""Preparation as a stage: stopped between two images, it goes on from its finished parts."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data import prepare as preparing
from data.prepared import verify
from data.shards import file_sha256
from training import attempts, prepare_data, store
from training.configure import validate
from training.runner import StageContext, StageOutcome, run_stage
from training.settings import Settings, merge
from training.stages import STAGES
from training.stopping import StopRequest
from training.store import StageRequest

StopAfter = Callable[[int], StopRequest]


def request(settings: Settings, outputs: Path) -> StageRequest:
    return store.make_request(STAGES["prepare_data"], settings, outputs, {})


def test_stopped_and_typed_again_it_makes_the_same_images(
    stop_after: StopAfter, tiny_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """81 images in parts of 16."""
    monkeypatch.setattr(preparing, "SHARD_IMAGES", 16)
    whole = run_stage(request(tiny_settings, tmp_path / "whole"), prepare_data.compute)
    cut = request(tiny_settings, tmp_path / "cut")
    with pytest.raises(InterruptedError, match="of 81 images; finished parts are kept"):
        run_stage(cut, prepare_data.compute, stop_after(40))
    kept = {path: path.stat().st_mtime_ns for path in cut.directory.glob("*.npy")}
    assert len(kept) == 2
    assert store.inspect(cut).state == "missing"
    again = run_stage(cut, prepare_data.compute)
    assert again.digest == whole.digest
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "not written a second time"


@pytest.fixture
def pixels_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the shards whose pixels are hashed to see whether they can be kept."""
    names: list[str] = []

    def hashed(path: Path) -> str:
        names.append(path.name)
        return file_sha256(path)

    monkeypatch.setattr(preparing, "SHARD_IMAGES", 16)
    monkeypatch.setattr(preparing, "file_sha256", hashed)
    return names


def test_stopped_while_copies_are_counted_it_goes_on_without_reading_the_pixels(
    tiny_settings: Settings, tmp_path: Path, pixels_read: list[str]
) -> None:
    wanted = request(tiny_settings, tmp_path)

    class OnceFinished(StopRequest):
        def __bool__(self) -> bool:
            return (wanted.directory / "manifest.json").exists()

    with pytest.raises(InterruptedError, match="looking for copies"):
        run_stage(wanted, prepare_data.compute, OnceFinished())
    assert run_stage(wanted, prepare_data.compute).status == "computed"
    assert pixels_read == []


def test_after_damage_every_part_is_read_also_where_the_repair_was_stopped(
    stop_after: StopAfter, tiny_settings: Settings, tmp_path: Path, pixels_read: list[str]
) -> None:
    """One part is gone, which is seen; of another one a byte has changed, and not its time."""
    wanted = request(tiny_settings, tmp_path)
    whole = run_stage(wanted, prepare_data.compute)
    (wanted.directory / "train-00002.npy").unlink()
    path = wanted.directory / "train-00001.npy"
    status = path.stat()
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(InterruptedError):
        run_stage(wanted, prepare_data.compute, stop_after(3))
    pixels_read.clear()
    assert run_stage(wanted, prepare_data.compute).digest == whole.digest
    assert {"train-00000.npy", "train-00001.npy", "test-00000.npy"} <= set(pixels_read)
    assert verify(wanted.directory, full=True) is None
    assert not (wanted.directory / attempts.DOUBTED).exists()


def test_the_format_that_is_set_is_stored(tiny_settings: Settings, tmp_path: Path) -> None:
    settings = validate(
        merge(tiny_settings.model_dump(), {"data": {"format": "jpeg", "crop_margin": 0.0}})
    )
    wanted = request(settings, tmp_path)
    run_stage(wanted, prepare_data.compute)
    assert {path.suffix for path in wanted.directory.glob("train-*")} == {".jpegs", ".json"}
    assert store.inspect(wanted).state == "cached"


def test_of_two_at_once_one_prepares_and_the_other_takes_what_it_made(
    tiny_settings: Settings, tmp_path: Path
) -> None:
    wanted = request(tiny_settings, tmp_path)
    computed: list[str] = []

    def compute(context: StageContext) -> StageOutcome:
        computed.append(threading.current_thread().name)
        return prepare_data.compute(context)

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda _: run_stage(wanted, compute), range(2)))
    assert len(computed) == 1
    assert sorted(result.status for result in results) == ["cached", "computed"]
    assert results[0].digest == results[1].digest
