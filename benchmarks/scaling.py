"""What a second process is worth on two cores, and what many GPUs should be worth.

    python benchmarks/scaling.py                       # some four minutes on two quiet cores
    python benchmarks/scaling.py --blocks 0            # computes only, with the gradients counted

Measured: pretraining with the settings of two presets, in one process of one thread, in two of one
thread each (gloo on the loopback interface), and in one of two threads. They take turns of a few
steps, so that what else the machine does hits them all; the samples of a step are the same. With
two processes also the bytes and buckets of the gradients, counted by a hook of
`DistributedDataParallel`, and the time of an all-reduce of as many bytes by itself.

Computed: the same for 1 to 512 GPUs, from those bytes and from stated rates, see
`scaling_model.py`. All of them are options; the rate of a GPU is an assumption until
`benchmarks/gpu.py` has been run on one, whose figure then goes into `--gpu-rate`.

The last line is JSON; `speedup_<preset>` is samples per second of two processes over those of one,
the median over rounds. The exit status is 1 where it is below the bound, and 2 without two cores.
"""

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from scaling_model import NETWORKS, NVLINK, Assumptions, Prediction, predict
from throughput import Case, draw_files
from torch import Tensor, distributed
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel
from turns import Player, Turns

from data.loaders import Batch, Batches
from data.processors import available_processors
from data.rotation import NUM_ROTATIONS, ROTATION_NAMES
from training import data_parallel, hardware, loop, prepare_data, pretrain, progress, store
from training.configure import build_settings
from training.data_parallel import ALONE, Team
from training.network import build_model
from training.runner import StageContext, help_with_stage, run_stage
from training.settings import Settings
from training.stages import STAGES
from training.stopping import StopRequest
from training.store import StageRequest

BOUND = 1.3
"""Smallest speed-up of a second process that counts as one."""

GPUS = (1, 8, 64, 512)

EXCHANGES = 10
"""All-reduces that are timed."""

LONG = 3600
"""Seconds: longer than any process waits for its turn."""


@dataclass(frozen=True)
class Arm:
    """One way to compute."""

    processes: int
    threads: int


ARMS = {"one": Arm(1, 1), "two": Arm(2, 1), "threads": Arm(1, 2)}


CASES = {
    # A step of the preset's 256 images takes minutes on a processor.
    "imagenet": Case(images_per_step=8, block=2, blocks=6),
    "drawn": Case(images_per_step=32, block=16, blocks=7),
}


@dataclass(frozen=True)
class Job:
    """What a process that takes turns is given.

    Attributes:
        request: For the pretraining.
        processes: That compute it.
        port: On which they find each other.
        notes: Folder for what they find out besides the time.
    """

    request: StageRequest
    processes: int
    port: int
    notes: Path


