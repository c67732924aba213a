"""How stages, scores, times and rates are said: in the terminal and in Prefect's UI alike."""

import signal
from collections import deque
from collections.abc import Mapping
from typing import Any

PACE_OVER_SECONDS = 60.0
"""The pace is taken over this much time, so that it follows the machine's load."""


class Pace:
    """How fast a count rises, from what was reported in the last minute.

    What was done before the first report (a resumed stage begins in the middle) does not count.
    """

    def __init__(self) -> None:
        self._reports: deque[tuple[float, int]] = deque()

    def add(self, now: float, done: int) -> None:
        """Take a report in; one that goes back starts the count anew."""
        if self._reports and done < self._reports[-1][1]:
            self._reports.clear()
        self._reports.append((now, done))
        while now - self._reports[0][0] > PACE_OVER_SECONDS and len(self._reports) > 2:
            self._reports.popleft()

    @property
    def per_second(self) -> float | None:
        """Units per second; none before it can be known."""
        if not self._reports:
            return None
        (began, first), (ended, last) = self._reports[0], self._reports[-1]
        return (last - first) / (ended - began) if ended > began and last > first else None

    def words(self, done: int, total: int, unit: str) -> str:
        """Return rate and time left, or nothing where they are not known."""
        rate = self.per_second
        if rate is None:
            return ""
        speed = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
        left = f", {duration((total - done) / rate)} left" if done < total else ""
        return f"{speed} {unit}/s{left}"


def stage_title(name: str) -> str:
    """Return a stage's name as the command line writes it."""
    return name.replace("_", "-")


def scores_in_words(name: str, row: Mapping[str, Any]) -> str:
    """Say what a stage measured.

    Args:
        name: The stage's.
        row: Its scores, by the names in `results.json`.
    """
    if name.startswith("download"):
        counts = ", ".join(f"{count:,} {split}" for split, count in row.get("counts", {}).items())
        return f"{counts} images, {_bytes(row['bytes'])}" if counts else "nothing to download"
    if name.startswith("prepare"):
        counts = ", ".join(f"{count:,} {split}" for split, count in row.get("counts", {}).items())
        skipped = row.get("skipped", 0)
        return f"{counts} images" + (f" ({skipped:,} skipped)" if skipped else "")
    if name == "features":
        return f"{row['layers']} layers of {row['images']:,} images, and of a random backbone"
    if name == "frozen_tokens":
        kept = f"of {row['images']:,} images, {_bytes(row['bytes'])}"
        return kept if row["kept"] else f"{kept}: too large to keep"
    if name == "feature_analysis":
        best = max(row["layers"], key=lambda layer: float(layer["top1"]))
        return f"best at {best['name']}: top-1 {best['top1']:.2f}"
    if name == "label_efficiency":
        few, many = row["points"][0], row["points"][-1]
        ends = f"{few['labels']:,} to {many['labels']:,} labels"
        random = f"{few['random_top1']:.2f} to {many['random_top1']:.2f}"
        return f"top-1 {few['top1']:.2f} to {many['top1']:.2f} with {ends} (random {random})"
    if "rotation_accuracy" in row:
        return f"rotation accuracy {row['rotation_accuracy']:.2f}"
    if "random_backbone_top1" in row:
        return f"top-1 {row['top1']:.2f} (random backbone {row['random_backbone_top1']:.2f})"
    return f"top-1 {row['top1']:.2f}" if "top1" in row else ""


def seeds_in_words(name: str, results: Mapping[str, Any]) -> str:
    """Say how a stage's scores vary between seeds; nothing where there is one seed.

    Args:
        name: The stage's.
        results: Content of `results.json`.
    """
    found = results.get("over_seeds", {"stages": {}})["stages"].get(name, {})
    words = " (random ".join(f"{row['mean']:.3f} ± {row['std']:.3f}" for row in found.values())
    return f"{words}{')' if len(found) > 1 else ''} over {_seeds(found)} seeds" if found else ""


def _seeds(found: Mapping[str, Any]) -> int:
    return int(next(iter(found.values()))["n"])


def spread_in_words(results: Mapping[str, Any]) -> str:
    """Say what the spread over seeds is, and what they share; nothing where there is one seed.

    Args:
        results: Content of `results.json`.
    """
    if "over_seeds" not in results:
        return ""
    pretraining = pretraining_in_words(results["over_seeds"]["pretraining"])
    return f"±: standard deviation between seeds ({pretraining})"


def pretraining_in_words(pretraining: str) -> str:
    """Say whether seeds share one pretraining; `evaluation.pretraining` is told."""
    return "one pretraining" if pretraining == "shared" else "each pretrained"


def variant_in_words(stages: Mapping[str, Mapping[str, Any]]) -> tuple[str, str, float]:
    """Say what a variant measured, in what state its stages are, and how many seconds they took.

    Args:
        stages: Its rows of `results.json`, by stage.
    """
    scores = [
        f"{stage_title(name)} {row.get('rotation_accuracy', row.get('top1')):.2f}"
        for name, row in stages.items()
        if "rotation_accuracy" in row or "top1" in row
    ]
    states = dict.fromkeys(row["status"] for row in stages.values())
    return ", ".join(scores), ", ".join(states), sum(row["wall_seconds"] for row in stages.values())


def turn_in_words(turned: int) -> str:
    """Say how a photo lies and what sets it upright.

    Args:
        turned: Degrees counter-clockwise by which it is turned: 0, 90, 180 or 270.
    """
    if turned == 0:
        return "upright"
    if turned == 180:
        return "upside down; turn it by 180° to be upright"
    lies, back = ("counter-clockwise", "clockwise")[:: 1 if turned == 90 else -1]
    return f"turned 90° {lies}; turn it 90° {back} to be upright"


def ended_by(number: int) -> str:
    """Say by which signal a process was ended, and what may have been the reason.

    Args:
        number: The signal's.
    """
    words = f"was ended by {signal.Signals(number).name}"
    if number != signal.SIGKILL:
        return words
    return (
        f"{words} (the kernel kills so when memory runs out: a larger accumulation_steps or a "
        "smaller batch_size of the stage takes less)"
    )


def _bytes(number: int) -> str:
    unit, size = ("MB", 10**6) if number >= 10**7 else ("kB", 10**3)
    return f"{number / size:,.0f} {unit}"


def duration(seconds: float) -> str:
    """Return a time as people say it: `9 s`, `2 min 5 s`, `3 h 20 min`, `2 d 4 h`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(whole / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(whole / 3600)
    return f"{hours // 24} d {hours % 24} h"
