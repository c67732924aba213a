"""Preparation: decode every image once into square uint8 arrays that training maps into memory.

One process leads, and delivers the result. Others that want the same help instead of waiting, on
this machine or on another that sees the outputs folder.
"""

import logging
import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path

from data.downloaded_source import Scratch
from data.duplicates import has_copy
from data.fetching import STAGE
from data.manifest import Manifest
from data.patience import Patience
from data.prepare import Helper, digest_of_origin, prepare
from data.prepared import PreparedData
from data.processors import available_processors
from data.pushed_shards import take
from data.records import DatasetError, Source
from data.shards import SUFFIXES
from data.sources import open_source
from training import runner
from training.attempts import DOUBTED
from training.runner import StageContext, StageOutcome
from training.shard_pushing import ADDRESS_VARIABLE, address_of
from training.stopping import StopRequest
from training.store import data_source

FETCHED = "fetched"
"""Folder of files that are fetched as they are read; with more in the name, that of a helper."""

_log = logging.getLogger(__name__)


def compute(context: StageContext) -> StageOutcome:
    """Prepare the images of a source; finished shards of an earlier attempt are kept."""
    settings = context.settings
    source, _ = data_source(context.request.stage, settings)
    scratch = _scratch(context, FETCHED)
    doubted = context.directory / DOUBTED
    try:
        images = _open_source(context, scratch)
        manifest = _pushed(context, images) or prepare(
            images,
            context.directory,
            side=settings.prepared_size,
            report=_reporting(context),
            workers=settings.hardware.threads or available_processors(),
            max_skipped=settings.data.max_skipped,
            pixel_format=settings.data.format,
            suspect=doubted.exists(),
        )
    except DatasetError:  # to be mended by other settings, perhaps, which look elsewhere
        scratch.remove()
        raise
    for folder in context.directory.glob(f"{FETCHED}*"):  # those of killed helpers, too
        shutil.rmtree(folder, ignore_errors=True)
    doubted.unlink(missing_ok=True)  # before what may be stopped: a next attempt need not read all
    copies = count_copies(context.directory, context.stop)
    if copies:
        _log.info(
            "%d of the %d test images of %s look like a training image, or are copies of one.",
            copies,
            manifest.counts["test"],
            source,
        )
    return StageOutcome(
        scores={
            "source": source,
            "counts": dict(manifest.counts),
            "classes": list(manifest.class_names or ()),
            "side": settings.prepared_size,
            "skipped": len(manifest.skipped),
            "skipped_examples": [
                [item.name, item.reason]
                for item in manifest.skipped[:10]  # all of them are in the manifest
            ],
            "test_copies_in_train": copies,
            "fingerprint": manifest.fingerprint,
        },
        made=["manifest.json"],
        digest=manifest.fingerprint,
    )


def helping(context: StageContext) -> Callable[[], None]:
    """Return what prepares images while another process leads, as far as nobody else does.

    It returns once there is nothing for it to do, and may be called again.
    """
    settings = context.settings
    # Of its own: what the leader fetches is deleted as the leader has read it.
    scratch = _scratch(context, f"{FETCHED}-{platform.node()}-{os.getpid()}")
    helper = Helper(
        lambda: _open_source(context, scratch),
        context.directory,
        side=settings.prepared_size,
        report=_reporting(context),
        workers=settings.hardware.threads or available_processors(),
        max_skipped=settings.data.max_skipped,
        pixel_format=settings.data.format,
    )

    def help_on() -> None:
        try:
            helper.help()
        finally:
            scratch.remove()

    return help_on


def _scratch(context: StageContext, folder: str) -> Scratch:
    download = context.request.inputs.get("download")
    return Scratch(
        directory=context.directory / folder,
        patience=Patience(),
        stop=lambda: bool(context.stop),
        stage=download.stage.replace("_", "-") if download else STAGE,
    )


def _open_source(context: StageContext, scratch: Scratch) -> Source:
    download = context.request.inputs.get("download")
    return open_source(
        *data_source(context.request.stage, context.settings),
        downloads=download.directory if download else None,
        scratch=scratch,
    )


def _reporting(context: StageContext) -> Callable[[int, int], None]:
    def report(done: int, total: int) -> None:
        context.progress(done, total, "images")
        if context.stop:
            raise InterruptedError(
                f"Stopped after {done:,} of {total:,} images; finished parts are kept, the same "
                "command goes on after them."
            )

    return report


def _pushed(context: StageContext, images: Source) -> Manifest | None:
    """Take what was pushed to the address in the environment, if it is there."""
    root = os.environ.get(ADDRESS_VARIABLE)
    begun = any(
        each for suffix in SUFFIXES.values() for each in context.directory.glob(f"*{suffix}")
    )
    if not root or begun:  # what was begun here ends here
        return None
    settings, address = context.settings, address_of(root, context.request.key)
    made_from = digest_of_origin(images, settings.prepared_size, settings.data.format)
    found = take(
        address,
        context.directory,
        made_from=made_from,
        report=_reporting(context),
        patience=Patience(),
        stop=context.is_stopped,
    )
    if found:
        _log.info("%s has the prepared images; they stay there.", address)
    else:
        # It may be what the user wants, or a slip in an address that saves hours of work.
        _log.warning(
            "%s has no prepared images, where %s sends this run for them: %s is prepared here.",
            address,
            ADDRESS_VARIABLE,
            images.spec,
        )
    return found


def count_copies(directory: Path, stop: StopRequest) -> int | None:
    """Count the test images of prepared data that are (nearly) in its train split as well.

    Returns:
        None where the data bring no test split: it is taken out of train later, by settings that
        are none of the preparation's, and the report counts then.

    Raises:
        InterruptedError: If a stop was requested.
    """

    def give_up() -> None:
        if stop:
            raise InterruptedError("Stopped while looking for copies of test images.")

    prepared = PreparedData.open(directory)
    if prepared.test is None:
        return None
    copied = has_copy(prepared.test.hashes(), prepared.train.hashes(), give_up=give_up)
    return int(copied.sum())


if __name__ == "__main__":
    raise SystemExit(runner.main(compute, helping=helping))
