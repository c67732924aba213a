"""The image and the Kubernetes template: what can be checked with neither Docker nor a cluster."""

import asyncio
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import prefect
import pytest
import yaml
from prefect.client.orchestration import PrefectClient
from prefect.server.schemas.actions import WorkPoolCreate
from prefect.utilities.schema_tools.validation import validate
from prefect.workers.base import BaseJobConfiguration

from flows import service
from tasks.child_process import GRACE_SECONDS

ROOT = Path(__file__).parents[1]
TEMPLATE: dict[str, Any] = json.loads((ROOT / "prefect.kubernetes.json").read_text())
VARIABLES: dict[str, Any] = TEMPLATE["variables"]["properties"]
CONTAINERS: dict[str, Any] = yaml.safe_load((ROOT / "prefect.containers.yaml").read_text())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

INSTRUCTIONS: list[tuple[str, str]] = []
"""Of the Dockerfile, without comments, a line each: what, and its words."""
for line in re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text()).splitlines():
    if line and not line.startswith("#"):
        what, _, words = line.partition(" ")
        INSTRUCTIONS.append((what, words))

FOR_KUBERNETES: dict[str, Any] = next(
    item["work_pool"]["job_variables"]
    for item in CONTAINERS["deployments"]
    if item["work_pool"]["name"] == "kubernetes"
)


def copied() -> list[Path]:
    """What the image is made of."""
    found = []
    for what, words in INSTRUCTIONS:
        if what == "COPY":
            found += [Path(word) for word in shlex.split(words)[:-1]]
    return found


def test_every_file_that_the_image_copies_is_there_and_every_package_is_copied() -> None:
    names = copied()
    assert [name for name in names if not (ROOT / name).exists()] == []
    needed = {*PROJECT["tool"]["setuptools"]["packages"], PROJECT["project"]["readme"]}
    assert needed <= {str(name) for name in names}
    # A folder goes where it is called so: `COPY flows .` would copy what is in it.
    for what, words in INSTRUCTIONS:
        if what == "COPY" and (ROOT / words.split()[0]).is_dir():
            source, target = words.split()
            assert source == target


def test_the_image_has_a_stage_for_each_variant_and_the_newest_python_that_it_may() -> None:
    stages = {
        words.partition(" AS ")[2]: words.partition(" AS ")[0]
        for what, words in INSTRUCTIONS
        if what == "FROM" and " AS " in words
    }
    assert stages.keys() == {"base", "torch-cuda", "torch-cpu"}
    assert ("ARG", "VARIANT=cuda") in INSTRUCTIONS
    assert INSTRUCTIONS.index(("ARG", "VARIANT=cuda")) < INSTRUCTIONS.index(
        ("FROM", f"{stages['base']} AS base")
    )
    assert ("FROM", "torch-${VARIANT}") in INSTRUCTIONS
    version = re.fullmatch(r"python:3\.(\d+)-slim", stages["base"])
    assert version
    least = re.search(r"3\.(\d+)", PROJECT["project"]["requires-python"])
    assert least
    assert int(version[1]) >= int(least[1])


def test_versions_in_the_image_are_the_tested_ones() -> None:
    installing = [words for what, words in INSTRUCTIONS if what == "RUN" and "pip install" in words]
    assert len(installing) == 3
    assert all("--constraint constraints.txt" in words for words in installing)


def test_deployments_begin_where_the_image_has_the_project() -> None:
    (place,) = (words for what, words in INSTRUCTIONS if what == "WORKDIR")
    (step,) = CONTAINERS["pull"]
    assert step["prefect.deployments.steps.set_working_directory"]["directory"] == place
    for deployment in CONTAINERS["deployments"]:
        assert Path(deployment["entrypoint"].partition("/")[0]) in copied()
        assert deployment["parameters"]["outputs"] == "/outputs"
    assert ("VOLUME", "/outputs") in INSTRUCTIONS


@pytest.mark.slow
def test_what_is_copied_is_enough_to_load_the_flows_and_every_stage(tmp_path: Path) -> None:
    """In a folder with nothing else, whose packages come before those that are installed."""
    for name in copied():
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.pyc"))
        else:
            shutil.copy(ROOT / name, tmp_path / name)
    code = """
import importlib, sys
from pathlib import Path
from prefect.flows import load_flow_from_entrypoint
from flows import cli
from training.stages import STAGES

load_flow_from_entrypoint(sys.argv[1])
for stage in STAGES.values():
    importlib.import_module(f"training.{stage.module_name}")
import training.report, training.publishing
ours = [module for name, module in sys.modules.items() if name.partition(".")[0] in sys.argv[2:]]
assert len(ours) > 50
print(*{str(Path(module.__file__).parents[len(module.__name__.split(".")) - (
    Path(module.__file__).name != "__init__.py")]) for module in ours if module.__file__})
"""
    entrypoint = CONTAINERS["deployments"][0]["entrypoint"]
    packages = PROJECT["tool"]["setuptools"]["packages"]
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, entrypoint, *packages],
        cwd=tmp_path,
        env={"PATH": "", "PYTHONPATH": str(tmp_path), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path)]
    for pattern in PROJECT["tool"]["setuptools"]["package-data"]["training"]:
        assert list((tmp_path / "training").glob(pattern))


def prefects_own() -> dict[str, Any]:
    """The template that Prefect would make a Kubernetes pool with."""
    path = Path(prefect.__file__).parent / "server/api/collections_data/views"
    known = json.loads((path / "aggregate-worker-metadata.json").read_text())
    found: dict[str, Any] = known["prefect-kubernetes"]["kubernetes"][
        "default_base_job_configuration"
    ]
    return found


