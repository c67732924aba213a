"""What the evaluation of a backbone costs, over the forward pass that it cannot do without.

    python benchmarks/probe_cost.py

Taking the features of all layers, the linear probe with its whole grid of learning rates and weight
decays, and the probes, neighbours, ranks and similarities of every layer, 20 epochs each and
without the random control, over one forward pass of the same network over the same images; in turn,
so that what else the machine does hits both. The probe's other ways to read the backbone are timed
beside. And an epoch of fine-tuning the last block from the frozen blocks' kept output over one that
computes them again, each with its evaluation on val.

Images are drawn; all training images have labels. The last line is JSON.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import ViTForImageClassification

from data.drawn import CLASS_NAMES, draw, label_of
from data.loaders import eval_batches
from data.records import Split
from data.rotation import ROTATION_NAMES
from models.export import save_model
from models.vit import eval_mode, to_device
from training import finetune, frozen_tokens, hardware, prepare_data, progress, store
from training.configure import build_settings
from training.feature_analysis import score_layers
from training.features import FOLDER, open_features, write_features
from training.hardware import Hardware
from training.images import LabelledImages, open_labelled
from training.linear_probe import train_probe
from training.network import build_model
from training.readings import readings
from training.runner import Compute, StageContext, StageOutcome, run_stage
from training.settings import HardwareSettings, ModelSettings, Settings
from training.stage_files import MODEL
from training.stages import STAGES, plan
from training.stopping import StopRequest
from training.store import StageResult


@dataclass(frozen=True)
class Case:
    """How much is measured of a preset's network, and what it may cost."""

    train: int
    test: int
    bound: float
    """Most time over that of one forward pass."""


FINETUNE_BOUND = 0.35
"""Most time of an epoch from kept tokens over one without."""

LABELS = 256
"""Labelled images of the fine-tunings: four steps an epoch."""

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
    found: dict[str, Any] = {
        "hardware": hardware.describe(),
        "torch": torch.__version__,
        "precision": hardware.decide(HardwareSettings()).precision,
    }
    kept = True
    for preset in options.presets:
        with tempfile.TemporaryDirectory(prefix="probe-cost-") as scratch:
            place = Path(scratch)
            draw_images(place / "images", CASES[preset], side=sizes_of(preset).image_size)
            figures = measure(preset, place, pairs=options.pairs)
            if preset == "imagenet":
                figures |= measure_finetuning(preset, place, pairs=options.pairs)
        for name, value in figures.items():
            found[f"{name}_{preset}"] = value
            print(f"{preset:<10}{name:<24}{value:.4g}")
        kept = kept and figures["ratio"] <= CASES[preset].bound
        kept = kept and figures.get("finetune_ratio", 0) <= FINETUNE_BOUND
    print(json.dumps({**found, "kept": kept}))
    return 0 if kept else 1


def measure(preset: str, scratch: Path, *, pairs: int) -> dict[str, float]:
    """Time forward passes and evaluations of a network with a preset's sizes."""
    settings = settings_of(preset, scratch, "transfer.labels=none", "linear_probe.epochs=20")
    results = untrained(settings, scratch / "outputs")
    request = store.make_request(STAGES["features"], settings, scratch / "outputs", results)
    context = StageContext(request, StopRequest())
    context.directory.joinpath(FOLDER).mkdir(parents=True)
    images = open_labelled(context.input("data"), settings)
    found = context.hardware()
    model = to_device(build_model(context, images.class_names), found.torch_device)
    clock, classes = Clock(), len(images.class_names)
    for _ in range(pairs + 1):
        with clock.timing("forward"):
            forward(model, images, settings, found)
        with clock.timing("features"):
            take(model, images, context, found)
        with clock.timing("probe"):
            opened = open_features(context.directory, "pretrained", images)
            features = opened.where_heads_train(found.torch_device)
            train_probe(features, settings, num_classes=classes)
        with clock.timing("analysis"):
            score_layers(features, settings, num_classes=classes)
        with clock.timing("readings"):
            for reading in readings(settings.model.depth)[1:]:
                train_probe(features, settings, num_classes=classes, read=reading.read)
    # The first turn warms up.
    turns = list(zip(*(seconds[1:] for seconds in clock.seconds.values()), strict=True))
    ratios = [(features + probe + analysis) / bare for bare, features, probe, analysis, _ in turns]
    return {
        **{
            f"{name}_seconds": statistics.median(seconds[1:])
            for name, seconds in clock.seconds.items()
        },
        "ratio": statistics.median(ratios),
        "ratio_lowest": min(ratios),
        "ratio_highest": max(ratios),
    }