def main(arguments: list[str] | None = None) -> int:
    """Measure, compute and print; the exit status says whether the bound is kept."""
    options = _parser().parse_args(arguments)
    if available_processors() < 2:
        print("benchmarks/scaling.py needs two processors.", file=sys.stderr)
        return 2
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # for the processes that are started
    if Path("/sys/class/net/lo").exists():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    found: dict[str, Any] = {
        "hardware": hardware.describe(),
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "numpy")},
        "set": options.set,
    }
    for preset in options.presets:
        case = CASES[preset]
        if options.blocks is not None:
            case = replace(case, blocks=options.blocks)
        with tempfile.TemporaryDirectory(prefix="scaling-") as scratch:
            measured = measure(preset, case, options.set, Path(scratch))
        for name, value in measured.items():
            found[f"{name}_{preset}"] = value
            shown = f"{value:.4g}" if isinstance(value, float) else str(value)
            print(f"{preset:<10}{name:<32}{shown}", flush=True)
    if "imagenet" in options.presets:
        given = assumptions(
            options, found["gradient_bytes_imagenet"], found["gradient_buckets_imagenet"]
        )
        rows = list(predictions(given, build_settings("imagenet")))
        print_predictions(given, rows)
        links = {"node": NVLINK, **NETWORKS}
        found["assumptions"] = asdict(given) | {
            "links": {name: asdict(link) for name, link in links.items()}
        }
        found["predictions"] = [{**facts, **asdict(row)} for facts, row in rows]
    names = [f"speedup_{preset}" for preset in options.presets]
    speedups = [found[name] for name in names if name in found]
    kept = all(speedup >= BOUND for speedup in speedups)
    print(json.dumps({**found, "bound": BOUND, "kept": kept if speedups else None}))
    return 0 if kept else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--presets", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument(
        "--blocks", type=int, help="turns of each, instead of the usual number; 0 only counts"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="path.to.setting=value",
        help="a setting of what is measured; may be given several times",
    )
    reckoned = parser.add_argument_group("assumptions of what is computed")
    reckoned.add_argument("--gpu-rate", type=float, help="samples/s of one GPU that is full")
    reckoned.add_argument(
        "--gpu-tflops",
        type=float,
        default=790,
        help="without --gpu-rate: what large products of matrices reach on it, in 10¹² operations "
        "per second (an H100 in bfloat16)",
    )
    reckoned.add_argument(
        "--gpu-share", type=float, default=0.4, help="without --gpu-rate: the part of it reached"
    )
    for name, what in (
        ("step_seconds", "of a step, however small a GPU's part of it is: launches, update"),
        ("gpus_per_node", "connected by NVLink"),
        ("adapters", "of each node, for the network"),
        ("link_share", "part of a link's stated rate that an all-reduce gets"),
    ):
        default = getattr(Assumptions, name)
        option = f"--{name.replace('_', '-')}"
        reckoned.add_argument(option, type=type(default), default=default, help=what)
    return parser


def measure(preset: str, case: Case, overrides: list[str], scratch: Path) -> dict[str, Any]:
    """Let all ways to compute take their turns, and return what was found; or only count."""
    requests = _requests(preset, case, overrides, scratch)
    players: dict[str, Player] = {}
    seconds: dict[str, list[float]] = {name: [] for name in ARMS}
    try:
        for name in ARMS if case.blocks else ("two",):
            job = Job(requests[name], ARMS[name].processes, _free_port(), scratch / name)
            players[name] = Player(name, train, job, case.block)
        for _ in range(case.blocks):
            for name, player in players.items():
                seconds[name].append(player.turn())
        traffic = json.loads((scratch / "two" / "traffic.json").read_bytes())
        if not case.blocks:
            return {"gradient_bytes": traffic["bytes"], "gradient_buckets": traffic["buckets"]}
        waits = json.loads((scratch / "one" / "waits.json").read_bytes())
    finally:
        for player in players.values():
            player.end()
    decided = json.loads((requests["two"].directory / "hardware.json").read_bytes())
    return {
        "images_per_step": case.images_per_step,
        "steps_per_block": case.block,
        "precision": decided["precision"],
        **figures(case, seconds, waits, traffic),
    }


def figures(
    case: Case,
    seconds: dict[str, list[float]],
    waits: list[float],
    traffic: dict[str, Any],
) -> dict[str, Any]:
    """Return rates, ratios and what they are made of.

    Args:
        case: What was measured.
        seconds: Of each block of each arm, in order.
        waits: Seconds of each block of `one` in which there was no batch to compute on.
        traffic: Bytes and buckets of the gradients of a step, and seconds of all-reduces.
    """
    samples = case.block * case.images_per_step * NUM_ROTATIONS
    counted = {name: values[1:] for name, values in seconds.items()}
    rates = {name: samples / statistics.median(values) for name, values in counted.items()}
    found: dict[str, Any] = {f"samples_per_second_{name}": rate for name, rate in rates.items()}
    for name, other in (("speedup", "one"), ("over_threads", "threads")):
        ratios = [
            theirs / ours for ours, theirs in zip(counted["two"], counted[other], strict=True)
        ]
        found[name] = statistics.median(ratios)
        found[f"{name}_lowest"], found[f"{name}_highest"] = min(ratios), max(ratios)
    exchange = statistics.median(traffic["seconds"])
    return {
        **found,
        "efficiency": found["speedup"] / ARMS["two"].processes,
        "gradient_bytes": traffic["bytes"],
        "gradient_buckets": traffic["buckets"],
        "exchange_seconds": exchange,
        "exchange_over_step": exchange * case.block / statistics.median(counted["two"]),
        "input_share": statistics.median(
            wait / whole for wait, whole in zip(waits[1:], counted["one"], strict=True)
        ),
    }


