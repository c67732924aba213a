"""The commit of the code that runs, for the record."""

import subprocess
from functools import cache
from pathlib import Path


@cache  # asked for after every stage
def describe_commit() -> str | None:
    """Return the commit, with `-dirty` where files were changed; None outside a checkout."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
