"""What a run computes on: device, precision, compilation and threads, decided once per stage key.

Another precision or number of threads gives other bytes, so the first attempt at a key stores its
decision and a resume takes the stored one.

Whoever starts a stage's process sets `GOMP_SPINCOUNT=1000` before torch is imported. By default
threads of a team spin for long while they wait for each other; when anything else runs on their
cores they spin away the time of the one they wait for. EXPERIMENTS.md has the figures.
"""

import json
import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from training.settings import HardwareSettings
from training.stage_files import OutputsError
from training.store import write_atomically

logger = logging.getLogger(__name__)

WIDE_ENOUGH_FOR_BFLOAT16 = 256
"""Narrowest network, by token width, that bfloat16 makes faster on CPU. On two cores with AVX-512
bf16, bfloat16 over float32 in samples/s: 1.8 at width 512 with 8 blocks, 0.76 at width 128 with 4
(transformers' ViT, torch 2.15)."""


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What a stage computes on."""

    device: Literal["cpu", "cuda"]
    precision: Literal["float32", "bfloat16"]
    compile: bool
    threads: int

    @property
    def torch_device(self) -> torch.device:
        """The device, as torch names it."""
        return torch.device(self.device)

    def for_training(self, model: nn.Module) -> Callable[..., Any]:
        """Return what calls the model in a training step: compiled, or the model itself.

        The model's weights and their names stay what they are.
        """
        return torch.compile(model, dynamic=False) if self.compile else model

    def autocast(self) -> AbstractContextManager[None]:
        """Return a context in which matrix products run at `precision`."""
        return torch.autocast(
            self.device, dtype=torch.bfloat16, enabled=self.precision == "bfloat16"
        )


def decide_once(directory: Path, settings: HardwareSettings, *, embed_dim: int) -> Hardware:
    """Take the decision stored in a stage's directory, or decide and store it; set the threads.

    A stored CUDA device that is not there any more gives way to the CPU, with a warning.

    Raises:
        OutputsError: If the stored decision cannot be read.
    """
    path = directory / "hardware.json"
    hardware = decide(settings, embed_dim=embed_dim)
    if path.is_file():
        stored = _read(path)
        if stored.device == "cuda" and not torch.cuda.is_available():
            logger.warning("Started on a GPU, goes on without one: results will differ in bytes.")
            stored = Hardware(**{**asdict(stored), "device": "cpu"})
        if stored != hardware:
            logger.info("As its first attempt, the stage computes on %s.", stored)
        hardware = stored
    else:
        write_atomically(path, json.dumps(asdict(hardware)).encode())
    torch.set_num_threads(hardware.threads)
    return hardware


def _read(path: Path) -> Hardware:
    try:
        return Hardware(**json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise OutputsError(
            f"{path} must say what the stage's first attempt computed on, but it is damaged "
            f"({error}). Remove {path.parent} to compute the stage from the beginning."
        ) from error


def decide(settings: HardwareSettings, *, embed_dim: int) -> Hardware:
    """Decide device, precision, compilation and threads for a network of that width."""
    device: Literal["cpu", "cuda"]
    if settings.device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    else:
        device = settings.device
    precision = settings.precision
    if precision == "auto":
        fast = (
            torch.cuda.is_bf16_supported(including_emulation=False)
            if device == "cuda"
            else embed_dim >= WIDE_ENOUGH_FOR_BFLOAT16 and _cpu_computes_bfloat16()
        )
        precision = "bfloat16" if fast else "float32"
    return Hardware(
        device=device,
        precision=precision,
        compile=settings.compile,
        threads=settings.threads or available_processors(),
    )


def available_processors() -> int:
    """Processors that this process may use: its affinity, within its control group's quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        if quota != "max":
            count = min(count or 1, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass  # no control group, or an older kind: the affinity stands
    return count or 1


def describe() -> dict[str, str | int]:
    """Name the machine's processor, its usable processors and its GPU."""
    facts: dict[str, str | int] = {"cpu": _cpu_model(), "processors": available_processors()}
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def _cpu_computes_bfloat16() -> bool:
    return any(f" {flag}" in _cpu_info("flags") for flag in ("avx512_bf16", "amx_bf16"))


def _cpu_model() -> str:
    return _cpu_info("model name").strip() or "unknown"


def _cpu_info(field: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2] for line in lines if line.startswith(field)), "")
