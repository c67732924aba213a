"""constraints.txt and pyproject.toml must not drift apart."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REQUIREMENTS = [
    Requirement(text)
    for text in sum(PROJECT["optional-dependencies"].values(), PROJECT["dependencies"])
]
LINES = [
    line
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
]
PINNED = {Requirement(line).name.lower().replace("_", "-"): Requirement(line) for line in LINES}


def test_the_checks_have_what_every_extra_asks_for() -> None:
    extras = PROJECT["optional-dependencies"]
    assert {text for texts in extras.values() for text in texts} == set(extras["dev"])


def test_every_line_is_an_exact_version() -> None:
    wrong = [line for line in LINES if not re.fullmatch(r"[\w.-]+==[\w.!+-]+", line)]
    assert wrong == []


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda item: item.name)
def test_each_dependency_has_a_tested_version_that_it_accepts(requirement: Requirement) -> None:
    pinned = PINNED[requirement.name.lower().replace("_", "-")]
    version = next(iter(pinned.specifier)).version
    assert requirement.specifier.contains(version), f"{pinned} is outside {requirement}"
