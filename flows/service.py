"""Prefect on this machine: a server with its UI, what the flows need on it, and a worker.

`make ui` runs this module: `python -m flows.service`. Everything lies in the project's own
`PREFECT_HOME`, `.prefect/`, and listens on the loopback interface only. Ctrl-C ends it; trainings
that run then save their state and end too.
"""

import argparse
import http.client
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # Prefect reads its settings when it is imported, and main() sets them first
    from prefect.automations import AutomationCore

ROOT = Path(__file__).parents[1]

HOST, PORT = "127.0.0.1", 4200

POOL = "local"

OUR_TAG = "rotation-vit"
"""Tag of all deployments in prefect.yaml."""

AUTO_RESUME = "auto-resume"
"""Tag of flow runs that are started again when they crash."""

MOST_CRASHES = 5
"""Crashes after which a flow run loses the tag and is left to a person."""

HEARTBEAT_SECONDS = 30
"""Time between two signs of life of a flow run; the shortest that Prefect allows."""

SILENCE_SECONDS = 115
"""Silence after which a flow run counts as crashed. A run whose server was away for a minute is
silent for up to 90 seconds; somebody who waits should know within two minutes."""

RESUME_SECONDS = 10
"""Time between a crash and the next start of a run that resumes by itself; Prefect allows no
less."""

STARTED_AGAIN = ("Scheduled", "AwaitingRetry", "Pending", "Running")
"""States of a crashed run that somebody has started again."""

STOP_SECONDS = 40
"""Longest time that the worker may take to stop: its trainings save their state."""

START_SECONDS = 120
"""Longest time that the server may take to start."""


def environment(home: Path, port: int) -> dict[str, str]:
    """Return the environment of everything that talks to this server."""
    return {
        **os.environ,
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": f"http://{HOST}:{port}/api",
        "PREFECT_SERVER_API_HOST": HOST,
        "PREFECT_SERVER_API_PORT": str(port),  # or the UI looks for the API at 4200
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        # In memory, as they are by default, leases of the GPU slot do not survive the server, and
        # nobody could give the slot back.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": (
            "prefect.server.concurrency.lease_storage.filesystem"
        ),
        # Five minutes by default, for which a run that has lost its tag would be started again.
        "PREFECT_SERVER_EVENTS_RELATED_RESOURCE_CACHE_TTL": "PT1S",
        "PWD": str(ROOT),  # prefect.yaml names it, and cwd= does not change it
        "DO_NOT_TRACK": "1",
        "PREFECT_WORKER_QUERY_SECONDS": os.environ.get("PREFECT_WORKER_QUERY_SECONDS", "3"),
    }


def set_up() -> None:
    """Make the work pool, the GPU slot and the automations, or bring them up to date.

    On the server of the environment. Doing it again changes nothing, but for what runs that were
    found dead have left.
    """
    from prefect import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectNotFound

    from flows.hooks import tidy_up_after_others
    from tasks.gpu_slot import SLOT

    with get_client(sync_client=True) as client:
        try:
            client.read_work_pool(POOL)
        except ObjectNotFound:
            client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))
        try:
            client.read_global_concurrency_limit_by_name(SLOT)  # its size is the user's
        except ObjectNotFound:
            client.upsert_global_concurrency_limit_by_name(SLOT, limit=1)
        for automation in automations():
            found = client.read_automations_by_name(automation.name)
            if not found:
                client.create_automation(automation)
            for old in found:
                # Left alone where it is the same: with it would go what it knows about the runs
                # that it watches, and those that died with the server would run for ever.
                if _what_it_does(old) != _what_it_does(automation):
                    changed = automation.model_copy(update={"enabled": old.enabled})
                    client.update_automation(old.id, changed)
    tidy_up_after_others()


def _what_it_does(automation: "AutomationCore") -> dict[str, Any]:
    compared = {"description", "trigger", "actions"}
    return automation.model_dump(mode="json", include=compared, exclude={"trigger": {"id"}})


