"""How many processors this process may use: fewer than there are, in most containers.

The kernel tells a process which processors it may run on (its affinity, which follows `cpuset`),
and enforces a quota of time for its control group and for each group around that one. Python knows
of the former only. A process with more threads than its quota has processors is stopped for a part
of every tenth of a second, in the middle of whatever its other threads wait for.
"""

import os
import platform
from collections.abc import Iterator
from pathlib import Path


def available_processors(root: Path = Path("/")) -> int:
    """Return how many threads can compute at once: the affinity, within all quotas.

    Of a quota of 2.5 processors two are taken; the rest is for what runs beside a computation.

    Args:
        root: Where `proc` and the mounted control groups are found.

    Returns:
        At least 1.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min([count or 1, *map(int, _quotas(root))]))


def own_processors() -> str:
    """Name this machine and those of its processors that this process may run on.

    Two processes that say the same share their processors. A batch system gives each of its tasks
    some of a machine's; a container is a machine by another name.
    """
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    return f"{platform.node()} {sorted(usable)}"


def _quotas(root: Path) -> Iterator[float]:
    """Yield the quotas of this process, in processors; see cgroups(7) and proc(5)."""
    groups = {}
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, group = line.split(":", 2)
        for controller in controllers.split(","):
            groups[controller] = group
    for line in _lines(root / "proc/self/mountinfo"):
        mount, _, kind = line.partition(" - ")
        mounted, at = mount.split(" ")[3:5]
        filesystem, _, options = kind.split(" ", 2)
        if filesystem == "cgroup2":
            read, controller = _quota, ""
        elif filesystem == "cgroup" and "cpu" in options.split(","):
            read, controller = _quota_of_version_1, "cpu"
        else:
            continue
        if controller in groups:
            for folder in _folders(root / at.lstrip("/"), mounted, groups[controller]):
                yield from read(folder)


def _folders(at: Path, mounted: str, group: str) -> Iterator[Path]:
    """Yield the folder of a group and of those around it, as far as they can be seen.

    Args:
        at: Where a hierarchy of groups is mounted.
        mounted: The group that is seen there; in a container often not the outermost.
        group: The group to begin with. Not below `mounted` where a container cannot see its own.
    """
    below = Path(group).relative_to(mounted) if Path(group).is_relative_to(mounted) else Path()
    yield at / below
    for parent in below.parents if below.parts else ():
        yield at / parent


def _quota(folder: Path) -> Iterator[float]:
    for line in _lines(folder / "cpu.max"):
        quota, period = line.split(" ")
        if quota != "max":
            yield int(quota) / int(period)


def _quota_of_version_1(folder: Path) -> Iterator[float]:
    quotas, periods = (_lines(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    for quota, period in zip(quotas, periods, strict=False):
        if int(quota) > 0:  # -1 is none
            yield int(quota) / int(period)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []  # another system, or a group of a version that has none of this
