"""How often a stage is tried, and when it counts as cached."""

import itertools
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prefect import flow, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName

from tasks.child_process import StageFailedError
from tasks.delivery import attempts_without_progress, deliver, stage_task
from tasks.prepare_data import prepare_data
from tasks.pretrain import pretrain
from training import attempts, remote_outputs, store
from training.configure import validate
from training.errors import ERRORS_BY_NAME
from training.remote_store import StoreAwayError
from training.settings import ConfigError, merge
from training.stages import STAGES
from training.store import StageRequest, StageResult


@pytest.mark.parametrize(
    ("steps", "fruitless"),
    [
        ([], 0),
        ([0], 1),
        ([0, 0, 0], 3),
        ([5], 0),
        ([5, 9, 12], 0),
        ([5, 5], 1),
        ([5, 0, 5], 2),
        ([5, 5, 6], 0),
    ],
)
def test_only_attempts_that_get_no_further_count(steps: list[int], fruitless: int) -> None:
    assert attempts_without_progress(steps) == fruitless


@pytest.fixture
def request_of(
    run_stages: Callable[..., dict[str, StageResult]],
    tiny_values: dict[str, Any],
    tmp_path: Path,
) -> Callable[..., StageRequest]:
    """The request of a pretraining, with changed settings."""

    def make(**changes: Any) -> StageRequest:
        settings = validate(merge(tiny_values, {"pretrain": changes}))
        results = run_stages(settings, tmp_path, "prepare_data")
        return store.make_request(STAGES["pretrain"], settings, tmp_path, results)

    return make


def states(flow_run_name: str) -> list[str]:
    """Names of the states that the only task run of a flow run went through."""
    with get_client(sync_client=True) as client:
        (run,) = client.read_task_runs(
            flow_run_filter=FlowRunFilter(name=FlowRunFilterName(any_=[flow_run_name]))
        )
        return [state.name or "" for state in client.read_task_run_states(run.id)]


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_backend")
def test_who_waited_for_another_runs_pretraining_shows_it_as_cached(
    request_of: Callable[..., StageRequest], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="training")
    request = request_of(epochs=400)
    attempts.begin(request)

    @flow(flow_run_name="waits")
    def waits() -> StageResult:
        return deliver(pretrain, request)

    with subprocess.Popen([sys.executable, "-m", "training.pretrain", request.directory]) as other:
        while not list(request.directory.glob("checkpoints/step-*")):
            time.sleep(0.05)
        result = waits()
    assert other.returncode == 0
    assert "Waiting for another run that computes pretrain" in caplog.text
    assert result.status == "cached"
    assert result == store.inspect(request).result
    assert states("waits")[-1] == "Cached"


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_backend")
def test_a_stage_is_tried_again_as_long_as_it_gets_further(
    request_of: Callable[..., StageRequest],
) -> None:
    request = request_of()
    amounts = [0, 5, 5, 9, 9, 9, 12]
    tried: list[int] = []

    @stage_task(waits=[0], fruitless=1)
    def crashing(request: StageRequest) -> StageResult:
        tried.append(amounts[len(tried)])
        raise StageFailedError("It crashed.", reached=tried[-1])

    @flow(flow_run_name="tries")
    def tries() -> StageResult:
        return deliver(crashing, request)

    with pytest.raises(StageFailedError):
        tries()
    assert tried == [0, 5, 5, 9, 9, 9]


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_backend")
def test_a_users_mistake_is_not_tried_again(request_of: Callable[..., StageRequest]) -> None:
    tried: list[StageRequest] = []

    @stage_task(waits=[0])
    def mistaken(request: StageRequest) -> StageResult:
        tried.append(request)
        raise ConfigError("No such thing.")

    @flow
    def tries() -> StageResult:
        return deliver(mistaken, request_of())

    with pytest.raises(ConfigError):
        tries()
    assert len(tried) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_backend")
def test_a_store_that_is_away_is_asked_again_by_the_task(
    request_of: Callable[..., StageRequest],
) -> None:
    """Whatever process it was away for: what a child says of it counts alike."""
    tried: list[StageRequest] = []

    @stage_task(waits=[0], fruitless=2)
    def storing(request: StageRequest) -> StageResult:
        tried.append(request)
        raise ERRORS_BY_NAME["StoreAwayError"]("The store is away.")

    @flow
    def tries() -> StageResult:
        return deliver(storing, request_of())

    with pytest.raises(StoreAwayError):
        tries()
    assert len(tried) == 3


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_backend")
def test_what_another_machine_has_stored_counts_before_what_is_here_alone(
    run_stages: Callable[..., dict[str, StageResult]],
    tiny_values: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = validate(tiny_values)
    here = run_stages(settings, tmp_path, "prepare_data")["prepare_data"]
    request = store.make_request(STAGES["prepare_data"], settings, tmp_path, {})
    assert store.inspect(request).result is not None
    theirs = here.model_copy(update={"scores": {**here.scores, "skipped": 1}})

    @stage_task(waits=[0])
    def storing(request: StageRequest) -> StageResult:
        return theirs

    @flow
    def delivers() -> StageResult:
        return deliver(storing, request)

    for is_stored, expected in ((False, theirs), (True, here)):
        monkeypatch.setattr(remote_outputs, "is_stored", lambda request, found=is_stored: found)
        assert delivers().scores == expected.scores


def test_what_waits_for_networks_waits_longer_each_time() -> None:
    waits = prepare_data.retry_delay_seconds
    assert isinstance(waits, list)
    assert len(waits) == 5
    assert all(later > earlier for earlier, later in itertools.pairwise(waits))
