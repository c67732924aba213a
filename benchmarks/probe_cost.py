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
from pathlib import Path
from typing import Any

import torch
from transformers import ViTForImageClassification

from data.drawn import CLASS_NAMES, draw, label_of
from data.loaders import eval_batches
from data.rotation import ROTATION_NAMES
from models.export import save_model
from models.vit import eval_mode, to_device
from training import hardware, prepare_data, store
from training.configure import build_settings
from training.feature_analysis import score_layers
from training.features import FOLDER, open_features, write_features
from training.hardware import Hardware
from training.images import LabelledImages, open_labelled
from training.linear_probe import train_probe
from training.network import build_model
from training.probe_variants import probe_variants
from training.runner import StageContext, StageOutcome, run_stage
from training.settings import Settings
from training.stage_files import MODEL
from training.stages import STAGES
from training.stopping import StopRequest
from training.store import StageRequest


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
            f"data.source=folder:{scratch / 'images'}",
            "data.crop_margin=0",
            "transfer.source=none",
            "transfer.labels=none",
            "linear_probe.epochs=20",
            "tracking.wandb=disabled",
        ],
    )
    draw_images(scratch / "images", case, side=settings.model.image_size)
    context = StageContext(request_features(settings, scratch / "outputs"), StopRequest())
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
        with clock.timing("variants"):
            for variant in probe_variants(settings.model.depth)[1:]:
                train_probe(features, settings, num_classes=classes, read=variant.read)
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
            write_features(path, model, subset, settings=context.settings, hardware=found),
            maxlen=0,
        )


def draw_images(root: Path, case: Case, *, side: int) -> None:
    """Draw a folder per class, for training and for testing."""
    for split, count in (("train", case.train), ("test", case.test)):
        for index in range(count):
            folder = root / split / CLASS_NAMES[label_of(index)]
            folder.mkdir(parents=True, exist_ok=True)
            draw(index, split, side).save(folder / f"{index:05d}.png", compress_level=1)


def request_features(settings: Settings, outputs: Path) -> StageRequest:
    """Prepare the images and ask for the features of an untrained network."""
    prepare = store.make_request(STAGES["prepare_data"], settings, outputs, {})
    results = {"prepare_data": run_stage(prepare, prepare_data.compute)}
    pretrain = store.make_request(STAGES["pretrain"], settings, outputs, results)
    results["pretrain"] = run_stage(pretrain, keep_untrained)
    return store.make_request(STAGES["features"], settings, outputs, results)


def keep_untrained(context: StageContext) -> StageOutcome:
    """Stand in for pretraining: what evaluation costs does not depend on the weights."""
    settings = context.settings
    save_model(
        build_model(context, ROTATION_NAMES),
        context.directory / MODEL,
        image_size=settings.model.image_size,
        prepared_size=settings.prepared_size,
    )
    return StageOutcome(scores={}, made=[MODEL])


if __name__ == "__main__":
    sys.exit(main())
