"""A laptop without network: no wait, no noise."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from training.configure import to_yaml
from training.settings import Settings

WITHOUT_NETWORK = """
import fcntl, os, socket, struct, sys
SIOCSIFFLAGS, IFF_UP = 0x8914, 1
with socket.socket() as any_socket:  # of the new network, the loopback interface alone is up
    fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh", b"lo", IFF_UP))
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def isolated(*arguments: str) -> list[str]:
    return ["unshare", "-rn", sys.executable, "-c", WITHOUT_NETWORK, *arguments]


def can_isolate() -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(isolated("-c", ""), capture_output=True, check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not can_isolate(), reason="the kernel lets nobody make a network of his own")
def test_a_run_without_network_neither_waits_nor_warns(
    tmp_path: Path, tiny_settings: Settings
) -> None:
    reach = "import socket; socket.create_connection(('192.0.2.1', 80), 1)"
    found = subprocess.run(isolated("-c", reach), capture_output=True, text=True, check=False)
    assert "Network is unreachable" in found.stderr, "the test's own isolation"

    config = tmp_path / "config.yaml"
    config.write_text(to_yaml(tiny_settings))
    command = ["-m", "flows.cli", "run", "--config", str(config), "--outputs"]
    environment = {**os.environ, "PREFECT_HOME": str(tmp_path / "home")}
    seconds, said = {}, {}
    for name, start in (("with", [sys.executable]), ("without", isolated())):
        started = time.monotonic()
        run = subprocess.run(
            [*start, *command, str(tmp_path / name)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        seconds[name] = time.monotonic() - started
        said[name] = run.stderr
        assert run.returncode == 0, run.stderr
    assert seconds["without"] < 1.5 * seconds["with"] + 5
    ours = re.compile(r"\d\d:\d\d:\d\d ")
    assert [line for line in said["without"].splitlines() if not ours.match(line)] == []
    assert not re.search("warn|retry|connect|telemetry|error", said["without"], re.IGNORECASE)
