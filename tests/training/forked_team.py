"""A training in several processes that are forked, to save the time that imports take.

    python -m tests.training.forked_team DIRECTORY COUNT OPTIONS

Each process is what torch's launcher would start. OPTIONS, as JSON: `float64` computes in it;
`record` names a folder for the images of every step; `at` is a list of what happens in one process
after one step: `[process, step, what]`. Prints the exit statuses, those of signals negative.
"""

import json
import os
import signal
import socket
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from data import loaders
from data.loaders import Batch
from training import data_parallel, loop, runner, store
from training.stages import STAGES


def compute_in_float64() -> None:
    torch.set_default_dtype(torch.float64)
    # But for pixels, and for the verdict on a step, which the optimiser wants in float32.
    torch.Tensor.float = lambda values: values.to(  # type: ignore[method-assign, assignment]
        torch.float32 if values.dtype in (torch.bool, torch.uint8) else torch.float64
    )
    loaders.Batch = lambda images, *others, **named: Batch(  # type: ignore[misc, assignment]
        images.double(), *others, **named
    )


def change(index: int, options: dict[str, Any]) -> None:
    if options.get("float64"):
        compute_in_float64()
    data_parallel.LOST_AFTER_SECONDS = options.get("lost_after", data_parallel.LOST_AFTER_SECONDS)
    take_step, save, evaluate = loop._Run._step, loop._Run._save_here, loop._Run._evaluate
    train_epoch = loop._Run._train_epoch
    events = {(step, what) for process, step, what in options.get("at", []) if process == index}

    def step(run: loop._Run, batch: Batch) -> None:
        if "record" in options:
            with (Path(options["record"]) / f"{index}.jsonl").open("a") as file:
                file.write(json.dumps([run.state.step, batch.epoch, batch.ids.tolist()]) + "\n")
        if (run.state.step, "spoil") in events:
            batch.images.fill_(torch.inf)
        task = run.task
        if (run.state.step, "infinite loss") in events:  # whose gradient is finite
            run.task = replace(task, compute_loss=lambda part: task.compute_loss(part) + torch.inf)
        take_step(run, batch)
        run.task = task
        if (run.state.step, "stop") in events:
            os.kill(os.getpid(), signal.SIGTERM)
        if (run.state.step, "die") in events:
            os.kill(os.getpid(), signal.SIGKILL)
        if (run.state.step, "hang") in events:
            os.kill(os.getpid(), signal.SIGSTOP)

    def save_here(run: loop._Run) -> None:
        if (run.state.step, "fail to save") in events:
            raise MemoryError("nothing left to save with")
        save(run)

    def train_epoch_here(run: loop._Run) -> None:
        if (run.state.step, "stop before an epoch") in events:
            os.kill(os.getpid(), signal.SIGTERM)
        train_epoch(run)

    def evaluate_here(run: loop._Run) -> dict[str, float]:
        if (run.state.step, "stop in evaluation") in events:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(run)

    loop._Run._train_epoch = train_epoch_here  # type: ignore[method-assign, assignment]
    loop._Run._evaluate = evaluate_here  # type: ignore[method-assign, assignment]
    loop._Run._step = step  # type: ignore[method-assign, assignment]
    loop._Run._save_here = save_here  # type: ignore[method-assign, assignment]


def run(directory: str, count: int, options: dict[str, Any]) -> list[int]:
    stage = STAGES[store.read_config(Path(directory)).stage]
    compute = import_module(f"training.{stage.module or stage.name}").compute
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    children = []
    for index in range(count):
        pid = os.fork()
        if not pid:
            here = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": count, "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in here.items()})
            os.environ.update({"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "forked"})
            code = 1
            try:
                change(index, options)
                code = runner.main(compute, [directory])
            finally:
                os._exit(code)
        children.append(pid)
    found: dict[int, int] = {}
    while len(found) < count:
        pid, status = os.waitpid(-1, 0)
        found[pid] = os.waitstatus_to_exitcode(status)
        left = [child for child in children if child not in found]
        if len(left) == 1 and any(what == "hang" for _, _, what in options.get("at", [])):
            os.kill(left[0], signal.SIGKILL)  # as the launcher does
    return [found[child] for child in children]


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]))))  # noqa: T201
