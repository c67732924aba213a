"""Outputs at an address: complete or absent, verified, computed once, whatever goes wrong."""

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from data.patience import Patience
from training import (
    attempts,
    finished_models,
    remote_lock,
    remote_outputs,
    remote_store,
    stage_files,
    store,
)
from training.configure import build_settings
from training.remote_outputs import compute_once, fetch, is_stored, local_folder, look
from training.remote_store import LostError, Store
from training.stage_files import OutputsError
from training.stages import STAGES
from training.store import StageRequest, StageResult

if TYPE_CHECKING:
    from fsspec.implementations.local import LocalFileSystem

    from tests.standin_s3 import Fault, StandInS3

Machine = Callable[[str, str], Path]
Compute = Callable[[StageRequest], StageResult]
Request = Callable[[str, str], StageRequest]


@pytest.fixture
def on(machine: Machine, tmp_path: Path) -> Request:
    """The request of a pretraining on a machine, by the machine's name."""
    data = StageResult(
        stage="prepare_data",
        key="k",
        directory=tmp_path / "prepared",
        status="computed",
        wall_seconds=1.0,
        digest="d",
        scores={},
    )

    def build(name: str, address: str) -> StageRequest:
        outputs = machine(name, address)
        settings = build_settings("drawn")
        return store.make_request(STAGES["pretrain"], settings, outputs, {"prepare_data": data})

    return build


@pytest.fixture
def computed() -> Compute:
    """Compute a stage: a model of ten bytes, and metrics."""

    def run(request: StageRequest) -> StageResult:
        assert attempts.begin(request) is None
        (request.directory / "metrics.jsonl").write_text('{"step": 1}\n')
        (request.directory / "model").mkdir(exist_ok=True)
        (request.directory / "model" / "weights").write_bytes(b"0123456789")
        result = StageResult(
            stage=request.stage,
            key=request.key,
            directory=request.directory,
            status="computed",
            wall_seconds=time.monotonic(),  # another one every time, as in a real one
            digest="of the model",
            scores={"top1": 0.5},
            inputs={role: item.digest for role, item in request.inputs.items()},
            files=stage_files.record_files(request.directory, ["model"]),
        )
        content = result.model_dump_json().encode()
        store.write_atomically(request.directory / "result.json", content)
        return result

    return run


def must_not_run(request: StageRequest) -> StageResult:
    raise AssertionError("computed again")


def state(request: StageRequest) -> str:
    look(request)
    return store.inspect(request).state


def test_what_one_machine_made_is_cached_on_another(
    on: Request, address: str, computed: Compute
) -> None:
    first = on("a", address)
    assert state(first) == "missing"
    made = compute_once(first, computed)
    assert is_stored(first)

    second = on("b", address)
    assert second.directory != first.directory
    assert state(second) == "cached"
    assert is_stored(second)
    assert (second.directory / "metrics.jsonl").is_file(), "charts are made of it"
    assert not (second.directory / "model").exists(), "nobody needs it yet"

    found = compute_once(second, must_not_run)
    assert (found.status, found.digest) == ("cached", made.digest)
    assert found.directory == second.directory
    fetch(second.directory)
    assert (second.directory / "model" / "weights").read_bytes() == b"0123456789"
    assert state(second) == "cached"
    assert not list(second.directory.rglob("*not-fetched*"))


def test_a_copy_of_the_store_is_an_outputs_folder(
    on: Request, tmp_path: Path, computed: Compute
) -> None:
    request = on("a", f"file://{tmp_path}/store")
    compute_once(request, computed)
    place = request.directory.relative_to(request.outputs)
    plain = request.model_copy(
        update={"outputs": tmp_path / "store", "directory": tmp_path / "store" / place}
    )
    assert store.inspect(plain).state == "cached"