def train(job: Job, turns: Turns) -> None:
    """Pretrain as a run does, with as many helpers as the job asks for."""
    data_parallel.BEGIN_SECONDS = data_parallel.LOST_AFTER_SECONDS = LONG
    team = ALONE
    if job.processes > 1:
        # Forked, with all imported, before anything was computed: it has no threads to lose.
        context = multiprocessing.get_context("fork")
        for index in range(1, job.processes):
            context.Process(target=_help, args=(job, index), daemon=True).start()
        team = _join(job, 0)
        note_traffic(job, team)
    turns.begin()
    with _noting_waits(job.notes) as block_ended, progress.listening(lambda _: block_ended(turns)):
        run_stage(job.request, pretrain.compute, team=team)


def _help(job: Job, index: int) -> None:
    team = _join(job, index)
    note_traffic(job, team)
    help_with_stage(job.request, pretrain.compute, StopRequest(), team)


def _join(job: Job, index: int) -> Team:
    os.environ |= {
        "RANK": str(index),
        "LOCAL_RANK": str(index),
        "WORLD_SIZE": str(job.processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(job.port),
    }
    return data_parallel.join()


def note_traffic(job: Job, team: Team) -> None:
    """Count what the gradients of a step send, and time as much by itself."""
    hardware.use_threads(1)
    context = StageContext(job.request, StopRequest(), team)
    network = team.parallel(build_model(context, ROTATION_NAMES))
    assert isinstance(network, DistributedDataParallel)
    sizes: list[int] = []
    # Without annotations: torch insists on that of a class which it does not export.
    network.register_comm_hook(sizes, lambda sizes, bucket: _count(sizes, bucket))
    side = context.settings.model.image_size
    for _ in range(2):  # after the first pass buckets are filled anew, in the order of that pass
        sizes.clear()
        network(torch.zeros(1, 3, side, side)).logits.sum().backward()
    buffer = torch.zeros(sum(sizes) // 4)
    seconds = []
    for _ in range(EXCHANGES + 1):
        distributed.barrier()
        started = time.perf_counter()
        distributed.all_reduce(buffer)
        seconds.append(time.perf_counter() - started)
    if team.is_first:
        found = {"bytes": sum(sizes), "buckets": len(sizes), "seconds": seconds[1:]}
        (job.notes / "traffic.json").write_text(json.dumps(found))


def _count(sizes: list[int], bucket: Any) -> torch.futures.Future[Tensor]:
    buffer, everybody = bucket.buffer(), distributed.group.WORLD
    assert everybody is not None
    sizes.append(buffer.numel() * buffer.element_size())
    future: torch.futures.Future[Tensor] = default_hooks.allreduce_hook(everybody, bucket)
    return future


@contextmanager
def _noting_waits(notes: Path) -> Iterator[Callable[[Turns], None]]:
    """Write down after every block how long there was no batch; gives what is to end a block."""
    make, waits, blocks = Batches.epoch, [0.0], []

    def timed(batches: Batches, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        made = make(batches, epoch, start_step)
        while True:
            started = time.perf_counter()
            batch = next(made, None)
            waits[0] += time.perf_counter() - started
            if batch is None:
                return
            yield batch

    def block_ended(turns: Turns) -> None:
        blocks.append(waits[0])
        waits[0] = 0.0
        (notes / "waits.json").write_text(json.dumps(blocks))
        turns.block_ended()

    with patch.object(Batches, "epoch", timed):
        yield block_ended


def _requests(
    preset: str, case: Case, overrides: list[str], scratch: Path
) -> dict[str, StageRequest]:
    """Prepare drawn images; return the request of each arm, in outputs of its own."""
    images = scratch / "images"
    # One epoch of as many steps as are measured: none of them is an evaluation.
    needed = int(1.3 * case.images_per_step * case.block * (case.blocks + 1)) + 20
    settings = _settings(preset, case, overrides, images, threads=1)
    draw_files(images, needed, settings.model.image_size, distinct=256)
    prepare = store.make_request(STAGES["prepare_data"], settings, scratch / "prepared", {})
    prepared = {"prepare_data": run_stage(prepare, prepare_data.compute)}
    found = {}
    for name, arm in ARMS.items():
        (scratch / name).mkdir()
        own = _settings(preset, case, overrides, images, threads=arm.threads)
        outputs = scratch / name / "outputs"
        found[name] = store.make_request(STAGES["pretrain"], own, outputs, prepared)
    return found


def _settings(
    preset: str, case: Case, overrides: list[str], images: Path, *, threads: int
) -> Settings:
    return build_settings(
        preset,
        overrides=[
            f"data.source=folder:{images}",
            "transfer.source=none",
            "transfer.labels=none",
            f"pretrain.batch_size={case.images_per_step}",
            "pretrain.epochs=1",
            "pretrain.warmup_epochs=0",
            f"tracking.log_every_steps={case.block}",
            "tracking.wandb=disabled",
            "hardware.device=cpu",
            f"hardware.threads={threads}",
            # The clock goes on while the others have their turns; nobody saves here.
            "checkpoint.every_seconds=86400",
            *overrides,
        ],
    )


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    return port


def assumptions(options: argparse.Namespace, gradient_bytes: float, buckets: int) -> Assumptions:
    """Return what the computed part rests on, from the options."""
    model = build_settings("imagenet").model
    operations = loop.PASSES_PER_STEP * model.operations_per_image
    reckoned = options.gpu_share * options.gpu_tflops * 1e12 / operations
    return Assumptions(
        gradient_bytes=gradient_bytes,
        buckets=buckets,
        samples_per_second=options.gpu_rate or reckoned,
        step_seconds=options.step_seconds,
        gpus_per_node=options.gpus_per_node,
        adapters=options.adapters,
        link_share=options.link_share,
    )


def predictions(
    given: Assumptions, mission: Settings
) -> Iterator[tuple[dict[str, str], Prediction]]:
    """Yield what is expected of the mission: by network, the same step divided, and grown.

    Args:
        given: The assumptions.
        mission: Whose batch it is.

    Yields:
        `network` and `step` (`divided`: the recipe's images, whatever the number of GPUs; `grown`:
        as many on each GPU, which is another recipe), and the prediction. The images of a step that
        cannot be divided by so many GPUs are left out.
    """
    images = mission.pretrain.batch_size
    for name, network in NETWORKS.items():
        for gpus in GPUS:
            if gpus <= given.gpus_per_node and name != next(iter(NETWORKS)):
                continue  # the network does not come into it
            among = name if gpus > given.gpus_per_node else "node"
            if images % gpus == 0:
                facts = {"network": among, "step": "divided"}
                yield facts, predict(given, gpus, images, network)
            if gpus > 1:
                facts = {"network": among, "step": "grown"}
                yield facts, predict(given, gpus, images * gpus, network)


def print_predictions(given: Assumptions, rows: list[tuple[dict[str, str], Prediction]]) -> None:
    """Print the assumptions, then a table."""
    print(
        f"\ncomputed, not measured: {given.samples_per_second:,.0f} samples/s on a full GPU,"
        f"\n{given.gradient_bytes / 1e6:.1f} MB of gradients a step in {given.buckets} buckets, "
        f"{1e3 * given.step_seconds:g} ms a step for launches and update,\n"
        f"{given.gpus_per_node} GPUs a node (NVLink, {NVLINK.bytes_per_second / 1e9:g} GB/s) "
        f"with {given.adapters} adapter(s) for the network, {given.link_share:.0%} of each link\n"
    )
    header = ("network", "step", "GPUs", "samples", "exchange", "left", "efficiency", "without")
    print("{:<16}{:<9}{:>5}{:>10}{:>12}{:>10}{:>12}{:>10}".format(*header))
    for facts, row in rows:
        print(
            f"{facts['network']:<16}{facts['step']:<9}{row.gpus:>5}{row.samples:>10}"
            f"{1e3 * row.exchange_seconds:>9.2f} ms{1e3 * row.exposed_seconds:>7.2f} ms"
            f"{row.efficiency:>12.2f}{row.efficiency_without_overlap:>10.2f}"
        )
    print()


if __name__ == "__main__":
    sys.exit(main())
