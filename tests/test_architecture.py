"""What may be imported where, beyond what the import contracts see."""

import subprocess
import sys

import pytest


def modules_after(code: str) -> set[str]:
    """Top-level modules loaded in a fresh interpreter after running `code`."""
    code += "\nimport sys; print(*{name.partition('.')[0] for name in sys.modules})"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return set(result.stdout.split())


@pytest.mark.slow
def test_the_engine_runs_without_prefect_wandb_and_matplotlib() -> None:
    code = (
        "import training.pretrain, training.finetune, training.from_scratch,"
        "training.linear_probe, training.feature_analysis, training.prepare_data"
    )
    assert not modules_after(code) & {"prefect", "wandb", "matplotlib"}


@pytest.mark.parametrize(
    "module", ["flows.cli", "training.store", "training.preflight", "training.run_record"]
)
def test_keys_and_states_are_known_without_torch(module: str) -> None:
    heavy = {"torch", "transformers", "datasets", "prefect", "sklearn", "matplotlib"}
    assert not modules_after(f"import {module}") & heavy
