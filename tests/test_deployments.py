"""Every entry of the deployment files loads, and its flow accepts its parameters."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect import Flow
from prefect.exceptions import ParameterTypeError
from prefect.flows import load_flow_from_entrypoint
from prefect.utilities.callables import parameter_schema

from flows import service
from training.configure import build_settings
from training.presets import PRESETS
from training.stages import STAGES

ROOT = Path(__file__).parents[1]


def deployments(file: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = yaml.safe_load((ROOT / file).read_text())["deployments"]
    return found


HERE, IN_CONTAINERS = deployments("prefect.yaml"), deployments("prefect.containers.yaml")


def flow_of(deployment: dict[str, Any]) -> Flow[..., Any]:
    return load_flow_from_entrypoint(deployment["entrypoint"])


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_there_is_a_deployment_of_the_whole_workflow_for_each_preset() -> None:
    whole = [item["name"] for item in HERE if flow_of(item).name == "rotation-vit"]
    assert whole == list(PRESETS)


def test_what_people_schedule_alone_has_deployments() -> None:
    assert {flow_of(item).name for item in HERE} == {"rotation-vit", "pretrain", "feature-analysis"}


def test_no_two_deployments_of_a_flow_share_a_name() -> None:
    for group in (HERE, IN_CONTAINERS):
        names = [(flow_of(item).name, item["name"]) for item in group]
        assert len(set(names)) == len(names)


@pytest.mark.parametrize("deployment", HERE + IN_CONTAINERS, ids=lambda item: item["name"])
def test_a_deployment_names_a_flow_that_accepts_its_parameters(deployment: dict[str, Any]) -> None:
    accepted = flow_of(deployment).validate_parameters(deployment["parameters"])
    settings = build_settings(deployment["name"].partition("-")[0])
    assert accepted["settings"] == settings
    # All of them: where one is left out, the form in Prefect's UI offers the default of its
    # section, which is the mission's and not the preset's, and submits it.
    assert deployment["parameters"]["settings"] == settings.model_dump(mode="json")


@pytest.mark.parametrize("deployment", HERE + IN_CONTAINERS, ids=lambda item: item["name"])
def test_flow_runs_give_signs_of_life_as_often_as_the_automation_expects(
    deployment: dict[str, Any],
) -> None:
    environment = deployment["work_pool"]["job_variables"]["env"]
    assert environment["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == str(service.HEARTBEAT_SECONDS)


def test_the_form_names_every_setting_with_its_meaning_and_choices() -> None:
    """What Prefect's UI draws its form from."""
    schema = parameter_schema(flow_of(HERE[0])).model_dump()
    assert list(schema["properties"]) == ["settings", "outputs", "overrides", "until", "refresh"]
    assert "path.to.setting=value" in schema["properties"]["overrides"]["description"]
    pretrain = schema["definitions"]["PretrainSettings"]["properties"]
    assert pretrain["epochs"]["default"] == 5
    assert "Passes over the training images" in pretrain["epochs"]["description"]
    assert pretrain["rotations"]["enum"] == ["all", "random"]
    assert schema["definitions"]["Settings"]["properties"]["preset"]["enum"] == list(PRESETS)
    stages = [name.replace("_", "-") for name in STAGES]
    assert schema["properties"]["until"]["anyOf"][0]["enum"] == stages
    assert schema["properties"]["refresh"]["items"]["enum"] == stages


def test_a_stage_that_there_is_not_is_refused_with_the_parameters() -> None:
    whole = flow_of(HERE[0])
    parameters = HERE[0]["parameters"]
    assert whole.validate_parameters({**parameters, "until": "linear_probe"})["until"] == (
        "linear-probe"
    )
    with pytest.raises(ParameterTypeError, match="until"):
        whole.validate_parameters({**parameters, "until": "pretrian"})
