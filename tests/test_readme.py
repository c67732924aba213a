"""What the README says is so: its map, its commands, its numbers, its pictures."""

import itertools
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from data.records import Source
from data.sources import REGISTERED
from training.configure import build_settings, setting_names
from training.presets import PRESETS
from training.run_record import run_name
from training.stages import STAGES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PACKAGES = ("flows", "tasks", "training", "models", "data")
COMMANDS = re.findall(r"^ {4}(rotvit .*)$|`(rotvit [^`]*)`", README, flags=re.MULTILINE)
RESULTS = json.loads((ROOT / "benchmarks" / "results" / "drawn.json").read_bytes())["stages"]


def test_the_map_names_every_module_and_nothing_else() -> None:
    named: set[str] = set()
    folder = ""
    for line in README.splitlines():
        if found := re.match(r"(\w+)/ {2,}\S", line):
            folder = found[1]
        elif folder and (found := re.match(r"  (\w+\.py) {2,}\S", line)):
            named.add(f"{folder}/{found[1]}")
    present = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).glob("*.py")
        if path.name != "__init__.py"
    }
    assert named == present


def test_pictures_and_linked_files_are_there() -> None:
    linked = re.findall(r"\]\((?!https?:|#)([^)#]+)", README)
    assert linked
    assert [path for path in linked if not (ROOT / path).is_file()] == []


def test_linked_headings_are_there() -> None:
    headings = {
        re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.+)$", README, flags=re.MULTILINE)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= headings


@pytest.mark.parametrize("command", sorted({a or b for a, b in COMMANDS}))
def test_every_command_and_setting_exists(command: str) -> None:
    words = shlex.split(command, comments=True)
    known = {"run", "status", "presets", "config", "canary", "predict", "upright", "export"} | {
        "publish",
        "push-shards",
        *(name.replace("_", "-") for name in STAGES),
    }
    assert words[1] in known
    for option, value in itertools.pairwise(words[2:]):
        if option == "--set" and "path.to.setting" not in value:
            assert value.partition("=")[0] in setting_names()
        if option == "--preset":
            assert value in PRESETS


def test_the_run_whose_models_are_used_is_that_of_the_default_preset() -> None:
    assert set(re.findall(r"drawn-seed0-\w+", README)) == {run_name(build_settings("drawn"))}


def test_the_make_targets_exist() -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert set(re.findall(r"make (\w+)", README)) - {"installs"} <= set(targets)


def test_the_deployment_exists() -> None:
    deployed = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    names = {f"rotation-vit/{deployment['name']}" for deployment in deployed}
    assert set(re.findall(r"rotation-vit/\w+", README)) <= names


@pytest.mark.parametrize(
    ("row", "stage", "score"),
    [
        ("rotation accuracy", "pretrain", "rotation_accuracy"),
        ("linear probe, random backbone", "linear_probe", "random_backbone_top1"),
        ("linear probe", "linear_probe", "top1"),
        ("fine-tune 1", "finetune_1", "top1"),
        ("fine-tune 2", "finetune_2", "top1"),
        ("from scratch", "from_scratch", "top1"),
    ],
)
def test_the_table_is_that_of_the_recorded_run(row: str, stage: str, score: str) -> None:
    cells = re.findall(r"^\| ([^|]+) \| \**([\d.]+)\** \|", README, flags=re.MULTILINE)
    shown = {re.split(r":| \(|, same", label)[0]: number for label, number in cells}
    assert shown[row] == f"{RESULTS[stage][score]:.3f}"


def test_the_source_of_ones_own_works() -> None:
    found = re.search(r"```python\n(# my_images\.py\n.*?)```", README, flags=re.DOTALL)
    assert found
    names: dict[str, Any] = {}
    exec(found[1], names)
    source = names["Numbered"]("5")
    assert isinstance(source, Source)
    assert [record.label for record in source.records("train", start=1)] == [1, 0, 1, 0]
    assert f'"{REGISTERED}"' in README
