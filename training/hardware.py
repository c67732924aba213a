"""What a run computes on: device, precision, compilation, threads; decided once per stage key.

Another precision or number of threads gives other bytes, so the first attempt at a key stores its
decision and a resume takes the stored one.

Whoever starts a stage's process sets `GOMP_SPINCOUNT=1000` before torch is imported. By default
threads of a team spin for long while they wait for each other; when anything else runs on their
cores they spin away the time of the one they wait for. EXPERIMENTS.md has the figures.
"""

import json
import logging
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import threadpoolctl
import torch
from torch import nn
from transformers import ViTForImageClassification

from data.processors import available_processors
from data.splits import Subset
from models.vit import choose_attention, to_device
from training.recipes import RecipeSettings
from training.settings import ConfigError, HardwareSettings
from training.stage_files import HARDWARE, OutputsError
from training.store import write_atomically

logger = logging.getLogger(__name__)

FAST_IN_BFLOAT16 = ("avx512_bf16", "amx_bf16")
"""Flags of processors that train faster in bfloat16, whatever the width: by 1.6 to 2.0 at width 128
with 4 blocks and attention written out, by 1.3 with the fused attention of 401 tokens
(EXPERIMENTS.md)."""

COMPILING_PAYS = 1e17
"""Length of a training on a GPU, in floating-point operations, from which compiling its network
pays. Reckoned, not measured: five minutes at 40 % of the bfloat16 rate of an H100, of which a fifth
pays for a minute of compiling; `benchmarks/gpu.py` measures both. On CPU it is left to the user: no
clear gain was found there (EXPERIMENTS.md)."""

MOST_TOKENS_WRITTEN_OUT = 256
"""Longest sequence whose attention is written out (products and softmax) where a processor trains
in bfloat16. There the backward pass of torch's fused attention takes more than twice as long as in
float32; written out, a step of the mission's network (101 tokens) takes a seventh less, at 257
tokens as long (EXPERIMENTS.md), and what is held for the backward pass grows with the square."""

