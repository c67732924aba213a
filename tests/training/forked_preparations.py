"""Preparations of one key in several processes, forked from one that has imported everything once.

    python -m tests.training.forked_preparations

Reads jobs, a line of JSON each: `[directory, count, options]`, a stage's directory and a number of
processes. Answers with a line each: their exit statuses, those of signals negative. What they say
is added to `said` beside the outputs, and to `wrote` a line of every shard: `process name`.

The first process leads; the others begin once help is wanted. Options: `at` is a list of what
happens in a process at the n-th shard that it makes, `[process, n, what]`: the name of a signal
that it gets in the middle of it, or what it waits for before: a number of shards by others, or
`{"said": TEXT}`. `versions` says what a process takes for Pillow's version: `[process, version]`.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import PIL

from data import manifest, prepare, shards
from data.claims import Claims
from training import prepare_data, runner

SHARD_IMAGES = 8


def change(index: int, outputs: Path, options: dict[str, Any]) -> None:
    """Have a process make small shards, say what it writes, and meet with what it is to meet."""
    events = {nth: what for process, nth, what in options.get("at", []) if process == index}
    made = middle = 0
    said, wrote = outputs / "said", outputs / "wrote"
    write, count = prepare._write, prepare._Tally.count
    write_record, write_manifest = shards.write_shard_record, manifest.write

    def write_here(target: Any, part: Any, *rest: Any) -> None:
        nonlocal made, middle
        made, middle = made + 1, part.count // 2
        what = events.get(made)
        while isinstance(what, int) and made_by_others(index, wrote) < what:
            time.sleep(0.01)
        while isinstance(what, dict) and what["said"] not in said.read_text():
            time.sleep(0.01)
        write(target, part, *rest)

    def count_here(tally: prepare._Tally) -> None:
        nonlocal middle
        middle -= 1
        what = events.get(made)
        if middle == 0 and isinstance(what, str):
            os.kill(os.getpid(), signal.Signals[what])
        count(tally)

    def write_record_here(directory: Path, shard: shards.Shard) -> None:
        write_record(directory, shard)
        note(shard.name)

    def write_manifest_here(directory: Path, content: manifest.Manifest) -> None:
        write_manifest(directory, content)
        note("manifest")

    def note(name: str) -> None:
        with wrote.open("a") as file:
            file.write(f"{index} {name}\n")

    prepare.SHARD_IMAGES = SHARD_IMAGES
    prepare._write = write_here  # type: ignore[assignment]
    prepare._Tally.count = count_here  # type: ignore[method-assign, assignment]
    prepare.write_shard_record = write_record_here  # type: ignore[attr-defined]
    manifest.write = write_manifest_here  # type: ignore[assignment]
    for process, version in options.get("versions", []):
        if process == index:
            PIL.__version__ = version


def made_by_others(index: int, wrote: Path) -> int:
    lines = wrote.read_text().splitlines() if wrote.is_file() else []
    return sum(not line.startswith(f"{index} ") for line in lines)


def run(directory: Path, count: int, options: dict[str, Any]) -> list[int]:
    outputs = directory.parents[1]
    children = []
    for index in range(count):
        pid = os.fork()
        if not pid:
            code = 1
            try:
                with (outputs / "said").open("a") as said:
                    os.dup2(said.fileno(), sys.stdout.fileno())
                    os.dup2(said.fileno(), sys.stderr.fileno())
                change(index, outputs, options)
                deadline = time.monotonic() + 60
                while index and Claims(directory).plan() is None:
                    assert time.monotonic() < deadline, "the first process wants no help"
                    time.sleep(0.01)
                arguments = [str(directory)]
                code = runner.main(prepare_data.compute, arguments, helping=prepare_data.helping)
            finally:
                sys.stdout.flush()
                os._exit(code)
        children.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]


if __name__ == "__main__":
    for line in sys.stdin:
        where, processes, wanted = json.loads(line)
        print(json.dumps(run(Path(where), processes, wanted)), flush=True)  # noqa: T201
