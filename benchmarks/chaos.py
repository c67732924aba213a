"""Interrupt a short pretraining in every way that we know of, and compare its weights.

    python benchmarks/chaos.py --tries 100 --seed 0

Each try starts from nothing, is hit by one to four faults of one kind, each followed by the same
command again, and must end by itself: *survived*. Its weights, metrics file and scores must be
those of an undisturbed run, byte for byte: *identical*. *Steps lost* are those that had been taken
when the fault hit and that the newest sound checkpoint did not hold; checkpoints are made every
`EVERY_STEPS` steps. Everything runs on the CPU with one thread, with dropout, on drawn images.
The last line is JSON. The exit status is 0 if every try survived and was identical.

What is injected here, what a test injects, and what nobody does, by the usual list of faults:

| fault | where |
|---|---|
| SIGKILL at a random instant, one to four times | here: `kill` |
| SIGKILL while a checkpoint is written (made slow) | here: `kill in a write` |
| SIGKILL before each file operation of a save | tests/training/test_checkpoint.py |
| SIGTERM once: the step is finished and saved | here: `stop` |
| SIGTERM twice within ten seconds | here: `stop twice` |
| SIGINT | tests/training/test_stopping.py; it takes the same way as SIGTERM |
| the parent dies | here: `orphan`; tests/tasks/test_child_process.py |
| at the first step, the last of an epoch, in validation, after the end | test_loop.py there |
| resumed twice and more in a row | here: every kind |
| newest checkpoint cut, flipped, zeroed, edited, a file gone or too many | here: `damage` |
| all checkpoints damaged | tests/training/test_checkpoint.py: an error, not a fresh start |
| no space for a checkpoint or for the model | here: `full disk` (a limit on file sizes) |
| an error on fsync, a folder deleted meanwhile | tests/training/test_checkpoint.py, test_loop.py |
| a folder that is read-only | tests/training/test_preflight.py: refused before the work |
| two processes on one key, one of them killed | here: `two at once` |
| stale locks | here: every SIGKILL leaves one; tests/training/test_lock.py |
| leftover temporary folders, the clock set back | here: `clock` |
| settings, images or network changed under a checkpoint | tests/training/test_loop.py: refused |
| other versions of torch | tests/training/test_checkpoint.py: a warning |
| other number of processes | not yet: training runs in one process |
| nan in loss or gradient, once and for ever | tests/training/test_divergence.py, test_loop.py |
| out of memory in a step | tests/training/test_loop.py |
| memory taken by the kernel's killer | the same as SIGKILL |
| too little shared memory, dead or hung loader workers | none: a thread reads the batches |
| a rank that dies | not yet: training runs in one process |
| preparation killed, a shard flipped | tests/data/test_prepare.py |
| two preparations at once | tests/training/test_prepare_data.py |
| a pickle where a checkpoint should be | tests/training/test_checkpoint.py: never run |
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before NumPy: its threads would make forking unsafe.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

from training import checkpoint, prepare_data, pretrain, runner, store
from training.runner import run_stage
from training.settings import validate
from training.stages import STAGES
from training.stopping import EXIT_RESUME
from training.store import CHECKPOINTS, StageRequest

EVERY_STEPS = 7
"""Steps between two checkpoints."""

FILE_LIMIT = 30_000
"""Largest file, in bytes, of an attempt on the full disk: smaller than any file of weights."""

WAIT_SECONDS = 60
"""Longest time that an attempt may take, and twice what an orphan may."""

VALUES: dict[str, Any] = {
    "data": {"source": "drawn10", "crop_margin": 0.25},
    "model": {
        "image_size": 16,
        "patch_size": 8,
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 3,
        "dropout": 0.1,
    },
    "pretrain": {"epochs": 3, "batch_size": 75, "warmup_epochs": 1},
    "checkpoint": {"every_steps": EVERY_STEPS},
    "hardware": {"device": "cpu", "threads": 1},
    "tracking": {"log_every_steps": 1, "wandb": "disabled"},
}
"""40 steps an epoch, 120 in all."""


@dataclass
class Attempt:
    """A forked process that runs the stage.

    It is forked from this one, which has imported torch and computed nothing with it, so that an
    attempt takes a second and not five. For the kernel it is a process like any other.
    """

    pid: int
    request: StageRequest
    code: int | None = None

    def wait(self) -> int:
        """Return the exit status, negative for a signal."""
        deadline = time.monotonic() + WAIT_SECONDS
        while self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                raise TimeoutError(f"An attempt hung; its log: {_log(self.request)}")
            else:
                time.sleep(0.002)
        return self.code

    def sleep(self, seconds: float) -> None:
        """Wait, but not longer than the attempt runs."""
        self.until(lambda: False, seconds)

    def until(self, happened: Callable[[], bool], seconds: float = WAIT_SECONDS) -> None:
        """Wait for something to happen while the attempt runs."""
        deadline = time.monotonic() + seconds
        while self.code is None and time.monotonic() < deadline and not happened():
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            time.sleep(0.002)

    def signal(self, number: int) -> None:
        """Send a signal, unless the attempt has ended."""
        if self.code is None:
            os.kill(self.pid, number)


@dataclass
class Try:
    """One pretraining from nothing to the end, with faults on the way."""

    request: StageRequest
    random: random.Random
    undisturbed_seconds: float
    lost: int = 0
    """Most steps that one fault has cost."""

    def start(
        self, *, slow: bool = False, full: bool = False, parent: int | None = None
    ) -> Attempt:
        """Type the command again."""
        return Attempt(_fork(lambda: self._run(slow=slow, full=full, parent=parent)), self.request)

    def _run(self, *, slow: bool, full: bool, parent: int | None) -> int:
        if slow:
            _slow_down_writes(self.random.random())
        if full:
            resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_LIMIT, FILE_LIMIT))
        arguments = [str(self.request.directory)]
        if parent is not None:
            arguments += ["--parent", str(parent)]
        with _log(self.request).open("a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            return runner.main(pretrain.compute, arguments)

    def instant(self) -> float:
        """Return a random instant of a run, in seconds from its start."""
        return self.random.uniform(0, self.undisturbed_seconds)

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.request.directory / CHECKPOINTS

    def sound_checkpoints(self) -> list[Path]:
        """Return the checkpoints that a resume could start from, newest first."""
        found = sorted(self.checkpoints.glob("step-*"), reverse=True)
        return [path for path in found if "damaged" not in path.name and _is_sound(path)]

    def sound_steps(self) -> list[int]:
        """Return their steps."""
        return [int(path.name.split("-")[1]) for path in self.sound_checkpoints()]

    def steps_taken(self) -> int:
        """Step of the last line of the metrics file."""
        path = self.request.directory / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        return int(json.loads(lines[-1])["step"]) if lines else 0

    def is_done(self) -> bool:
        """Whether the run has a result."""
        return (self.request.directory / "result.json").is_file()

    def check_nothing_lost(self) -> None:
        """Raise if a step that was taken is in no checkpoint."""
        if not self.is_done():
            saved, taken = max(self.sound_steps(), default=0), self.steps_taken()
            assert saved >= taken, f"step {taken} was taken, {saved} is saved"

    def count_lost(self) -> None:
        """Compare what was done with what is saved; called when a fault has hit."""
        if not self.is_done():
            self.lost = max(self.lost, self.steps_taken() - max(self.sound_steps(), default=0))


def kill(run: Try) -> bool:
    """SIGKILL at a random instant."""
    attempt = run.start()
    attempt.sleep(run.instant())
    attempt.signal(signal.SIGKILL)
    return attempt.wait() == -signal.SIGKILL


def kill_in_a_write(run: Try) -> bool:
    """SIGKILL while a checkpoint is being written, slowly."""
    attempt = run.start(slow=True)
    for _ in range(run.random.randint(1, 6)):  # this many checkpoints on
        attempt.until(lambda: not _is_writing(run.checkpoints))
        attempt.until(lambda: _is_writing(run.checkpoints))
    attempt.sleep(run.random.uniform(0, 0.1))
    attempt.signal(signal.SIGKILL)
    attempt.wait()
    return _is_writing(run.checkpoints)  # it was: what it wrote is left behind


def stop(run: Try) -> bool:
    """SIGTERM: all steps are saved, and the exit status says so."""
    attempt = run.start()
    attempt.until(lambda: _listens(attempt.pid))
    attempt.sleep(run.instant())
    attempt.signal(signal.SIGTERM)
    code = attempt.wait()
    assert code in (0, EXIT_RESUME), f"exit status {code}"
    run.check_nothing_lost()
    return code == EXIT_RESUME


def stop_twice(run: Try) -> bool:
    """SIGTERM, and again before it has stopped."""
    attempt = run.start(slow=True)
    attempt.sleep(run.instant())
    attempt.signal(signal.SIGTERM)
    attempt.sleep(run.random.uniform(0, 0.1))
    attempt.signal(signal.SIGTERM)
    code = attempt.wait()
    assert code in (0, EXIT_RESUME, -signal.SIGTERM), f"exit status {code}"
    return code != 0


def orphan(run: Try) -> bool:
    """SIGKILL of the parent: the child saves and ends."""
    reading, writing = os.pipe()

    def parent() -> int:
        child = run.start(parent=os.getpid())
        os.write(writing, str(child.pid).encode())
        return child.wait()

    pid = _fork(parent)
    os.close(writing)
    child = int(os.read(reading, 20))
    os.close(reading)
    attempt = Attempt(pid, run.request)
    attempt.until(lambda: _listens(child))
    attempt.sleep(run.instant())
    attempt.signal(signal.SIGKILL)
    hit = attempt.wait() == -signal.SIGKILL
    deadline = time.monotonic() + WAIT_SECONDS / 2
    while _exists(child):
        assert time.monotonic() < deadline, "the orphan goes on"
        time.sleep(0.005)
    run.check_nothing_lost()
    return hit and not run.is_done()


def damage(run: Try) -> bool:
    """SIGKILL, and the newest checkpoint is damaged; there is an older one."""
    attempt = run.start()
    attempt.until(lambda: len(run.sound_steps()) >= checkpoint.KEEP)
    attempt.sleep(run.instant())
    attempt.signal(signal.SIGKILL)
    attempt.wait()
    sound = run.sound_steps()
    if run.is_done() or len(sound) < 2:
        return False
    newest = run.sound_checkpoints()[0]
    path = run.random.choice(sorted(newest.iterdir()))
    content = path.read_bytes()
    place = run.random.randrange(len(content))
    harm = run.random.choice(["flip", "cut", "empty", "zero", "remove", "edit", "extra"])
    if harm == "flip":
        content = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
    elif harm == "cut":
        content = content[:place]
    elif harm == "empty":
        content = b""
    elif harm == "zero":
        content = content[:place] + bytes(len(content) - place)
    elif harm == "edit":
        path = newest / "manifest.json"
        content = path.read_bytes().replace(b'"step": ', b'"step": 1')
    if harm == "remove":
        path.unlink()
    elif harm == "extra":
        (newest / "more.safetensors").write_bytes(content[:place])
    else:
        path.write_bytes(content)
    return True


def full_disk(run: Try) -> bool:
    """Nothing larger than a few kilobytes can be written; then there is space again."""
    attempt = run.start(full=True)
    if run.random.random() < 0.5:
        attempt.sleep(run.instant())
        attempt.signal(signal.SIGKILL)
    code = attempt.wait()
    # To the end: the model cannot be written, and the message says so.
    assert code in (runner.EXIT_USER_ERROR, -signal.SIGKILL), f"exit status {code}"
    return "cannot be saved" in _log(run.request).read_text()


def two_at_once(run: Try) -> bool:
    """Two processes want the same; the one that computes is killed, the other takes over."""
    attempts = [run.start(), run.start()]
    attempts[0].sleep(run.instant())
    victim = run.random.choice(attempts)
    victim.signal(signal.SIGKILL)
    codes = sorted(attempt.wait() for attempt in attempts)
    assert codes in ([-signal.SIGKILL, 0], [0, 0]), f"exit statuses {codes}"
    return codes[0] != 0


def clock(run: Try) -> bool:
    """SIGKILL, leftovers of other killed writers, and files that seem to be of another time."""
    hit = kill(run) and run.checkpoints.is_dir()
    if hit:
        leftover = run.checkpoints / f".tmp-{run.random.getrandbits(64):x}"
        leftover.mkdir()
        (leftover / "model.safetensors").write_bytes(b"half")
        for path in sorted(run.checkpoints.rglob("*")):
            when = run.random.uniform(0, 4e9)
            os.utime(path, (when, when))
    return hit


FAULTS: dict[str, Callable[[Try], bool]] = {
    "kill": kill,
    "kill in a write": kill_in_a_write,
    "stop": stop,
    "stop twice": stop_twice,
    "orphan": orphan,
    "damage": damage,
    "full disk": full_disk,
    "two at once": two_at_once,
    "clock": clock,
}


@dataclass
class Row:
    """What came of all tries of one kind."""

    tries: int = 0
    survived: int = 0
    identical: int = 0
    faults: int = 0
    lost: int = 0


def main() -> int:
    """Run the tries and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tries", type=int, default=100, help="pretrainings to disturb")
    parser.add_argument("--seed", type=int, default=0, help="of kinds, instants and places")
    options = parser.parse_args()
    rows = {name: Row() for name in FAULTS}
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chaos-") as scratch:
        prepared = Path(scratch) / "prepared"
        seconds, expected = _undisturbed(prepared)
        for number in range(options.tries):
            name = list(FAULTS)[number % len(FAULTS)]
            source = random.Random(f"{options.seed} {number}")
            with _fresh(prepared) as request:
                run = Try(request, source, seconds)
                survived, identical, faults = _try(run, FAULTS[name], expected)
                if not identical:
                    print(f"Try {number} ({name}) failed; the end of its log:")
                    print("\n".join(_log(request).read_text().splitlines()[-20:]), flush=True)
            row = rows[name]
            row.tries += 1
            row.survived += survived
            row.identical += identical
            row.faults += faults
            row.lost = max(row.lost, run.lost)
    _print_table(rows, time.monotonic() - started)
    total = {
        field: sum(getattr(row, field) for row in rows.values())
        for field in ("tries", "survived", "identical")
    }
    print(json.dumps({**total, "seed": options.seed}))
    return 0 if total["identical"] == options.tries else 1


