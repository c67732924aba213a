"""Frozen tokens: what the blocks that fine-tuning leaves alone say of the labelled images, once.

Where nothing is augmented an image gives the same tokens in every epoch of both fine-tunings, so
they are computed here and read from disk there (`Settings.uses_frozen_tokens`). They are kept as
bfloat16: results differ from those of the whole network by that rounding, and have other keys.

The pass is made at the precision of the training. One that was interrupted begins anew: it takes
a fraction of the time of one epoch without it.
"""

import json
import logging
import shutil
import time
from contextlib import ExitStack
from pathlib import Path

from data.loaders import eval_batches
from data.tokens import BYTES_PER_NUMBER, Tokens, writing
from models.boundary import tokens_below
from models.vit import to_device
from training import runner
from training.images import LabelledImages, open_labelled
from training.network import load_start
from training.runner import StageContext, StageOutcome
from training.settings import Settings
from training.stage_files import KEEP_TOKENS, OutputsError
from training.stages import TRAINED_BLOCKS
from training.store import StageResult, write_atomically
from training.supervised import FrozenTokens

FOLDER = "tokens"
"""Folder of the files, below the stage's directory."""

MOST_BYTES = 16 * 2**30
"""What is kept at most, unless asked for. Each epoch reads all of it in another order, as fast as
from memory while it stays in the page cache; the mission's transfer (9,469 images) takes 1.8 GiB,
all labels of ImageNet-1k would take 247 GiB and come from the disk every time."""

_BATCH_SIZE = 64

_GIB = 2**30

logger = logging.getLogger(__name__)


def compute(context: StageContext) -> StageOutcome:
    """Pass the labelled images through the frozen blocks, unless what comes out is too large."""
    settings = context.settings
    images = open_labelled(context.input("data"), settings)
    parts = {"train": images.train, "val": images.val}
    boundaries = [blocks for blocks in TRAINED_BLOCKS.values() if blocks <= settings.model.depth]
    total = sum(len(subset) for subset in parts.values())
    shape = _tokens_and_width(settings)
    size = total * len(boundaries) * shape[0] * shape[1] * BYTES_PER_NUMBER
    folder = context.directory / FOLDER
    shutil.rmtree(folder, ignore_errors=True)  # of an interrupted pass
    kept = _keep_once(context.directory, size, settings.hardware.frozen_tokens)
    scores = {"kept": kept, "images": total, "bytes": size}
    if not kept:
        return StageOutcome(scores=scores)
    hardware = context.hardware()
    model = to_device(load_start(context), hardware.torch_device)
    folder.mkdir()
    began, done = time.monotonic(), 0
    for split, subset in parts.items():
        with ExitStack() as files:
            appends = [
                files.enter_context(writing(_path(folder, split, blocks), (len(subset), *shape)))
                for blocks in boundaries
            ]
            for batch in eval_batches(
                subset, _BATCH_SIZE, settings.model.image_size, hardware.torch_device
            ):
                with hardware.autocast():
                    found = tokens_below(model, batch.images, boundaries)
                for append, tokens in zip(appends, found, strict=True):
                    append(tokens)
                done += len(batch.ids)
                context.progress(done, total, "images")
                if context.stop:
                    raise InterruptedError(
                        f"Stopped after {done:,} of {total:,} images; the same command begins the "
                        "pass anew."
                    )
    return StageOutcome(
        scores=scores,
        timing={"samples_per_second": total / (time.monotonic() - began)},
        made=[FOLDER],
    )


def open_tokens(directory: Path, images: LabelledImages, blocks: int) -> FrozenTokens | None:
    """Open what the stage kept.

    Args:
        directory: The stage's.
        images: The labelled images that it passed through.
        blocks: Blocks that are trained, counted from the head.

    Returns:
        None where it was too large to be kept.
    """
    result = StageResult.model_validate_json((directory / "result.json").read_bytes())
    if not result.scores["kept"]:
        return None
    train, val = (
        Tokens(_path(directory / FOLDER, split, blocks), subset)
        for split, subset in (("train", images.train), ("val", images.val))
    )
    return FrozenTokens(blocks=blocks, train=train, val=val)


def _path(folder: Path, split: str, blocks: int) -> Path:
    return folder / f"{split}-below-last-{blocks}.npy"


def _tokens_and_width(settings: Settings) -> tuple[int, int]:
    sizes = settings.model
    return (sizes.image_size // sizes.patch_size) ** 2 + 1, sizes.embed_dim


def _keep_once(directory: Path, size: int, asked: str) -> bool:
    """Take the decision stored in the stage's directory, or decide and store it.

    Args:
        directory: The stage's.
        size: What keeping the tokens takes, in bytes.
        asked: The setting: always, or auto, which goes by the size.

    Raises:
        OutputsError: If they are to be kept and the disk is too small, or the stored decision
            cannot be read.
    """
    free = shutil.disk_usage(directory).free
    path = directory / KEEP_TOKENS
    if asked == "always":
        kept = True
    elif path.is_file():
        kept = _read_decision(path)
    else:
        most = min(MOST_BYTES, free // 2)
        kept = size <= most
        logger.info(
            "What the frozen blocks make of the images takes %.2f GiB and is %s; up to %.2f GiB "
            "would be (hardware.frozen_tokens).",
            size / _GIB,
            "kept" if kept else "not kept, fine-tuning computes it in every epoch",
            most / _GIB,
        )
        write_atomically(path, json.dumps({"kept": kept}).encode())
    if kept and size > free:
        raise OutputsError(
            f"Keeping what the frozen blocks make of the images needs {size / _GIB:.1f} GiB, the "
            f"disk of {directory} has {free / _GIB:.1f} GiB free. Free some space, or set "
            "hardware.frozen_tokens=never, which computes it in every epoch."
        )
    return kept


def _read_decision(path: Path) -> bool:
    try:
        return bool(json.loads(path.read_bytes())["kept"])
    except (ValueError, TypeError, KeyError) as error:
        raise OutputsError(
            f"{path} must say whether the stage's first attempt kept what the frozen blocks make "
            f"of the images, but it is damaged ({error}). Remove {path.parent} to compute the "
            "stage from the beginning."
        ) from error


if __name__ == "__main__":
    raise SystemExit(runner.main(compute))
