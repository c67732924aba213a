"""The key for Weights & Biases from a Prefect Secret block.

It goes into the environment, where the processes that stages start find it, and nowhere else: not
into arguments, settings, results or logs.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from prefect.blocks.system import Secret

from training.settings import ConfigError, TrackingSettings
from training.wandb_key import KEY_VARIABLE, wandb_mode


@contextmanager
def wandb_key_of_secret(tracking: TrackingSettings) -> Iterator[None]:
    """Have the key of `tracking.wandb_secret`, if that is set, in the environment for the block.

    Raises:
        ConfigError: If there is no such block, or it holds no text.
    """
    if tracking.wandb_secret is None or wandb_mode(tracking) != "online":
        yield
        return
    key = _load(tracking.wandb_secret)
    before = os.environ.get(KEY_VARIABLE)
    os.environ[KEY_VARIABLE] = key
    try:
        yield
    finally:
        if before is None:
            del os.environ[KEY_VARIABLE]
        else:
            os.environ[KEY_VARIABLE] = before


def _load(name: str) -> str:
    must = f"tracking.wandb_secret must name a Prefect Secret block, and {name!r}"
    remedy = "Make one in Prefect's UI (Blocks), or unset the setting and set WANDB_API_KEY."
    try:
        # Not get(), which takes text for JSON where it can: a key of digits would be a number.
        found = Secret.load(name).value.get_secret_value()  # type: ignore[union-attr]
    except ValueError as error:  # its text says only that there is none
        raise ConfigError(f"{must} is none on this server. {remedy}") from error
    if not isinstance(found, str) or not found.strip():
        raise ConfigError(f"{must} holds no text. {remedy}")
    return found.strip()