def measure_finetuning(preset: str, scratch: Path, *, pairs: int) -> dict[str, float]:
    """Time epochs of fine-tuning the last block, with and without what the others made kept."""
    seconds: dict[str, list[float]] = {"always": [], "never": []}
    for seed in range(pairs):
        for kept in seconds:
            settings = settings_of(
                preset,
                scratch,
                f"seed={seed}",
                f"transfer.labels={LABELS}",
                f"hardware.frozen_tokens={kept}",
                "finetune.flip=false",
                "finetune.epochs=3",
                "finetune.warmup_epochs=0",
                f"tracking.log_every_steps={LABELS // 64}",
            )
            seconds[kept] += epoch_seconds(settings, scratch / "outputs")
    ratios = [some / all_ for some, all_ in zip(seconds["always"], seconds["never"], strict=True)]
    return {
        "finetune_seconds": statistics.median(seconds["never"]),
        "finetune_kept_seconds": statistics.median(seconds["always"]),
        "finetune_ratio": statistics.median(ratios),
        "finetune_ratio_lowest": min(ratios),
        "finetune_ratio_highest": max(ratios),
    }


def epoch_seconds(settings: Settings, outputs: Path) -> list[float]:
    """Fine-tune the last block; return the time from each epoch's last step to the next one's."""
    results = untrained(settings, outputs)
    for stage in plan(settings, "finetune_1"):
        if stage.name == "frozen_tokens":
            request = store.make_request(stage, settings, outputs, results)
            results[stage.name] = run_stage(request, frozen_tokens.compute)
    ends: list[float] = []
    with progress.listening(lambda report: ends.append(time.perf_counter())):
        request = store.make_request(STAGES["finetune_1"], settings, outputs, results)
        run_stage(request, finetune.compute)
    return [after - before for before, after in pairwise(ends)]


class Clock:
    """Seconds by the name of what was timed, in turn."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    @contextmanager
    def timing(self, name: str) -> Iterator[None]:
        """Add the time of the `with` block."""
        started = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.setdefault(name, []).append(time.perf_counter() - started)


def forward(
    model: ViTForImageClassification, images: LabelledImages, settings: Settings, found: Hardware
) -> None:
    """Run the network once over all images, as features are taken, and keep nothing."""
    side, device = settings.model.image_size, found.torch_device
    for subset in (images.train, images.val, images.test):
        with eval_mode(model), torch.no_grad():
            for batch in eval_batches(subset, batch_size=256, side=side, device=device):
                with found.autocast():
                    model(batch.images)


def take(
    model: ViTForImageClassification,
    images: LabelledImages,
    context: StageContext,
    found: Hardware,
) -> None:
    """Take the features of all images."""
    for split, subset in (("train", images.train), ("val", images.val), ("test", images.test)):
        path = context.directory / FOLDER / f"pretrained-{split}.npy"
        deque(
            write_features(
                path,
                model,
                subset,
                settings=context.settings,
                hardware=found,
                stop=context.stop,
            ),
            maxlen=0,
        )


def draw_images(root: Path, case: Case, *, side: int) -> None:
    """Draw a folder per class, for training and for testing."""
    counts: dict[Split, int] = {"train": case.train, "test": case.test}
    for split, count in counts.items():
        for index in range(count):
            folder = root / split / CLASS_NAMES[label_of(index)]
            folder.mkdir(parents=True, exist_ok=True)
            draw(index, split, side).save(folder / f"{index:05d}.png", compress_level=1)


def sizes_of(preset: str) -> ModelSettings:
    """Return the sizes of a preset's network."""
    return build_settings(preset).model


def settings_of(preset: str, scratch: Path, *overrides: str) -> Settings:
    """Return settings with a preset's network, on drawn images that are the same every time."""
    return build_settings(
        preset,
        overrides=[
            f"data.source=folder:{scratch / 'images'}",
            "data.crop_margin=0",
            "transfer.source=none",
            "tracking.wandb=disabled",
            *overrides,
        ],
    )


def untrained(settings: Settings, outputs: Path) -> dict[str, StageResult]:
    """Prepare the images; an untrained network stands in for a pretrained and a probed one.

    What evaluation and fine-tuning cost does not depend on the weights.
    """
    computes: dict[str, Compute] = {
        "prepare_data": prepare_data.compute,
        "pretrain": keep_untrained,
        "features": lambda context: StageOutcome(scores={}),
        "linear_probe": keep_untrained,
    }
    results: dict[str, StageResult] = {}
    for name, compute in computes.items():
        request = store.make_request(STAGES[name], settings, outputs, results)
        results[name] = run_stage(request, compute)
    return results


def keep_untrained(context: StageContext) -> StageOutcome:
    """Save a fresh network with a head for the stage's classes."""
    settings = context.settings
    pretext = context.request.stage == "pretrain"
    save_model(
        build_model(context, ROTATION_NAMES if pretext else CLASS_NAMES),
        context.directory / MODEL,
        image_size=settings.model.image_size,
        prepared_size=settings.prepared_size,
    )
    return StageOutcome(scores={}, made=[MODEL])


if __name__ == "__main__":
    sys.exit(main())