def _try(
    run: Try, fault: Callable[[Try], bool], expected: dict[str, Any]
) -> tuple[bool, bool, int]:
    """Inject faults and finish; return whether it survived, whether identical, faults that hit."""
    faults = 0
    wanted = run.random.randint(1, 4)
    try:
        while faults < wanted and not run.is_done():
            faults += fault(run)
            run.count_lost()
        code = run.start().wait()
    except (AssertionError, TimeoutError) as error:
        print(f"{type(error).__name__}: {error}")
        return False, False, faults
    finally:
        _end_children()
    return code == 0, code == 0 and _result(run.request) == expected, faults


def _undisturbed(outputs: Path) -> tuple[float, dict[str, Any]]:
    """Prepare the images in a child and pretrain once; return the time and the result."""

    def prepare() -> int:
        request = store.make_request(STAGES["prepare_data"], validate(VALUES), outputs, {})
        run_stage(request, prepare_data.compute)
        return 0

    assert os.waitpid(_fork(prepare), 0)[1] == 0, "the images cannot be prepared"
    with _fresh(outputs) as request:
        started = time.monotonic()
        assert Try(request, random.Random(0), 0).start().wait() == 0, _log(request).read_text()
        return time.monotonic() - started, _result(request)


@contextmanager
def _fresh(prepared: Path) -> Iterator[StageRequest]:
    """Give the request of a pretraining that nobody has begun; the images are linked."""
    with tempfile.TemporaryDirectory(dir=prepared.parent) as outputs:
        shutil.copytree(prepared, outputs, dirs_exist_ok=True, copy_function=os.link)
        settings = validate(VALUES)
        data = store.inspect(
            store.make_request(STAGES["prepare_data"], settings, Path(outputs), {})
        ).result
        assert data is not None
        results = {"prepare_data": data}
        request = store.make_request(STAGES["pretrain"], settings, Path(outputs), results)
        store.begin(request)
        yield request


