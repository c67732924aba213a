"""Whether Weights & Biases is used, and with which key. Imports no wandb."""

import netrc
import os
from pathlib import Path
from urllib.parse import urlsplit

from training.settings import ConfigError, TrackingSettings

KEY_VARIABLE = "WANDB_API_KEY"

MODE_VARIABLE = "WANDB_MODE"
"""Wandb's own; `auto` does not go online against it."""

SILENT_MODES = ("offline", "disabled")

HOW_TO_TURN_ON = (
    "W&B is off, as no key was found: set WANDB_API_KEY or run `wandb login` to turn it on, or set "
    "tracking.wandb to offline (kept for a later `wandb sync`) or disabled (without this line)."
)
"""What a run says where `auto` finds no key."""


def wandb_mode(tracking: TrackingSettings) -> str:
    """Return `online`, `offline` or `disabled`.

    Raises:
        ConfigError: If `tracking.wandb` is `online` and no key is found.
    """
    if tracking.wandb in SILENT_MODES:
        return tracking.wandb
    if tracking.wandb == "auto" and (wish := os.environ.get(MODE_VARIABLE)) in SILENT_MODES:
        return str(wish)
    if tracking.wandb_secret is not None or find_key():
        return "online"
    if tracking.wandb == "online":
        raise ConfigError(
            "tracking.wandb=online needs a key, and none was found. Set WANDB_API_KEY, run "
            "`wandb login`, or name a Prefect Secret block with tracking.wandb_secret; or set "
            "tracking.wandb=offline."
        )
    return "disabled"


def is_off_for_want_of_a_key(tracking: TrackingSettings) -> bool:
    """Tell whether `auto` would be online with a key."""
    is_open = tracking.wandb == "auto" and os.environ.get(MODE_VARIABLE) not in SILENT_MODES
    return is_open and wandb_mode(tracking) == "disabled"


def find_key() -> str:
    """Return the key of the environment or of `.netrc`, where wandb finds it; empty for none."""
    if key := os.environ.get(KEY_VARIABLE):
        return key
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    try:
        path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
        found = netrc.netrc(path).authenticators(host)
    except (OSError, RuntimeError, netrc.NetrcParseError):  # RuntimeError: nobody's home is known
        return ""
    return (found[2] or "") if found else ""
