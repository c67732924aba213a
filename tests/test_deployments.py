"""Every entry of prefect.yaml loads, and its flow accepts its parameters."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect import Flow
from prefect.flows import load_flow_from_entrypoint

from training.presets import PRESETS
from training.settings import build_settings

ROOT = Path(__file__).parents[1]
DEPLOYMENTS = yaml.safe_load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))["deployments"]


def test_there_is_a_deployment_for_each_preset() -> None:
    assert [deployment["name"] for deployment in DEPLOYMENTS] == list(PRESETS)


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda item: item["name"])
def test_a_deployment_names_a_flow_that_accepts_its_parameters(
    deployment: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    flow: Flow[..., Any] = load_flow_from_entrypoint(deployment["entrypoint"])
    assert flow.name == "rotation-vit"
    accepted = flow.validate_parameters(deployment["parameters"])
    assert accepted["settings"] == build_settings(deployment["name"])
