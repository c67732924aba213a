"""A run that crashes whenever it begins: apart from other crashes, as giving up takes minutes."""

import time
from typing import TYPE_CHECKING

import pytest

from flows.service import AUTO_RESUME, MOST_CRASHES, RESUME_SECONDS
from tests.e2e.marks import END_TO_END, ENDLESS

if TYPE_CHECKING:  # the tests are no package that could be imported from
    from tests.e2e.conftest import Prefect

pytestmark = END_TO_END


@pytest.mark.parametrize("when", ["running", "starting"])
def test_a_run_that_crashes_again_and_again_is_left_to_a_person(
    prefect: "Prefect", seed: int, when: str
) -> None:
    run = prefect.deployment_run(
        "pretrain/drawn", overrides=[f"seed={seed}", ENDLESS], tags=[AUTO_RESUME]
    )
    killed: set[int] = set()
    deadline = time.monotonic() + 300
    while len(killed) <= MOST_CRASHES and time.monotonic() < deadline:
        for engine in prefect.engines():
            if when == "starting" or prefect.flow_run(run).state_name == "Running":
                killed.add(engine.pid)
                engine.kill()
        time.sleep(0.3)
        if AUTO_RESUME not in prefect.flow_run(run).tags:
            break
    assert any("not started again by itself" in line for line in prefect.logs(run))
    time.sleep(RESUME_SECONDS + 10)  # the last crash may still have had the tag
    for engine in prefect.engines():
        killed.add(engine.pid)
        engine.kill()
    time.sleep(RESUME_SECONDS + 10)
    assert prefect.engines() == []
    assert prefect.flow_run(run).state_name == "Crashed"
    assert MOST_CRASHES <= len(killed) <= MOST_CRASHES + 1