def _result(request: StageRequest) -> dict[str, Any]:
    """Return what must be identical."""
    result = json.loads((request.directory / "result.json").read_bytes())
    return {
        "weights": store.sha256_of(request.directory / "model" / "model.safetensors"),
        "metrics": store.sha256_of(request.directory / "metrics.jsonl"),
        "scores": result["scores"],
    }


def _fork(function: Callable[[], int]) -> int:
    """Call a function in a child; its return value becomes the exit status."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        code = function()
    finally:
        os._exit(code)


def _end_children() -> None:
    """Leave no process behind that writes to a folder which is about to go."""
    for path in Path("/proc/self/task").glob("*/children"):
        for pid in map(int, path.read_text().split()):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _slow_down_writes(seed: float) -> None:
    """Have every part of a save take up to 30 ms longer, so that a kill can hit between any two."""
    source = random.Random(seed)
    for name in ("save_file", "sha256_of", "sync_path", "_write_json", "_sync"):
        original = getattr(checkpoint, name)

        def slowed(*arguments: Any, _original: Any = original) -> Any:
            time.sleep(source.uniform(0, 0.03))
            return _original(*arguments)

        setattr(checkpoint, name, slowed)


def _is_writing(checkpoints: Path) -> bool:
    return any(checkpoints.glob(".tmp-*"))


def _is_sound(directory: Path) -> bool:
    """An independent check: every file has the recorded digest."""
    try:
        files = json.loads((directory / "manifest.json").read_bytes())["files"]
        return all(
            store.sha256_of(directory / name) == record["sha256"] for name, record in files.items()
        )
    except (OSError, ValueError, KeyError):
        return False


def _listens(pid: int) -> bool:
    """Whether a process catches SIGTERM: before, there is nothing to save."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = next((line for line in status.splitlines() if line.startswith("SigCgt:")), "x 0")
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


def _exists(pid: int) -> bool:
    """Whether a process that is not our child runs; one that nobody has waited for does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def _log(request: StageRequest) -> Path:
    return request.outputs / "log"


def _print_table(rows: dict[str, Row], seconds: float) -> None:
    print(f"Checkpoints every {EVERY_STEPS} of 120 steps; {seconds:.0f} s in all.\n")
    print("| fault | tries | survived | identical | faults that hit | steps lost at most |")
    print("|---|---|---|---|---|---|")
    for name, row in rows.items():
        if row.tries:
            print(
                f"| {name} | {row.tries} | {row.survived} | {row.identical} | {row.faults} "
                f"| {row.lost} |"
            )
    print()


if __name__ == "__main__":
    sys.exit(main())
