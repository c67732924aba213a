"""Claims: one holder each, dropped with it, and none without a plan."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from data.claims import FOLDER, Claims
from data.processors import own_processors

HOLD = """
import json, sys, time
from pathlib import Path
from data.claims import Claims
with Claims(Path(sys.argv[1])).claim("a", json.loads(sys.argv[2])) as mine:
    print(mine, flush=True)
    time.sleep(60)
"""


def test_one_holds_a_part_and_then_it_is_done_for_all(tmp_path: Path) -> None:
    claims = Claims(tmp_path)
    plan = claims.invite({"made_from": "x"})
    with (
        claims.claim("a", plan) as first,
        Claims(tmp_path).claim("a", plan) as second,
        Claims(tmp_path).claim("b", plan) as other,
    ):
        assert (first, second, other) == (True, False, True)
    with claims.claim("a", plan) as again:
        assert not again


def test_a_part_whose_maker_failed_can_be_claimed_again(tmp_path: Path) -> None:
    claims = Claims(tmp_path)
    plan = claims.invite({})
    with pytest.raises(MemoryError), claims.claim("a", plan):
        raise MemoryError
    with claims.claim("a", plan) as again:
        assert again


def test_the_claim_of_a_killed_process_is_dropped(tmp_path: Path) -> None:
    claims = Claims(tmp_path)
    plan = claims.invite({})
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path), json.dumps(plan)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "True\n"
    with claims.claim("a", plan) as mine:
        assert not mine
    assert claims.held_here(["a", "b"]) == 1
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert claims.held_here(["a", "b"]) == 0
    with claims.claim("a", plan) as mine:
        assert mine


def test_what_is_said_to_be_done_and_is_not_there_for_long_can_be_claimed_again(
    tmp_path: Path,
) -> None:
    claims = Claims(tmp_path)
    plan = claims.invite({})
    with claims.claim("a", plan):
        pass
    (path,) = (tmp_path / FOLDER).glob("a*")
    os.utime(path, (time.time() - 300, time.time() - 300))
    with claims.claim("a", plan) as again:
        assert again


def test_other_machines_share_no_processors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    claims = Claims(tmp_path)
    plan = claims.invite({})
    with claims.claim("a", plan):
        assert claims.held_here(["a"]) == 1
        monkeypatch.setattr("platform.node", lambda: "another")
        assert claims.held_here(["a"]) == 0


@pytest.mark.parametrize("what", ["no plan", "another plan", "ended"])
def test_nothing_can_be_claimed_without_the_plan_that_it_belongs_to(
    tmp_path: Path, what: str
) -> None:
    claims = Claims(tmp_path)
    plan = claims.invite({"made_from": "x"})
    if what == "no plan":
        claims.withdraw()
    elif what == "another plan":
        claims.invite({"made_from": "x"})
    else:
        claims.end()
        assert not (tmp_path / FOLDER).exists()
    with claims.claim("a", plan) as mine:
        assert not mine


def test_what_one_plan_has_done_is_not_done_for_the_next(tmp_path: Path) -> None:
    claims = Claims(tmp_path)
    with claims.claim("a", claims.invite({})):
        pass
    with claims.claim("a", claims.invite({})) as mine:
        assert mine


def test_the_end_waits_for_those_who_work_on_a_part(tmp_path: Path) -> None:
    claims, order = Claims(tmp_path), list[str]()
    plan = claims.invite({})
    waits = threading.Event()

    def end() -> None:
        Claims(tmp_path).end(waiting=waits.set)
        order.append("ended")

    with claims.claim("a", plan):
        thread = threading.Thread(target=end)
        thread.start()
        assert waits.wait(timeout=10)
        assert claims.plan() is None, "nobody begins another part meanwhile"
        order.append("made")
    thread.join(timeout=10)
    assert order == ["made", "ended"]


def test_the_end_says_once_whom_it_waits_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    claims, looks = Claims(tmp_path), list[None]()
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path), json.dumps(claims.invite({}))],
        stdout=subprocess.PIPE,
        text=True,
    )

    def wait() -> None:
        looks.append(None)
        if len(looks) == 3:
            child.kill()

    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == "True\n"
        child.send_signal(signal.SIGSTOP)
        claims.end(waiting=wait)
    (said,) = caplog.messages
    assert f"on {own_processors()} that still works on a " in said
    assert str(tmp_path) in said
