"""What the evaluation of a backbone costs, over the forward pass that it cannot do without.

    python benchmarks/probe_cost.py

Taking the features of all layers, the linear probe with its whole grid of learning rates and weight
decays, and the probes and neighbours of every layer, 20 epochs each and without the random control,
over one forward pass of the same network over the same images; in turn, so that what else the
machine does hits both. And an epoch of fine-tuning the last block from the frozen blocks' kept
output over one that computes them again, each with its evaluation on val.

Images are drawn; all training images have labels. The last line is JSON.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import ViTForImageClassification

from data.loaders import eval_batches
from models.vit import eval_mode, to_device
from training import hardware, prepare_data, store
from training.configure import build_settings
from training.feature_analysis import score_layers
from training.features import FOLDER, open_features, write_features
from training.hardware import Hardware
from training.images import LabelledImages, open_labelled
from training.linear_probe import train_probe
from training.network import build_model
from training.runner import StageContext, run_stage
from training.settings import Settings
from training.stages import STAGES
from training.stopping import StopRequest
from training.store import StageResult


@dataclass(frozen=True)
class Case:
    """How much is measured of a preset's network, and what it may cost."""

    train: int
    test: int
    bound: float
    """Most time over that of one forward pass."""


CASES = {
    "drawn": Case(train=3334, test=1000, bound=2.0),
    # Fewer images than Imagenette's 9,469: a pass over those takes minutes on a processor. All
    # that is compared grows with them, the neighbours' part faster: 0.4 % of the whole there.
    "imagenet": Case(train=1112, test=400, bound=1.2),
}


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; the exit status says whether the bounds are kept."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--presets", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--pairs", type=int, default=3, help="turns of each")
    options = parser.parse_args(arguments)
    found: dict[str, Any] = {"hardware": hardware.describe(), "torch": torch.__version__}
    kept = True
    for preset in options.presets:
        with tempfile.TemporaryDirectory(prefix="probe-cost-") as scratch:
            figures = measure(preset, CASES[preset], Path(scratch), pairs=options.pairs)
        for name, value in figures.items():
            found[f"{name}_{preset}"] = value
            print(f"{preset:<10}{name:<24}{value:.4g}")
        kept = kept and figures["ratio"] <= CASES[preset].bound
    print(json.dumps({**found, "kept": kept}))
    return 0 if kept else 1


def measure(preset: str, case: Case, scratch: Path, *, pairs: int) -> dict[str, float]:
    """Time forward passes and evaluations of a network with a preset's sizes."""
    settings = build_settings(
        preset,
        overrides=[
            "data.source=drawn10",
            "data.crop_margin=0",
            "transfer.source=none",
            "transfer.labels=none",
            "linear_probe.epochs=20",
            "tracking.wandb=disabled",
        ],
    )
    context = prepared(settings, scratch)
    images = open_labelled(context.input("data"), settings)
    found = context.hardware()
    model = to_device(build_model(context, images.class_names), found.torch_device)
    parts: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[[], object]) -> None:
        started = time.perf_counter()
        work()
        if found.device == "cuda":
            torch.cuda.synchronize()
        parts.setdefault(name, []).append(time.perf_counter() - started)

    for _ in range(pairs + 1):
        timed("forward", lambda: forward(model, images, settings, found))
        timed("features", lambda: take(model, images, context, found))
        opened = open_features(context.directory, "pretrained", images)
        features = opened.where_heads_train(found.torch_device)
        classes = len(images.class_names)
        timed("probe", lambda: train_probe(features, settings, num_classes=classes))
        timed("analysis", lambda: score_layers(features, settings, num_classes=classes))
    # The first turn warms up.
    medians = {name: statistics.median(seconds[1:]) for name, seconds in parts.items()}
    rounds = zip(*(parts[name][1:] for name in ("features", "probe", "analysis")), strict=True)
    ratios = [sum(evaluation) / one for evaluation, one in zip(rounds, parts["forward"][1:], strict=True)]
    return {
        **{f"{name}_seconds": value for name, value in medians.items()},
        "ratio": statistics.median(ratios),
        "ratio_lowest": min(ratios),
        "ratio_highest": max(ratios),
    }
