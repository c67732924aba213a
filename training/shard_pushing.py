"""Pushing prepared images to an address, from where trainings read them through a local cache."""

import logging
from collections.abc import Callable
from pathlib import Path

from data import manifest, pushed_shards
from data.patience import Patience
from data.shards import pixels_path
from training import attempts, remote_outputs, store
from training.lock import locked
from training.settings import ConfigError, Settings
from training.steps import Found, steps
from training.wording import stage_title

ADDRESS_VARIABLE = "ROTVIT_SHARDS"
"""Names in the environment the address that was pushed to, so that the preparation takes from there
what it finds, and computes nothing."""

PATIENCE = Patience()
"""How often and how long a store is asked."""

_log = logging.getLogger(__name__)


def address_of(root: str, key: str) -> str:
    """Return where the images of a preparing stage are, below an address."""
    return f"{pushed_shards.checked_address(root)}/{key}"


def push(
    settings: Settings,
    outputs: Path,
    root: str,
    *,
    delete_pixels: bool,
    report: Callable[[int, int], None],
) -> list[str]:
    """Push the prepared images of a run: to pretrain on, and labelled ones from elsewhere.

    Args:
        settings: Of the run.
        outputs: Folder of everything that is written.
        root: Address below which each set gets a folder, named by its stage's key.
        delete_pixels: Whether the pixels here are deleted then, once all have been read there.
        report: Called after every shard with the number of bytes done and in all, of each set.

    Returns:
        The addresses of the sets.

    Raises:
        ConfigError: If none is prepared. Or if the outputs are at an address, where the images
            are stored already.
        DatasetError: As `data.pushed_shards.push`.
        DownloadError: If the store fails as often as it is asked.
    """
    if remote_outputs.address_of(outputs) != str(outputs):
        raise ConfigError(
            "Images are pushed from a folder on this computer, but the outputs are at "
            f"{remote_outputs.address_of(outputs)}. Prepare and push them with --outputs and a "
            f"folder; runs with outputs at an address then find them by {ADDRESS_VARIABLE}."
        )
    addresses: dict[Path, str] = {}
    found = Found()
    lacking: dict[str, str] = {}
    for step in steps(settings, outputs, found):
        verdict = step.request and store.inspect(step.request)
        if verdict and verdict.result:
            found.add(verdict.result, step.variant.name if step.variant else "")
        if step.stage.module_name != "prepare_data":
            continue
        if step.request is None or not (verdict and verdict.result):
            lacking[stage_title(step.title)] = (
                verdict.why if verdict else f"{stage_title(step.lacking)} is missing"
            )
        elif step.request.directory not in addresses:
            address = address_of(root, step.request.key)
            with locked(attempts.lock_path(step.request), what=step.title):
                _push(step.request.directory, address, report)
                if delete_pixels:
                    _delete_pixels(step.request.directory)
            addresses[step.request.directory] = address
    if not addresses:
        raise ConfigError(
            "Images must be prepared before they are pushed, and none are: "
            f"{next(iter(lacking.values()))}. Run `rotvit prepare-data` with the same options."
        )
    for title, why in lacking.items():
        _log.warning(
            "The images of %s are not prepared here, so they are not pushed (%s). Whoever needs "
            "them prepares them; or `rotvit run --until %s` with the same options, and this again.",
            title,
            why,
            title,
        )
    return list(addresses.values())


def _push(directory: Path, address: str, report: Callable[[int, int], None]) -> None:
    known = manifest.read(directory)
    entries = known.entries
    here = [pixels_path(directory, entry.name, known.pixel_format).is_file() for entry in entries]
    pushed = pushed_shards.read(directory)
    if (
        pushed
        and (pushed.address, pushed.fingerprint) == (address, known.fingerprint)
        and not all(here)
    ):
        pushed_shards.check_complete(directory, pushed, patience=PATIENCE)
        _log.info("%s was pushed, and its pixels are deleted here.", directory)
        return
    pushed_shards.push(directory, address, report=report, patience=PATIENCE)


def _delete_pixels(directory: Path) -> None:
    known, pushed = manifest.read(directory), pushed_shards.read(directory)
    entries = known.entries
    paths = [pixels_path(directory, entry.name, known.pixel_format) for entry in entries]
    here = [path for path in paths if path.is_file()]
    if here and pushed:
        pushed_shards.check_there(directory, pushed, patience=PATIENCE)
        for path in here:
            path.unlink()