SHARE_FOR_IMAGES = 0.4
"""Largest part of a GPU's free memory that the training images may take by themselves: what they
leave holds the activations of some thousand samples of the mission's network."""


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What a stage computes on."""

    device: Literal["cpu", "cuda"]
    precision: Literal["float32", "bfloat16"]
    compile: bool
    threads: int
    processes: int = 1
    """That divide the training; `threads` are those of each."""

    @property
    def torch_device(self) -> torch.device:
        """The device, as torch names it."""
        return torch.device(self.device)

    def as_decided_in(self, directory: Path) -> "Hardware":
        """Return this hardware with the precision that a stage computed in, as far as it is known.

        Raises:
            OutputsError: If the stage's decision cannot be read.
        """
        path = directory / HARDWARE
        return replace(self, precision=_read(path).precision) if path.is_file() else self

    def place(self, model: ViTForImageClassification) -> ViTForImageClassification:
        """Move a model that is trained, or asked as in its training, to the device; return it.

        Its attention is computed in the form that trains faster there; see
        `MOST_TOKENS_WRITTEN_OUT`. Weights, and what is exported, are the same for both.
        """
        to_device(model, self.torch_device)
        tokens = model.vit.embeddings.position_embeddings.shape[1]
        on_processor = self.device == "cpu" and self.precision == "bfloat16"
        choose_attention(model, written_out=on_processor and tokens <= MOST_TOKENS_WRITTEN_OUT)
        return model

    def for_training(self, model: nn.Module, *, cache: Path) -> Callable[..., Any]:
        """Return what calls the model in a training step: compiled, or the model itself.

        The model's weights and their names stay what they are.

        Args:
            model: On the device.
            cache: Folder that keeps what was compiled for the next process, unless
                `TORCHINDUCTOR_CACHE_DIR` names one. Torch's own is in the temporary folder, which
                a new container or a new start of the machine finds empty.
        """
        if not self.compile:
            return model
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache.resolve()))
        logger.info("The network is compiled; its first step waits for that, a minute or two.")
        return torch.compile(model, dynamic=False)

    def autocast(self) -> AbstractContextManager[None]:
        """Return a context in which matrix products run at `precision`."""
        return torch.autocast(
            self.device, dtype=torch.bfloat16, enabled=self.precision == "bfloat16"
        )


def decide_once(
    directory: Path,
    settings: HardwareSettings,
    *,
    operations: float | None = None,
    processes: int = 1,
) -> Hardware:
    """Take the decision stored in a stage's directory, or decide and store it; set the threads.

    What the stored decision takes and is not there any more, a CUDA device or a compiler, is done
    without, with a warning; where there is a CUDA device now and was none, all is decided anew. The
    number of processes is what it is now, whatever it was. For the arguments see `decide`.

    Raises:
        ConfigError: As `decide` does.
        OutputsError: If the stored decision cannot be read.
    """
    path = directory / HARDWARE
    stored = _read(path) if path.is_file() else None
    if stored and stored.device == "cpu" and _device(settings) == "cuda":
        # Begun where images were prepared, perhaps; on a processor it would take weeks.
        logger.warning("Started without a GPU, goes on with one: results will differ in bytes.")
        stored = None
    if stored:
        if stored.device == "cuda" and not torch.cuda.is_available():
            logger.warning("Started on a GPU, goes on without one: results will differ in bytes.")
            stored = replace(stored, device="cpu")
        if stored.compile and operations is not None and _missing_to_compile(stored.device):
            logger.warning("Started compiled, goes on without: results will differ in bytes.")
            stored = replace(stored, compile=False)
        # Whether to compile was decided at first; what it takes need not be here any more.
        eager = settings.model_copy(update={"compile": False})
        now = decide(eager, processes=processes)
        if stored.processes != processes:
            logger.info(
                "Started in %d process(es), goes on in %d: results differ by their rounding.",
                stored.processes,
                processes,
            )
            stored = replace(stored, processes=processes, threads=now.threads)
        if stored != replace(now, compile=stored.compile):
            logger.info("As its first attempt, the stage computes on %s.", stored)
        hardware = stored
    else:
        hardware = decide(settings, operations=operations, processes=processes)
        write_atomically(path, json.dumps(asdict(hardware)).encode())
    use_threads(hardware.threads)
    return hardware


def use_threads(count: int) -> None:
    """Let this process compute on so many threads."""
    torch.set_num_threads(count)
    # NumPy's and scikit-learn's are pools of their own, which know no quota.
    threadpoolctl.threadpool_limits(count)


def _read(path: Path) -> Hardware:
    try:
        return Hardware(**json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise OutputsError(
            f"{path} must say what the stage's first attempt computed on, but it is damaged "
            f"({error}). Remove {path.parent} to compute the stage from the beginning."
        ) from error


def decide(
    settings: HardwareSettings,
    *,
    operations: float | None = None,
    processes: int = 1,
) -> Hardware:
    """Decide device, precision, compilation and threads.

    Args:
        settings: What the user wants; the rest is decided.
        operations: Floating-point operations of the whole training; none where nothing is trained,
            and so nothing is compiled.
        processes: That divide them.

    Raises:
        ConfigError: If the network is to be compiled and what that needs is not here.
    """
    device = _device(settings)
    precision = settings.precision
    if precision == "auto":
        fast = (
            torch.cuda.is_bf16_supported(including_emulation=False)
            if device == "cuda"
            else any(map(_cpu_has, FAST_IN_BFLOAT16))
        )
        precision = "bfloat16" if fast else "float32"
    return Hardware(
        device=device,
        precision=precision,
        compile=operations is not None and _compiles(settings, device, operations / processes),
        threads=settings.threads or default_threads(),
        processes=processes,
    )


def choose_processes(settings: HardwareSettings, recipe: RecipeSettings | None) -> int:
    """Decide how many processes of this machine divide a stage's images.

    Args:
        settings: What is asked for.
        recipe: Of the training, whose steps they must divide; none where nothing is trained.

    Raises:
        ConfigError: If so many are asked for that they cannot divide a step, or that there are
            fewer GPUs.
    """
    if settings.processes != "auto":
        if _device(settings) == "cuda" and settings.processes > torch.cuda.device_count():
            raise ConfigError(
                f"Each process needs a GPU of its own, hardware.processes={settings.processes} "
                f"more than the {torch.cuda.device_count()} of this machine. Set it to auto."
            )
        if recipe:
            check_processes(settings.processes, recipe)
        return settings.processes
    if _device(settings) == "cpu":
        return 1
    there = max(1, torch.cuda.device_count())
    count = recipe.most_processes(there) if recipe else there
    if count < there:
        logger.info("Of %d GPUs %d are used: so many divide a step equally.", there, count)
    return count


def check_processes(count: int, recipe: RecipeSettings) -> None:
    """Raise if so many processes cannot divide a step equally.

    Raises:
        ConfigError: With a number that can.
    """
    possible = recipe.most_processes(count)
    if possible != count:
        raise ConfigError(
            "The number of processes must divide a step's images (batch_size / accumulation_steps, "
            f"{recipe.batch_size} / {recipe.accumulation_steps}), {count} do not. Start {possible}."
        )


def _device(settings: HardwareSettings) -> Literal["cpu", "cuda"]:
    if settings.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return settings.device


def _compiles(
    settings: HardwareSettings, device: Literal["cpu", "cuda"], operations: float
) -> bool:
    pays = device == "cuda" and operations >= COMPILING_PAYS
    wanted = pays if settings.compile == "auto" else settings.compile
    missing = _missing_to_compile(device) if wanted else ""
    if missing and settings.compile is True:
        raise ConfigError(
            f"hardware.compile=true needs {missing}, which is not here. Install it, or set "
            "hardware.compile=auto, which does without."
        )
    return wanted and not missing


def _missing_to_compile(device: Literal["cpu", "cuda"]) -> str:
    """Name what torch.compile builds its code with and does not find here; nothing if all is."""
    if device == "cuda":
        if find_spec("triton") is None:
            return "Triton (pip install triton)"
        compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    else:
        compilers = [os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")]
    if not any(shutil.which(compiler) for compiler in compilers):
        return f"a compiler ({' or '.join(compilers)})"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "Python's headers (package python3-dev or the like)"
    return ""


def keeps_images(settings: HardwareSettings, device: torch.device, *, images: Subset) -> bool:
    """Decide whether training images stay on the device; call it when the model is there.

    Raises:
        ConfigError: If `hardware.data_on_device` is true, and they are larger than the free memory.
    """
    if device.type != "cuda" or settings.data_on_device is False:
        return settings.data_on_device is True
    free, _ = torch.cuda.mem_get_info(device)
    if settings.data_on_device is True:
        if images.nbytes > free:
            raise ConfigError(
                f"hardware.data_on_device=true needs training images that fit into the GPU's free "
                f"memory; they take {images.nbytes / 2**30:.1f} GiB of {free / 2**30:.1f}. Set "
                "hardware.data_on_device=auto."
            )
        return True
    return images.nbytes <= SHARE_FOR_IMAGES * free


def default_threads() -> int:
    """Return the threads of the computation where none are set.

    A user, or a batch system, may ask for fewer than there could be, by `OMP_NUM_THREADS`, which is
    what torch itself goes by. Fewer, not more: that would be too many.
    """
    wanted = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # then nested teams'
    usable = available_processors()
    return min(usable, int(wanted)) if wanted.isdecimal() and int(wanted) > 0 else usable


def describe() -> dict[str, str | int]:
    """Name the machine's processor, its usable processors and its GPU."""
    facts: dict[str, str | int] = {"cpu": _cpu_model(), "processors": available_processors()}
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def _cpu_has(flag: str) -> bool:
    return flag in _cpu_info("flags").split()


def _cpu_model() -> str:
    return _cpu_info("model name").strip() or "unknown"


def _cpu_info(field: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2] for line in lines if line.startswith(field)), "")
