"""Where the time of the mission's pretraining goes, from a laptop to many nodes: a picture.

    python benchmarks/sizes.py benchmarks/figures/sizes.png

What two cores do is measured (`results/throughput.txt`, `checkpoint_cost.txt`); what
GPUs do is computed by `scaling_model.py` from the assumptions in `scaling.txt` and those below, and
drawn hatched. The images are prepared already. All 5 × 1,281,167 images count as trained on; of the
tenth that is evaluated instead an image costs a third.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from scaling_model import NETWORKS, Assumptions, predict

from data.rotation import NUM_ROTATIONS
from training.configure import build_settings
from training.figures import BLUE, GREEN, PURPLE, VERMILLION
from training.hardware import COMPILING_PAYS
from training.loop import PASSES_PER_STEP
from training.settings import Settings

RESULTS = Path(__file__).parent / "results"

IMAGES = 1_281_167
"""Training images of ImageNet-1k."""

NETWORK = "infiniband-400"

READ_BYTES_PER_SECOND = 2e9
"""Assumed: what a node reads of the prepared images, one batch ahead; in every epoch from storage,
as where memory holds less than all of them."""

COMPILE_SECONDS = 60.0
"""Assumed: compiling the network, where it pays (`training/hardware.py`)."""

MEETING_SECONDS = {"GPU": 5.0, "node": 15.0, "nodes": 30.0}
"""Assumed: until CUDA, and all processes, are there."""

PARTS = {
    "compute": BLUE,
    "images": VERMILLION,
    "gradient exchange": GREEN,
    "checkpoints": PURPLE,
    "start-up": "#777777",
}
"""Where time goes, and in which colour. Images: on two cores all that is done beside the network's
own steps, on GPUs the time in which there is no batch yet."""

TWO_CORES_STEP = "4 images"
"""That `throughput.py` takes on a processor; the preset's 256 take minutes."""