def automations() -> list["AutomationCore"]:
    """Return the automations: silent runs are crashed, crashed ones with the tag start again."""
    from prefect.automations import AutomationCore, EventTrigger, Posture
    from prefect.client.schemas.objects import StateType
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.events import ResourceSpecification

    any_run = ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"})
    ours, to_resume = (
        ResourceSpecification(
            {"prefect.resource.role": "tag", "prefect.resource.id": f"prefect.tag.{tag}"}
        )
        for tag in (OUR_TAG, AUTO_RESUME)
    )
    return [
        AutomationCore(
            name="rotation-vit: crash silent runs",
            description=f"No sign of life for {SILENCE_SECONDS} s: the process is gone.",
            trigger=EventTrigger(
                posture=Posture.Proactive,
                after={"prefect.flow-run.heartbeat"},
                expect={"prefect.flow-run.*"},
                match=any_run,
                match_related=ours,  # others have other heartbeats
                for_each={"prefect.resource.id"},
                threshold=1,
                within=timedelta(seconds=SILENCE_SECONDS),
            ),
            actions=[
                ChangeFlowRunState(
                    state=StateType.CRASHED,
                    message=f"No sign of life for {SILENCE_SECONDS} s. A new run resumes.",
                )
            ],
        ),
        AutomationCore(
            name="rotation-vit: resume crashed runs",
            description=f"Starts crashed flow runs tagged {AUTO_RESUME} again; they resume.",
            trigger=EventTrigger(
                # Not at once: the worker reports some deaths a second time some seconds later, but
                # only of runs that are not in a final state. Started again by then, the run would
                # be crashed and started once more, beside the attempt that is under way.
                posture=Posture.Proactive,
                after={"prefect.flow-run.Crashed"},
                expect={f"prefect.flow-run.{name}" for name in STARTED_AGAIN},
                match=any_run,
                match_related=to_resume,
                for_each={"prefect.resource.id"},
                threshold=1,
                within=timedelta(seconds=RESUME_SECONDS),
            ),
            actions=[
                ChangeFlowRunState(
                    state=StateType.SCHEDULED,
                    name="AwaitingRetry",
                    message="Crashed; starts again by itself and resumes.",
                )
            ],
        ),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Start everything, print the address, and wait for Ctrl-C; or set another server up."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--home", type=Path, default=ROOT / ".prefect", help="PREFECT_HOME")
    parser.add_argument("--port", type=int, default=PORT)
    parser.add_argument(
        "--set-up",
        action="store_true",
        help="start nothing: make work pool, GPU slot and automations on the server of "
        "PREFECT_API_URL, such as one that containers reach",
    )
    options = parser.parse_args(arguments)
    if options.set_up:
        return _set_up_another()
    if _answers(options.port):
        _say(f"Port {options.port} is taken. Choose another one: --port {options.port + 1}")
        return 2
    os.environ |= environment(options.home.resolve(), options.port)
    # A closed terminal and SIGTERM end the with blocks below as Ctrl-C does.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        with _process("server", "start", "--host", HOST, "--port", str(options.port)) as server:
            _wait_for(server, options.port)
            set_up()
            deploying = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
            deployed = subprocess.run(deploying, cwd=ROOT, capture_output=True, text=True)
            if deployed.returncode:
                _say(f"prefect deploy --all failed:\n{deployed.stdout}{deployed.stderr}")
                return 1
            with _process("worker", "start", "--pool", POOL, "--type", "process") as worker:
                _say(
                    f"Prefect's UI: http://{HOST}:{options.port}\n"
                    f"For other terminals: export PREFECT_API_URL=http://{HOST}:{options.port}/api\n"
                    "Then, for example: prefect deployment run rotation-vit/drawn\n"
                    "Ctrl-C ends server and worker; what trains saves its state."
                )
                while server.poll() is None and worker.poll() is None:
                    time.sleep(0.5)
                _say("The server or the worker has ended; see the lines above.")
                return 1
    except KeyboardInterrupt:
        return 0


def _set_up_another() -> int:
    import httpx
    from prefect.exceptions import PrefectHTTPStatusError
    from prefect.settings import PREFECT_API_URL

    url = PREFECT_API_URL.value()  # of the environment, or of the active profile
    if not url:
        _say("PREFECT_API_URL must name a server, such as http://10.0.0.5:4200/api.")
        return 2
    try:
        set_up()
    except (OSError, httpx.TransportError, PrefectHTTPStatusError) as error:
        _say(f"Prefect's server must answer at PREFECT_API_URL={url}, it does not: {error}")
        return 2
    _say(f"{url} has the work pool {POOL}, the GPU slot and the automations.")
    return 0


@contextmanager
def _process(*arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "prefect", *arguments]
    # A session of its own: Ctrl-C ends the worker before the server it reports to.
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(timeout=STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait_for(server: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not _answers(port):
        if server.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"Prefect's server did not start within {START_SECONDS} s.")
        time.sleep(0.5)


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://{HOST}:{port}/api/health", timeout=2):
            return True
    except (urllib.error.HTTPError, http.client.HTTPException):
        return True
    except OSError:
        return False


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
