"""The faults of the chaos benchmark; each takes a try, hits it, and says whether it did."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from chaos_attempts import WAIT_SECONDS, Attempt, Try, fork, log_of

from training import checkpoint, errors
from training.stopping import EXIT_RESUME


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

    pid = fork(parent)
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
    assert code in (errors.EXIT_USER_ERROR, -signal.SIGKILL), f"exit status {code}"
    return "cannot be saved" in log_of(run.request).read_text()


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
"""Every fault by its name in the table of results."""


def _is_writing(checkpoints: Path) -> bool:
    return any(checkpoints.glob(".tmp-*"))


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