LABELLED = 0.06
"""Smallest share that is written into its bar."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """One bar.

    Attributes:
        name: What computes.
        step: Of how many images.
        seconds: By part, in the order of `PARTS`.
        measured: Whether they come from measurements.
    """

    name: str
    step: str
    seconds: Mapping[str, float]
    measured: bool

    @property
    def total(self) -> float:
        """Seconds of the whole pretraining."""
        return sum(self.seconds.values())

    def share(self, part: str) -> float:
        """Part of the time, in [0, 1]."""
        return self.seconds[part] / self.total


def last_line(name: str) -> dict[str, Any]:
    """Return the record of a benchmark."""
    found: dict[str, Any] = json.loads((RESULTS / name).read_text().splitlines()[-1])
    return found


def sizes(
    scaling: Mapping[str, Any], throughput: Mapping[str, Any], checkpoint: Mapping[str, Any]
) -> list[Size]:
    """Return the bars, from the smallest machine to the largest.

    Args:
        scaling: The record of `scaling.py`, of the preset `imagenet`, as of all.
        throughput: The record of `throughput.py`.
        checkpoint: The record of `checkpoint_cost.py`.
    """
    mission = build_settings("imagenet")
    images = mission.pretrain.batch_size
    fields = Assumptions.__dataclass_fields__
    given = Assumptions(**{name: scaling["assumptions"][name] for name in fields})
    return [
        on_two_cores(mission, throughput, checkpoint),
        on_gpus(mission, given, checkpoint, gpus=1, images=images, name="one GPU"),
        on_gpus(mission, given, checkpoint, gpus=8, images=images, name="one node of 8 GPUs"),
        on_gpus(mission, given, checkpoint, gpus=64, images=images, name="8 nodes of 8 GPUs"),
        on_gpus(mission, given, checkpoint, gpus=64, images=8 * images, name="8 nodes of 8 GPUs"),
    ]


def on_two_cores(
    mission: Settings, throughput: Mapping[str, Any], checkpoint: Mapping[str, Any]
) -> Size:
    """Return what was measured on two cores, carried on for all steps."""
    samples = mission.pretrain.epochs * IMAGES * NUM_ROTATIONS
    whole = samples / throughput["samples_per_second_imagenet"]
    compute = min(1.0, throughput["ratio_imagenet"]) * whole
    seconds = {
        "compute": compute,
        "images": whole - compute,
        "gradient exchange": 0.0,
        "checkpoints": checkpoints(mission, whole) * checkpoint["wait_seconds_median"],
        "start-up": _start_seconds(checkpoint),
    }
    return Size(name="two cores", step=TWO_CORES_STEP, seconds=seconds, measured=True)


def on_gpus(
    mission: Settings,
    given: Assumptions,
    checkpoint: Mapping[str, Any],
    *,
    gpus: int,
    images: int,
    name: str,
) -> Size:
    """Return what is computed for so many GPUs and steps of so many images."""
    epochs = mission.pretrain.epochs
    steps = epochs * IMAGES / images
    step = predict(given, gpus, images, NETWORKS[NETWORK])
    busy = step.compute_seconds + step.exposed_seconds
    nodes = max(1, gpus // given.gpus_per_node)
    side = mission.prepared_size
    reading = images / nodes * 3 * side**2 / READ_BYTES_PER_SECOND
    waiting = max(0.0, reading - busy)
    operations = mission.model.operations_per_image * PASSES_PER_STEP
    compiled = epochs * IMAGES * NUM_ROTATIONS * operations / gpus >= COMPILING_PAYS
    where = "GPU" if gpus == 1 else "node" if nodes == 1 else "nodes"
    seconds = {
        "compute": steps * step.compute_seconds,
        "images": steps * waiting,
        "gradient exchange": steps * step.exposed_seconds,
        "checkpoints": checkpoints(mission, steps * (busy + waiting))
        * checkpoint["wait_seconds_median"],
        "start-up": _start_seconds(checkpoint)
        + MEETING_SECONDS[where]
        + (COMPILE_SECONDS if compiled else 0),
    }
    return Size(name=name, step=f"{images} images", seconds=seconds, measured=False)


def checkpoints(mission: Settings, seconds: float) -> int:
    """Return how many there are: one an epoch, and those by the clock."""
    return mission.pretrain.epochs + int(seconds / mission.checkpoint.every_seconds)


def _start_seconds(checkpoint: Mapping[str, Any]) -> float:
    return float(checkpoint["import_torch_seconds"] + checkpoint["resume_seconds_beyond_import"])


def in_words(seconds: float) -> str:
    """Return a time in the unit that suits it."""
    for unit, length in (("days", 86_400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.0f} seconds"


def draw(found: list[Size]) -> Figure:
    """Draw the bars, dark on white, which can be read on any page."""
    style: Any = {"font.size": 10, "hatch.linewidth": 1.1, "axes.edgecolor": "#888888"}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(9.2, 4.1), layout="constrained", facecolor="white")
        axes = figure.add_subplot()
        for place, size in enumerate(found):
            _draw_bar(axes, place, size)
        names = [f"{size.name}\n{size.step} a step" for size in found]
        axes.set_yticks(range(len(found)), names)
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0)
        handles = [Patch(color=colour, label=part) for part, colour in PARTS.items()]
        handles += [
            Patch(facecolor="#cccccc", label="measured"),
            Patch(facecolor="white", edgecolor="#888888", hatch="////", label="computed"),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
        return figure


def _draw_bar(axes: Axes, place: int, size: Size) -> None:
    left = 0.0
    for part, colour in PARTS.items():
        share = size.share(part)
        axes.barh(
            place,
            share,
            left=left,
            height=0.62,
            color=colour if size.measured else "white",
            edgecolor="white" if size.measured else colour,
            hatch=None if size.measured else "////",
            linewidth=0.8,
        )
        if share >= LABELLED:
            axes.text(
                left + share / 2,
                place,
                f"{100 * share:.0f} %",
                ha="center",
                va="center",
                color="white" if size.measured else "black",
                bbox=None
                if size.measured
                else {"facecolor": "white", "edgecolor": "none", "pad": 1.5},
            )
        left += share
    axes.text(1.015, place, in_words(size.total), ha="left", va="center")


if __name__ == "__main__":
    bars = sizes(*map(last_line, ("scaling.txt", "throughput.txt", "checkpoint_cost.txt")))
    for bar in bars:
        parts = ", ".join(f"{part} {bar.share(part):.1%}" for part in PARTS)
        print(f"{bar.name}, {bar.step} a step: {in_words(bar.total)}; {parts}")
    draw(bars).savefig(Path(sys.argv[1]), dpi=150)
