"""`make ui`: server, automations, deployments and worker from one command, which ends them all."""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from prefect import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows import service

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]


def command(home: Path, port: int) -> list[str]:
    return [sys.executable, "-m", "flows.service", "--home", str(home), "--port", str(port)]


def written(home: Path) -> str:
    return (home / "service.log").read_text()


@contextmanager
def running(home: Path, port: int) -> Iterator[psutil.Process]:
    """The service, once it has printed the address; SIGTERM at the end."""
    with (
        (home / "service.log").open("w+") as log,
        subprocess.Popen(command(home, port), cwd=ROOT, stdout=log, stderr=log) as process,
    ):
        try:
            deadline = time.monotonic() + 240
            while (
                f"Prefect's UI: http://127.0.0.1:{port}" not in (home / "service.log").read_text()
            ):
                assert process.poll() is None, (home / "service.log").read_text()
                assert time.monotonic() < deadline, (home / "service.log").read_text()
                time.sleep(0.5)
            yield psutil.Process(process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0


def test_another_server_must_be_named_and_answer(capsys: pytest.CaptureFixture[str]) -> None:
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        assert service.main(["--set-up"]) == 2
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        assert service.main(["--set-up"]) == 2
    said = capsys.readouterr().out
    assert "PREFECT_API_URL must name a server" in said
    assert "must answer at PREFECT_API_URL=http://127.0.0.1:9/api" in said


def test_one_command_starts_everything_twice_the_same_and_ends_it(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind((service.HOST, 0))
        port = probe.getsockname()[1]
    home = tmp_path / "home"
    home.mkdir()
    found = []
    for _ in range(2):
        with running(home, port) as process:
            parts = process.children(recursive=True)
            listening = {
                connection.laddr.ip
                for part in parts
                for connection in part.net_connections(kind="inet")
                if connection.status == psutil.CONN_LISTEN
            }
            assert listening == {service.HOST}, "nobody else on the network can reach it"
            taken = subprocess.run(
                command(home, port), cwd=ROOT, capture_output=True, text=True, check=False
            )
            assert (taken.returncode, len(taken.stdout.splitlines())) == (2, 1)
            assert f"--port {port + 1}" in taken.stdout
            with (
                temporary_settings({PREFECT_API_URL: f"http://{service.HOST}:{port}/api"}),
                get_client(sync_client=True) as client,
            ):
                assert client.read_work_pool(service.POOL).type == "process"
                found.append(
                    (
                        {(each.flow_id, each.name): each.id for each in client.read_deployments()},
                        {
                            each.name: client.read_automations_by_name(each.name)[0].id
                            for each in service.automations()
                        },
                    )
                )
        _, alive = psutil.wait_procs(parts, timeout=30)
        assert alive == []
    assert {"drawn", "imagenette", "imagenet", "cifar10"} <= {name for _, name in found[0][0]}
    assert len(found[0][1]) == len(service.automations())
    assert found[1] == found[0], "the second start finds what the first one made"
    assert (home / "prefect.db").is_file(), "everything lies in the project's own PREFECT_HOME"
