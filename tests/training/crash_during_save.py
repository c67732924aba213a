"""Kill a process before each thing that saving a checkpoint does to the file system.

Run by test_checkpoint.py in a process of its own: `python crash_during_save.py DIRECTORY`. Prints
as JSON the names of the operations before which a process was killed.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch

from training import checkpoint
from training.checkpoint import Snapshot

IDENTITY = {"key": "abc"}


def snapshot(step: int) -> Snapshot:
    return Snapshot(
        step=step,
        tensors={"model": {"weight": torch.full((3, 5), float(step))}},
        state={"name": f"state of step {step}"},
    )


def save_and_be_killed(root: Path, before: int, report: int) -> None:
    """In a forked process: save step 3, and be killed before the `before`th operation."""
    count = 0

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        if not event.startswith(("open", "os.", "shutil.")) or str(root) not in str(arguments):
            return
        count += 1
        if count == before:
            os.write(report, event.encode())
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    checkpoint.save(root, snapshot(3), identity=IDENTITY)
    os._exit(0)


def check(root: Path, event: str) -> None:
    """What a process finds that comes after the killed one."""
    loaded = checkpoint.load_newest(root, identity=IDENTITY)
    assert loaded is not None, event
    assert loaded.step in (2, 3), event
    assert loaded.state == {"name": f"state of step {loaded.step}"}, event
    assert torch.equal(loaded.tensors["model"]["weight"], torch.full((3, 5), float(loaded.step)))
    assert not list(root.glob("*.damaged*")), f"{event}: a kill damages nothing"
    checkpoint.save(root, snapshot(3), identity=IDENTITY)
    loaded = checkpoint.load_newest(root, identity=IDENTITY)
    assert loaded is not None, event
    assert loaded.step == 3, event
    assert len(list(root.iterdir())) <= 3, f"{event}: leftovers are removed"


def main(directory: Path) -> None:
    killed_before: list[str] = []
    while True:
        root = directory / f"before-{len(killed_before) + 1}"
        for step in (1, 2):
            checkpoint.save(root, snapshot(step), identity=IDENTITY)
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            save_and_be_killed(root, len(killed_before) + 1, writing)
        os.close(writing)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        killed_before.append(os.read(reading, 100).decode())
        check(root, killed_before[-1])
        shutil.rmtree(root)
    sys.stdout.write(json.dumps(killed_before))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
