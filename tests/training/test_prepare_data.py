"""Preparation as a stage: stopped anywhere it goes on, and several processes share its parts."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from data import prepare as preparing
from data.prepared import verify
from data.shards import file_sha256
from training import attempts, prepare_data, store
from training.configure import validate
from training.errors import EXIT_USER_ERROR
from training.runner import StageContext, StageOutcome, run_stage
from training.settings import Settings, merge
from training.stages import STAGES
from training.stopping import EXIT_RESUME, StopRequest
from training.store import StageRequest, StageResult

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
    # The damaged one was found to be so the first time, and is not looked at again.
    assert {"train-00000.npy", "train-00003.npy", "test-00000.npy"} <= set(pixels_read)
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


SHARDS = [*(f"train-{number:05d}" for number in range(8)), *(f"test-{n:05d}" for n in range(3))]
"""Of the 60 and 21 images of the tiny folder, in parts of 8."""


@dataclass(frozen=True)
class Together:
    """What several processes did that prepared one key."""

    codes: list[int]
    said: str
    wrote: list[list[str]]
    """Names of the shards, and `manifest`, that each process has written."""

    @property
    def everything(self) -> list[str]:
        return sorted(name for names in self.wrote for name in names)


class Forked:
    """The process that the others are forked from; see `forked_preparations`."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.training.forked_preparations"],
            cwd=Path(__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def prepare(self, wanted: StageRequest, count: int, **options: Any) -> Together:
        store.write_config(wanted)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([str(wanted.directory), count, options]) + "\n")
        self._process.stdin.flush()
        codes = json.loads(self._process.stdout.readline())
        wrote: list[list[str]] = [[] for _ in range(count)]
        lines = wanted.outputs / "wrote"
        for line in lines.read_text().splitlines() if lines.is_file() else []:
            index, name = line.split()
            wrote[int(index)].append(name)
        return Together(codes, (wanted.outputs / "said").read_text(), wrote)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture(scope="module")
def forked() -> Iterator[Forked]:
    found = Forked()
    yield found
    found.close()


def pixels(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("*.npy")}


@pytest.fixture
def alone(tiny_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StageResult:
    """What one process makes in parts of 8."""
    monkeypatch.setattr(preparing, "SHARD_IMAGES", 8)
    return run_stage(request(tiny_settings, tmp_path / "alone"), prepare_data.compute)


def assert_as_alone(wanted: StageRequest, alone: StageResult) -> None:
    result = store.inspect(wanted).result
    assert result is not None
    assert result.digest == alone.digest
    assert pixels(wanted.directory) == pixels(alone.directory)
    assert verify(wanted.directory, full=True) is None
    left = {
        path.name for path in wanted.directory.iterdir() if path.suffix not in (".npy", ".json")
    }
    assert left == {"config.yaml"}, "no claims, nothing half written"


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_processes_that_want_the_same_make_each_shard_once(
    forked: Forked, tiny_settings: Settings, tmp_path: Path, alone: StageResult, count: int
) -> None:
    wanted = request(tiny_settings, tmp_path)
    # The leader waits for shards of the others, and of three the second for one of the third.
    at = [[0, 1, count], *([[1, 1, 1]] if count == 3 else [])]
    found = forked.prepare(wanted, count, at=at)
    assert found.codes == [0] * count, found.said
    assert found.everything == sorted([*SHARDS, "manifest"])
    assert all(found.wrote)
    assert sum("manifest" in names for names in found.wrote) == 1
    assert found.said.count("is computed:") == 1
    assert found.said.count("is cached:") == count - 1
    assert_as_alone(wanted, alone)


@pytest.mark.slow
@pytest.mark.parametrize("who", ["leader", "helper"])
@pytest.mark.parametrize(("how", "code"), [("SIGKILL", -signal.SIGKILL), ("SIGTERM", EXIT_RESUME)])
def test_what_one_of_two_leaves_in_the_middle_of_a_shard_the_other_makes(
    forked: Forked,
    tiny_settings: Settings,
    tmp_path: Path,
    alone: StageResult,
    who: str,
    how: str,
    code: int,
) -> None:
    wanted = request(tiny_settings, tmp_path)
    ends, stays = (0, 1) if who == "leader" else (1, 0)
    # The other one waits with its first shard for two.
    found = forked.prepare(wanted, 2, at=[[ends, 3, how], [stays, 1, 2]])
    assert (found.codes[ends], found.codes[stays]) == (code, 0), found.said
    assert len(found.wrote[ends]) == 2, "they are kept"
    assert found.everything == sorted([*SHARDS, "manifest"])
    assert found.wrote[stays][-1] == "manifest"
    assert_as_alone(wanted, alone)


@pytest.mark.slow
def test_an_error_of_the_source_is_that_of_all_who_prepare(
    forked: Forked, tiny_values: dict[str, Any], tiny_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(tiny_folder, folder)
    (folder / "train" / "car" / "003.png").write_bytes(b"")
    settings = validate(merge(tiny_values, {"data": {"source": f"folder:{folder}"}}))
    found = forked.prepare(request(settings, tmp_path), 2, at=[[0, 1, 1]])
    assert found.codes == [EXIT_USER_ERROR, EXIT_USER_ERROR]
    said = [line for line in found.said.splitlines() if "may be unreadable" in line]
    assert len(said) == 2
    assert {line.partition(" ")[2] for line in said} == {
        "At most 1.0% of the 81 images may be unreadable, 1 are so far. Repair or remove them, or "
        "raise data.max_skipped. The first:"
    }
    assert found.said.count("train/car/003.png: the file is empty") == 2


@pytest.mark.slow
def test_a_process_with_another_decoder_waits_and_takes_what_is_made(
    forked: Forked, tiny_settings: Settings, tmp_path: Path, alone: StageResult
) -> None:
    wanted = request(tiny_settings, tmp_path)
    found = forked.prepare(wanted, 2, versions=[[1, "0.1"]], at=[[0, 1, {"said": "does not help"}]])
    assert found.codes == [0, 0], found.said
    assert found.wrote == [[*SHARDS, "manifest"], []]
    assert "this one would with Pillow 0.1: it does not help" in found.said
    assert_as_alone(wanted, alone)