def test_a_work_pool_takes_the_template() -> None:
    """With the check of Prefect's server: every placeholder is a variable."""
    made = WorkPoolCreate(name="kubernetes", type="kubernetes", base_job_template=TEMPLATE)
    assert made.base_job_template == TEMPLATE
    used = set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(TEMPLATE["job_configuration"])))
    assert used == set(VARIABLES), "a variable that nothing uses has no effect"


def test_the_template_has_all_that_prefects_own_one_has() -> None:
    own = prefects_own()
    assert set(own["variables"]["properties"]) <= set(VARIABLES)

    def missing(expected: Any, found: Any, path: str) -> list[str]:
        if isinstance(expected, dict):
            return [
                name
                for key, value in expected.items()
                for name in (
                    missing(value, found[key], f"{path}/{key}")
                    if isinstance(found, dict) and key in found
                    else [f"{path}/{key}"]
                )
            ]
        if isinstance(expected, list):
            pairs = zip(expected, found, strict=True)
            return [name for one, other in pairs for name in missing(one, other, f"{path}[]")]
        return [] if expected == found else [f"{path}: {found}, not {expected}"]

    assert missing(own["job_configuration"], TEMPLATE["job_configuration"], "") == []


def test_every_variable_says_what_it_is_and_its_default_is_one_of_its_values() -> None:
    assert [name for name, item in VARIABLES.items() if not item.get("description")] == []
    defaults = {name: item["default"] for name, item in VARIABLES.items() if "default" in item}
    validate(defaults, TEMPLATE["variables"])
    validate(FOR_KUBERNETES, TEMPLATE["variables"])


NOBODY = PrefectClient("http://127.0.0.1:9/api")
"""Need not answer: the template names none of the blocks and variables that a server keeps."""


class JobConfiguration(BaseJobConfiguration):
    """What of the Kubernetes worker's own configuration is not Prefect's base class."""

    job_manifest: dict[str, Any]


def configured(**values: Any) -> JobConfiguration:
    """The job of our deployment, with some variables of a run."""
    made: JobConfiguration = asyncio.run(
        JobConfiguration.from_template_and_values(
            TEMPLATE, {**FOR_KUBERNETES, **values}, client=NOBODY
        )
    )
    return made


def test_a_pod_gets_what_a_training_needs() -> None:
    made = configured(cpu_request="8")
    job = made.job_manifest
    assert "ttlSecondsAfterFinished" in job["spec"]
    assert job["spec"]["backoffLimit"] == 0, "Prefect starts it again, not Kubernetes too"
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"] == {"requests": {"cpu": "8"}, "limits": {"nvidia.com/gpu": 1}}
    mounted = {item["mountPath"]: item["name"] for item in container["volumeMounts"]}
    volumes = {item["name"]: item for item in pod["volumes"]}
    assert "claimName" in volumes[mounted["/outputs"]]["persistentVolumeClaim"]
    assert volumes[mounted["/dev/shm"]]["emptyDir"] == {"medium": "Memory", "sizeLimit": "2Gi"}
    assert container["envFrom"] == [{"secretRef": {"name": "rotation-vit", "optional": True}}]
    assert made.env["PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR"] == "reschedule"
    assert made.env["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == str(service.HEARTBEAT_SECONDS)
    # Prefect waits 30 seconds for a run to end, which waits for its training, and then kills it.
    assert GRACE_SECONDS < 30 < pod["terminationGracePeriodSeconds"]
    assert VARIABLES["termination_grace_seconds"]["minimum"] > 30
    assert "serviceAccountName" not in pod


def test_a_run_sets_what_its_pod_gets() -> None:
    spot = {"cloud.google.com/gke-spot": "true"}
    tolerations = [{"key": "nvidia.com/gpu", "operator": "Exists"}]
    made = configured(
        gpus=8,
        node_selector=spot,
        tolerations=tolerations,
        termination_grace_seconds=90,
        shared_memory="8Gi",
        outputs_claim="elsewhere",
        image_pull_secrets=[{"name": "my-registry"}],
        env={"HF_ENDPOINT": "http://mirror"},
    )
    pod = made.job_manifest["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == spot
    assert pod["tolerations"] == tolerations
    assert pod["terminationGracePeriodSeconds"] == 90
    assert pod["imagePullSecrets"] == [{"name": "my-registry"}]
    assert pod["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert made.env == {**VARIABLES["env"]["default"], "HF_ENDPOINT": "http://mirror"}
    assert [item.get("persistentVolumeClaim") for item in pod["volumes"]] == [
        {"claimName": "elsewhere"},
        None,
    ]
    assert pod["volumes"][1]["emptyDir"]["sizeLimit"] == "8Gi"


def test_the_kubernetes_worker_makes_its_job_of_it() -> None:
    from prefect_kubernetes import worker  # not at the top: it takes long to import

    made = asyncio.run(
        worker.KubernetesWorkerJobConfiguration.from_template_and_values(
            TEMPLATE, FOR_KUBERNETES, client=NOBODY
        )
    )
    made._populate_env_in_manifest()
    made._populate_command_if_not_present()
    (container,) = made.job_manifest["spec"]["template"]["spec"]["containers"]
    assert container["args"] == ["prefect", "flow-run", "execute"]
    assert {"name": "PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR", "value": "reschedule"} in (
        container["env"]
    )
