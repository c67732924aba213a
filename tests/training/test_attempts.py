"""What an attempt at a stage keeps of earlier ones, wherever these were cut off."""

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from data.claims import Claims
from training import attempts, store
from training.lock import locked
from training.runner import Compute, run_stage
from training.stage_files import CHECKPOINTS
from training.store import StageRequest

Request = Callable[..., StageRequest]


def test_a_refresh_removes_everything_once_per_flow_run(
    request_pretrain: Request, compute: Compute
) -> None:
    request = request_pretrain()
    run_stage(request, compute)
    attempts.refresh(request, "first")
    assert not request.directory.exists()
    (request.directory / CHECKPOINTS / "step-00000009").mkdir(parents=True)
    attempts.refresh(request, "first")
    assert store.inspect(request).step == 9, "a retry goes on"
    run_stage(request, compute)
    attempts.refresh(request, "first")
    assert store.inspect(request).state == "cached", "it is not computed twice"
    attempts.refresh(request, "second")
    assert store.inspect(request).state == "missing"


def test_a_refresh_keeps_the_work_of_an_interrupted_one_and_no_other(
    request_pretrain: Request, caplog: pytest.LogCaptureFixture
) -> None:
    request = request_pretrain()
    checkpoint = request.directory / CHECKPOINTS / "step-00000009"
    checkpoint.mkdir(parents=True)
    attempts.refresh(request, "first")
    assert not checkpoint.exists()
    checkpoint.mkdir(parents=True)
    attempts.refresh(request, "second")
    assert checkpoint.exists()
    assert "pretrain goes on at step 9 of the refresh that was interrupted" in caplog.text
    assert f"delete {request.directory}" in caplog.text


@pytest.mark.parametrize("number", range(1, 12))
def test_outdated_work_that_is_cleared_only_in_part_is_never_built_on(
    request_pretrain: Request, compute: Compute, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """The process is killed before each thing that it takes away."""
    old = request_pretrain(data_digest="old")
    run_stage(old, compute)
    (old.directory / CHECKPOINTS / "step-00000001").mkdir(parents=True)
    new = old.model_copy(deep=True)
    new.inputs["data"].digest = "new"  # the same key; the images were prepared again
    assert store.inspect(new).stale == "outdated"
    done = 0

    def killed(*_: object, **__: object) -> None:
        nonlocal done
        done += 1
        if done == number:
            raise KeyboardInterrupt

    original_remove_tree, original_unlink = shutil.rmtree, Path.unlink

    def remove_tree(path: Path, ignore_errors: bool = False) -> None:
        killed()
        original_remove_tree(path, ignore_errors)

    def unlink(path: Path, missing_ok: bool = False) -> None:
        killed()
        original_unlink(path, missing_ok)

    with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", remove_tree)
        patch.setattr(Path, "unlink", unlink)
        attempts.begin(new)
    verdict = store.inspect(new)
    left_to_build_on = (new.directory / CHECKPOINTS).exists() or verdict.state == "cached"
    assert verdict.state != "cached"
    if left_to_build_on:
        assert verdict.stale == "outdated"


def test_a_refresh_waits_for_those_who_helped_one_that_was_killed(
    request_pretrain: Request,
) -> None:
    request = request_pretrain()
    claims = Claims(request.directory)
    with ThreadPoolExecutor(1) as pool:
        with claims.claim("part", claims.invite({})):
            refreshing = pool.submit(attempts.refresh, request, "run")
            with pytest.raises(TimeoutError):
                refreshing.result(timeout=0.5)
            assert request.directory.exists()
        refreshing.result(timeout=10)
    assert not request.directory.exists()


def test_a_stage_that_another_run_computes_is_begun_where_help_is_wanted_and_only_there(
    request_pretrain: Request,
) -> None:
    request = request_pretrain()
    with ThreadPoolExecutor(1) as pool, locked(attempts.lock_path(request), what="it"):
        beginning = pool.submit(attempts.begin_or_help, request)
        with pytest.raises(TimeoutError):
            beginning.result(timeout=0.5)
        Claims(request.directory).invite({})
        assert beginning.result(timeout=10) is None
    assert store.read_config(request.directory) == request
