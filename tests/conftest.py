"""What several tests need: a seeded generator, a few drawn images, the settings of a tiny run."""

import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from typing import Any

# Prefect reads its settings when it is imported; nothing of the user's own must be touched.
os.environ["PREFECT_HOME"] = tempfile.mkdtemp(prefix="prefect-home-")
os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
os.environ["PREFECT_SERVER_LOGGING_LEVEL"] = "CRITICAL"
# Once Prefect is imported, our log lines outside a flow are warned about otherwise.
os.environ["PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW"] = "ignore"
for name in ("PREFECT_API_URL", "PREFECT_PROFILE", "HF_TOKEN", "HF_HUB_OFFLINE"):
    os.environ.pop(name, None)
for name in [name for name in os.environ if name.startswith("WANDB_")]:
    del os.environ[name]
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf-home-")  # a token may lie in the user's own
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"  # nobody listens there
os.environ["NETRC"] = os.devnull  # a key for W&B may lie in the user's own
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # see training/hardware.py

# Tests that run side by side do so in processes that ignore Ctrl-C; what they start would, too.
signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch

from data.drawn import draw, label_of
from tests.data.standin_hub import StandInHub, standin_hub
from tests.landscapes import train_on_landscapes
from tests.outputs_at_addresses import address, machine, s3, s3_server, simple_kind
from training import store
from training.configure import validate
from training.run_record import RunRecord
from training.runner import run_stage
from training.settings import Settings
from training.stages import plan
from training.stopping import StopRequest
from training.store import StageResult

__all__ = ["address", "machine", "s3", "s3_server", "simple_kind"]
"""Fixtures from elsewhere."""

TINY_CLASSES = ("house", "tree", "car")
"""Labels 0 to 2 of the drawn images."""


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(20)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder source: 20 train and 7 test images of each of three kinds of things, 24 px."""
    root = tmp_path_factory.mktemp("tiny")
    for split, per_class in (("train", 20), ("test", 7)):
        found = dict.fromkeys(range(len(TINY_CLASSES)), 0)
        index = 0
        while min(found.values()) < per_class:
            label = label_of(index)
            if label in found and found[label] < per_class:
                path = root / split / TINY_CLASSES[label] / f"{found[label]:03d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                draw(index, "train" if split == "train" else "test", 24).save(path)
                found[label] += 1
            index += 1
    return root


@pytest.fixture
def tiny_values(tiny_run: dict[str, Any]) -> dict[str, Any]:
    """Settings of a tiny run, to be changed at will."""
    return deepcopy(tiny_run)


@pytest.fixture(scope="session")
def tiny_run(tiny_folder: Path) -> dict[str, Any]:
    """Settings of a run that takes about a second: 16 px, two blocks, 54 training images."""
    return {
        "data": {"source": f"folder:{tiny_folder}", "crop_margin": 0.25},
        "model": {
            "image_size": 16,
            "patch_size": 8,
            "embed_dim": 12,
            "depth": 2,
            "num_heads": 3,
            "mlp_ratio": 2,
            "dropout": 0.1,
        },
        "pretrain": {"epochs": 3, "batch_size": 9, "warmup_epochs": 1},
        "transfer": {"labels": 30},
        "linear_probe": {"epochs": 5, "lrs": [0.01, 0.1], "weight_decays": [0.0]},
        "finetune": {"epochs": 3, "batch_size": 7, "warmup_epochs": 1},
        "finetune_all": {"epochs": 3, "batch_size": 7, "warmup_epochs": 1},
        "from_scratch": {"epochs": 3, "batch_size": 7, "warmup_epochs": 1},
        "feature_analysis": {"knn_ks": [1, 3]},
        "hardware": {"device": "cpu", "threads": 1, "precision": "float32"},
        "tracking": {"log_every_steps": 1, "wandb": "disabled"},
    }


@pytest.fixture
def tiny_settings(tiny_values: dict[str, Any]) -> Settings:
    return validate(tiny_values)


class StopAfter(StopRequest):
    """Asks to stop once it has been consulted that often."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.left = times

    def __bool__(self) -> bool:
        self.left -= 1
        return self.left < 0


@pytest.fixture(scope="session")
def stop_after() -> type[StopAfter]:
    """A request to stop that comes when it has been asked for so many times."""
    return StopAfter


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    """A stand-in for the Hub that this process and its children take for the real one."""
    import datasets.config
    from huggingface_hub import constants, hf_file_system

    with standin_hub() as found:
        template = found.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setenv("HF_ENDPOINT", found.url)
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", found.url)
        hf_file_system.HfFileSystem.clear_instance_cache()
        yield found


RunStages = Callable[..., dict[str, StageResult]]


@pytest.fixture(scope="session")
def run_stages() -> RunStages:
    """Run stages in this process, without Prefect: `(settings, outputs, until)` → results."""

    def run(settings: Settings, outputs: Path, until: str) -> dict[str, StageResult]:
        results: dict[str, StageResult] = {}
        for stage in plan(settings, until):
            request = store.make_request(stage, settings, outputs, results)
            module = import_module(f"training.{stage.module or stage.name}")
            results[stage.name] = run_stage(request, module.compute)
        return results

    return run


@pytest.fixture(scope="session")
def finished_run(tiny_run: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of the record of a tiny run, with a model of every stage that makes one."""
    settings, outputs = validate(deepcopy(tiny_run)), tmp_path_factory.mktemp("finished")
    record = RunRecord(settings, outputs, command=["rotvit", "run"])
    for stage in plan(settings):
        if stage.name not in ("feature_analysis", "report"):
            request = store.make_request(stage, settings, outputs, record.stages)
            module = import_module(f"training.{stage.module or stage.name}")
            record.add(run_stage(request, module.compute))
    record.write(state="finished")
    return record.directory


@pytest.fixture(scope="session")
def landscape_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `model/` directory that knows which way up landscapes are."""
    directory = tmp_path_factory.mktemp("landscapes") / "model"
    train_on_landscapes(directory)
    return directory


@pytest.fixture(scope="session")
def prefect_backend() -> Iterator[None]:
    """Prefect's own temporary server; it takes some ten seconds to start."""
    from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
    from prefect.testing.utilities import prefect_test_harness

    with (
        prefect_test_harness(server_startup_timeout=120),
        # Its thread adds a second to the end of every flow run.
        temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}),
    ):
        yield