@pytest.mark.parametrize("address", ["file", "s3"], indirect=True)
def test_two_machines_at_once_compute_once(
    on: Request,
    address: str,
    computed: Compute,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(remote_lock, "LOOK_SECONDS", 0.05)
    requests = [on(name, address) for name in "ab"]
    began = threading.Barrier(2)
    calls: list[str] = []

    def slowly(request: StageRequest) -> StageResult:
        calls.append(request.outputs.name)
        time.sleep(0.3)
        return computed(request)

    found: list[StageResult] = []

    def run(request: StageRequest) -> None:
        began.wait(10)
        found.append(compute_once(request, slowly))

    threads = [threading.Thread(target=run, args=(request,)) for request in requests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(calls) == 1
    assert sorted(result.status for result in found) == ["cached", "computed"]
    assert found[0].digest == found[1].digest


def test_a_copy_of_the_cache_waits_for_the_lease_of_the_machine_that_it_is_of(
    on: Request,
    tmp_path: Path,
    computed: Compute,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An image of a machine, with the folder's own name in it, is started while that one lives."""
    caplog.set_level("INFO", logger="training")
    monkeypatch.setattr(remote_lock, "LOOK_SECONDS", 0.02)
    address = f"file://{tmp_path}/store"
    first = on("a", address)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    second = on("b", address)
    begun, waited = threading.Event(), threading.Event()

    def slowly(request: StageRequest) -> StageResult:
        begun.set()
        assert waited.wait(20)
        return computed(request)

    with ThreadPoolExecutor(2) as pool:
        made = pool.submit(compute_once, first, slowly)
        assert begun.wait(20)
        found = pool.submit(compute_once, second, must_not_run)
        deadline = time.monotonic() + 10
        while "Waiting for process" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.02)
        waited.set()
        assert made.result().status == "computed"
        assert found.result().status == "cached"


def test_who_lost_the_lease_takes_what_the_other_one_made(
    on: Request,
    tmp_path: Path,
    computed: Compute,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A machine is suspended while it computes; another one takes over, and is done first."""
    monkeypatch.setattr(remote_lock, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(remote_lock, "DEAD_AFTER_SECONDS", 0.2)
    address = f"file://{tmp_path}/store"
    sleeper, heir = on("a", address), on("b", address)

    def sleeps(request: StageRequest) -> StageResult:
        compute_once(heir, computed)
        return computed(request)

    found = compute_once(sleeper, sleeps)
    there = Store(address).read(f"pretrain/{heir.key}/result.json")
    assert (heir.directory / "result.json").read_bytes() == there
    assert (sleeper.directory / "result.json").read_bytes() == there
    assert found.status == "cached"
    assert "Another run has taken over pretrain" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("model/weights", b"012345678", "9 bytes instead of 10"),
        ("model/weights", None, "model/weights is gone"),
        ("files.json", b"{", "files.json cannot be read"),
        ("files.json", None, "files.json is gone"),
        ("metrics.jsonl", b'{"step": 2}\n', "metrics.jsonl is damaged"),
    ],
)
def test_what_is_seen_to_be_damaged_in_the_store_is_computed_again_and_said_so(
    on: Request,
    tmp_path: Path,
    computed: Compute,
    name: str,
    content: bytes | None,
    why: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    address = f"file://{tmp_path}/store"
    request = on("a", address)
    compute_once(request, computed)
    place = f"pretrain/{request.key}/{name}"
    if content is None:
        Store(address).remove(place)
    else:
        Store(address).write(place, content)
    other = on("b", address)
    assert state(other) == "missing"
    assert why in caplog.text
    assert compute_once(other, computed).status == "computed"
    assert state(on("c", address)) == "cached"


@pytest.mark.parametrize("maker", ["the same", "another"])
def test_a_damaged_file_is_found_when_it_is_fetched_and_the_stage_computed_again(
    on: Request, tmp_path: Path, computed: Compute, maker: str
) -> None:
    address = f"file://{tmp_path}/store"
    request = on("a", address)
    compute_once(request, computed)
    Store(address).write(f"pretrain/{request.key}/model/weights", b"0123456780")
    other = on("b", address)
    assert state(other) == "cached", "only a full copy can tell"
    with pytest.raises(LostError, match="model/weights is damaged"):
        fetch(other.directory)
    assert not (other.directory / "model" / "weights").exists()
    assert state(other) == "missing"
    third = on("c", address)
    assert state(third) == "missing", "nobody else has to find out"
    assert state(request) == "cached"
    assert not is_stored(request)
    # By the machine that made it, which has all of it, or by another one.
    if maker == "the same":
        compute_once(request, must_not_run)
    else:
        assert compute_once(other, computed).status == "computed"
    assert state(third) == "cached"
    fetch(third.directory)
    assert (third.directory / "model" / "weights").read_bytes() == b"0123456789"


def test_what_is_damaged_on_this_computer_only_is_fetched_again(
    on: Request,
    tmp_path: Path,
    computed: Compute,
    caplog: pytest.LogCaptureFixture,
) -> None:
    request = on("a", f"file://{tmp_path}/store")
    compute_once(request, computed)
    weights = request.directory / "model" / "weights"
    weights.write_bytes(b"0123456780")
    assert state(request) == "cached"
    assert "damaged on this computer" in caplog.text
    fetch(request.directory)
    assert weights.read_bytes() == b"0123456789"
    assert compute_once(request, must_not_run).status == "cached"


def test_another_result_in_the_store_takes_the_place_of_ours(
    on: Request, tmp_path: Path, computed: Compute
) -> None:
    """Another machine has refreshed the stage: what builds on it must find what all others do."""
    address = f"file://{tmp_path}/store"
    first, second = on("a", address), on("b", address)
    compute_once(first, computed)
    attempts.refresh(second, "run 1")
    assert Store(address).sizes(f"pretrain/{first.key}") == {}
    compute_once(second, computed)
    assert state(first) == "cached"
    results = [(each.directory / "result.json").read_bytes() for each in (first, second)]
    assert results[0] == results[1]


@pytest.fixture
def fine_tuning(machine: Machine, tmp_path: Path) -> Request:
    """The request of a fine-tuning, by its machine and the digest of what it builds on."""

    def build(name: str, digest: str) -> StageRequest:
        inputs = {
            stage: StageResult(
                stage=stage,
                key="k",
                directory=tmp_path / stage,
                status="computed",
                wall_seconds=1.0,
                digest="d" if stage == "prepare_data" else digest,
                scores={},
            )
            for stage in ("prepare_data", "pretrain", "linear_probe", "frozen_tokens")
        }
        outputs = machine(name, f"file://{tmp_path}/store")
        settings = build_settings("drawn")
        return store.make_request(STAGES["finetune_1"], settings, outputs, inputs)

    return build


def stopped_at_500(request: StageRequest) -> StageResult:
    attempts.begin(request)
    checkpoint = request.directory / stage_files.CHECKPOINTS / "step-00000500"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text('{"files": {}}')
    raise KeyboardInterrupt


def test_an_outdated_result_in_the_store_does_not_undo_the_work_on_a_new_one(
    fine_tuning: Request, computed: Compute
) -> None:
    """What it builds on was computed again; the new work is stopped, and looked at from outside."""
    compute_once(fine_tuning("a", "old"), computed)
    request = fine_tuning("a", "new")
    look(request)
    assert store.inspect(request).stale == "outdated"
    with pytest.raises(KeyboardInterrupt):
        compute_once(request, stopped_at_500)
    for _ in range(2):
        look(request)
        verdict = store.inspect(request)
        assert (verdict.state, verdict.step) == ("partial", 500)

    def finished_and_killed(request: StageRequest) -> StageResult:
        computed(request)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compute_once(request, finished_and_killed)
    assert state(request) == "cached"
    compute_once(request, must_not_run)
    assert state(fine_tuning("b", "new")) == "cached"


def test_a_refresh_is_made_once_by_a_flow_run_that_goes_on_elsewhere(
    on: Request, tmp_path: Path, computed: Compute
) -> None:
    """Its pod was taken away; the next one has nothing but the store."""
    address = f"file://{tmp_path}/store"
    first = on("a", address)
    compute_once(first, computed)
    attempts.refresh(first, "flow run 1")
    assert state(on("c", address)) == "missing"
    with pytest.raises(KeyboardInterrupt):
        compute_once(first, stopped_at_500)
    second = on("b", address)
    attempts.refresh(second, "flow run 1")
    assert remote_outputs.newest_step(second) == 500
    compute_once(second, computed)
    attempts.refresh(on("c", address), "flow run 1")
    assert state(on("d", address)) == "cached"
    assert state(first) == "cached"
    attempts.refresh(first, "flow run 2")
    assert state(on("e", address)) == "missing"


def test_a_result_that_was_not_stored_is_stored_when_it_is_asked_for(
    on: Request, tmp_path: Path, computed: Compute
) -> None:
    address = f"file://{tmp_path}/store"
    request = on("a", address)
    computed(request)
    assert state(request) == "cached"
    assert not is_stored(request)
    assert compute_once(request, must_not_run).status == "cached"
    assert is_stored(request)
    assert state(on("b", address)) == "cached"


@pytest.mark.parametrize("fault", [500, 503, "cut"])
@pytest.mark.parametrize("which", ["files.json", "model/weights", "result.json"])
def test_a_store_that_fails_while_a_stage_is_stored(
    on: Request,
    s3: "StandInS3",
    computed: Compute,
    fault: "Fault",
    which: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At the start, in the middle, at the end: absent until the same command is run again."""
    monkeypatch.setattr(remote_store, "PATIENCE", Patience(attempts=1))
    monkeypatch.setattr(remote_outputs, "AT_THE_START", Patience(attempts=1))
    request = on("a", "s3://bucket/x")
    s3.fault = lambda asked: fault if asked.startswith("PUT") and asked.endswith(which) else None
    with pytest.raises(OutputsError, match="must be readable and writable"):
        compute_once(request, computed)
    assert state(on("b", "s3://bucket/x")) == "missing"
    s3.fault = lambda asked: None
    s3.seen.clear()
    again = on("a", "s3://bucket/x")
    assert state(again) == "cached"
    compute_once(again, must_not_run)
    assert state(on("c", "s3://bucket/x")) == "cached"
    sent = [asked.rpartition(f"{again.key}/")[2] for asked in s3.seen if asked.startswith("PUT")]
    if which == "result.json":
        assert "model/weights" not in sent, "what had been sent is not sent again"


KILLED = """
import os, sys
from pathlib import Path
from fsspec.implementations.local import LocalFileSystem
from training import remote_outputs, store

directory, place = Path(sys.argv[1]), Path(sys.argv[2])
template = store.read_config(directory)

def request_on(machine, number):
    os.environ["ROTVIT_CACHE"] = str(place / f"{machine}-{number}")
    outputs = remote_outputs.local_folder(f"file://{place}/store-{number}")
    stage = outputs / directory.parent.name / directory.name
    return template.model_copy(update={"outputs": outputs, "directory": stage})

def compute(request):
    import shutil
    shutil.copytree(directory, request.directory)
    return store.inspect(request).result

def must_not_run(request):
    raise AssertionError("computed again")

def state_elsewhere(name, number):
    request = request_on(name, number)
    remote_outputs.look(request)
    found = store.inspect(request).state
    if found == "cached":
        remote_outputs.fetch(request.directory)
        assert store.inspect(request).state == "cached"
    return found

def in_a_fork(action):
    pid = os.fork()
    if pid == 0:
        try:
            action()
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def killed_before(count, number):
    left = count
    def dying(real):
        def call(*given, **named):
            nonlocal left
            if left == 0:
                os._exit(9)
            left -= 1
            return real(*given, **named)
        return call
    for name in ("put_file", "pipe_file", "mv", "rm_file", "open"):
        setattr(LocalFileSystem, name, dying(getattr(LocalFileSystem, name)))
    remote_outputs.compute_once(request_on("a", number), compute)

for number in range(200):
    code = in_a_fork(lambda: killed_before(number, number))
    found = state_elsewhere("b", number)
    def again():
        request = request_on("a", number)
        done = (request.directory / "result.json").is_file()
        remote_outputs.compute_once(request, must_not_run if done else compute)
    assert in_a_fork(again) == 0
    assert state_elsewhere("c", number) == "cached"
    print(code, found, flush=True)
    if code == 0:
        break
"""


@pytest.mark.slow
def test_killed_between_any_two_operations_a_stage_is_complete_or_absent(
    on: Request, tmp_path: Path, computed: Compute
) -> None:
    """And the same command then finishes at once: nothing waits for the lease of the dead."""
    request = on("plain", f"file://{tmp_path}/template")
    computed(request)
    store.write_config(request)
    began = time.monotonic()
    found = subprocess.run(
        [sys.executable, "-c", KILLED, str(request.directory), str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    lines = found.stdout.split("\n")[:-1]
    codes, states = zip(*(line.split() for line in lines), strict=True)
    assert set(codes[:-1]) == {"9"}
    assert len(codes) > 15
    assert "missing" in states
    assert "cached" in states
    assert list(states) == sorted(states, reverse=True), "absent until it is complete"
    assert time.monotonic() - began < 100


def test_outputs_in_a_folder_are_as_they_were(
    tmp_path: Path, on: Request, computed: Compute
) -> None:
    request = on("a", str(tmp_path / "outputs"))
    assert local_folder(tmp_path) == tmp_path
    remote_outputs.check(request.outputs)
    look(request)
    assert remote_outputs.newest_step(request) is None
    compute_once(request, computed)
    assert is_stored(request)
    assert sorted(path.name for path in request.directory.iterdir()) == [
        "config.yaml",
        "metrics.jsonl",
        "model",
        "result.json",
    ]


def test_an_address_has_a_folder_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROTVIT_CACHE", str(tmp_path))
    folder = local_folder("s3://bucket/prefix")
    assert folder.parent == tmp_path
    assert folder.name.startswith("s3-bucket-prefix-")
    assert local_folder(Path("s3://bucket/prefix/")) == folder, "as a path it has one slash"
    assert local_folder("s3://bucket/prefix-2") != folder
    assert remote_outputs.address_of(folder) == "s3://bucket/prefix"
    monkeypatch.delenv("ROTVIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert local_folder("memory://x").parent == tmp_path / "cache" / "rotation-vit"


def test_the_file_with_the_address_is_its_owners_from_the_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A password may be in it, which somebody could read until the mode is changed."""
    monkeypatch.setenv("ROTVIT_CACHE", str(tmp_path))
    monkeypatch.setattr(Path, "chmod", lambda self, mode: None)
    folder = local_folder("sftp://me:secret@host/prefix")
    assert (folder / remote_outputs.MARKER).stat().st_mode & 0o777 == 0o600
    assert "secret" not in folder.name


def test_a_store_without_conditional_writes_is_named(
    machine: Machine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    outputs = machine("a", f"memory://{tmp_path}")
    remote_outputs.check(outputs)
    assert caplog.text == ""
    outputs = machine("b", f"memory://{tmp_path}")
    from fsspec.implementations.memory import MemoryFileSystem

    monkeypatch.setattr(MemoryFileSystem, "exists", lambda self, path, **named: False)
    remote_outputs.check(outputs)
    assert "both may compute it" in caplog.text


@pytest.mark.usefixtures("simple_kind")
def test_a_store_whose_library_looks_before_it_writes_is_named(
    machine: Machine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    remote_outputs.check(machine("a", f"simple://{tmp_path}/store"))
    assert "both may compute it" in caplog.text


def test_a_store_that_does_not_replace_what_is_there_is_refused(
    machine: Machine,
    tmp_path: Path,
    simple_kind: type["LocalFileSystem"],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As webhdfs, whose answer to that its library drops: a sign of life would not be seen."""
    replace = simple_kind.mv

    def keep(self: "LocalFileSystem", old: str, new: str) -> None:
        if not Path(new).exists():
            replace(self, old, new)

    monkeypatch.setattr(simple_kind, "mv", keep)
    with pytest.raises(OutputsError, match=r"must have what was written last.*'first'"):
        remote_outputs.check(machine("a", f"simple://{tmp_path}/store"))


def test_the_record_of_a_run_is_stored_and_names_places_by_the_address(
    machine: Machine, address: str
) -> None:
    outputs = machine("a", address)
    run = outputs / "runs" / "the-run"
    (run / "report").mkdir(parents=True)
    row = {"stages": {"pretrain": {"directory": str(outputs / "pretrain" / "k"), "key": "k"}}}
    (run / "results.json").write_text(json.dumps(row))
    (run / "run.json").write_text("{}")
    (run / "report" / "index.html").write_text("page")
    (run / "log.txt").write_text("a line\n")
    remote_outputs.store_record(run, must=True)
    there = json.loads(Store(address).read("runs/the-run/results.json") or b"")
    assert there["stages"]["pretrain"]["directory"] == f"{address}/pretrain/k"
    assert [name for name in Store(address).sizes("runs/the-run") if name.startswith("log-")]

    elsewhere = machine("b", address) / "runs" / "the-run"
    remote_outputs.fetch_record(elsewhere)
    found = json.loads((elsewhere / "results.json").read_text())
    assert found["stages"]["pretrain"]["directory"] == str(elsewhere.parents[1] / "pretrain" / "k")
    assert (elsewhere / "report" / "index.html").read_text() == "page"


def test_a_record_that_cannot_be_stored_yet_is_a_warning(
    machine: Machine,
    s3: "StandInS3",
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(remote_outputs, "AT_THE_START", Patience(attempts=1))
    run = machine("a", "s3://bucket/x") / "runs" / "the-run"
    run.mkdir(parents=True)
    (run / "results.json").write_text("{}")
    s3.fault = lambda asked: 503
    remote_outputs.store_record(run, must=False)
    assert "The record of the run is not stored yet" in caplog.text
    with pytest.raises(OutputsError):
        remote_outputs.store_record(run, must=True)


def test_a_model_is_found_by_the_name_of_its_run_in_an_empty_cache(
    finished_run: Path, machine: Machine, tmp_path: Path, run_stages: Any
) -> None:
    """All of a finished run's stages are stored; on another machine the model comes by itself."""
    address = f"file://{tmp_path}/store"
    outputs = machine("a", address)
    subprocess.run(["cp", "-a", f"{finished_run.parents[1]}/.", str(outputs)], check=True)
    run = outputs / "runs" / finished_run.name
    for directory in sorted(outputs.glob("*/*/")):
        if (directory / "result.json").is_file():
            request = store.read_config(directory).model_copy(
                update={"outputs": outputs, "directory": directory}
            )
            compute_once(request, must_not_run)
    remote_outputs.store_record(run, must=True)
    elsewhere = machine("b", address)
    found = finished_models.find_model(run.name, elsewhere, stage="finetune-1")
    assert found.is_relative_to(elsewhere)
    assert (found / "model.safetensors").is_file()
