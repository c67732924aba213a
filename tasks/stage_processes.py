"""How a stage's process is started: forked from a server that has imported all, or afresh.

One server per process, started with its environment when the first stage is at hand, and kept for
the ones after it. Another one is started where it has died, or where the environment has changed:
libraries read theirs when they are imported. It ends with this process, however that ends.
"""

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from multiprocessing import connection
from pathlib import Path
from types import TracebackType
from typing import IO, Protocol, Self

from tasks import stage_server

FORKS = sys.platform == "linux"
"""Whether stages are forked. macOS does not let a process fork that has loaded its frameworks."""

SERVER_DIED = 256
"""In place of an exit status that nobody knows; no process has this one."""


class ServerDiedError(RuntimeError):
    """The server died before it had forked a process."""


class StageProcess(Protocol):
    """What is used of a stage's process; the names are those of `subprocess.Popen`."""

    @property
    def pid(self) -> int:
        """Its id, and that of its session and group."""

    @property
    def stdout(self) -> IO[str] | None:
        """What it prints, errors included."""

    def wait(self, timeout: float | None = None) -> int:
        """Return its exit status, negative for a signal, or `SERVER_DIED`.

        Raises:
            subprocess.TimeoutExpired: If it has not ended within so many seconds.
        """

    def send_signal(self, sig: int, /) -> None:
        """Send it a signal, unless it has ended."""

    def __enter__(self) -> Self:
        """Return the process."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
        /,
    ) -> None:
        """Close its output."""


def start(module: str, directory: Path) -> StageProcess:
    """Start the process of a stage, in a session of its own.

    Args:
        module: Where the stage is computed, below `training`.
        directory: Of the stage; holds its `config.yaml`.

    Raises:
        ServerDiedError: If no process can be forked.
    """
    if FORKS:
        try:
            return _running_server().fork(module, directory)
        except ServerDiedError:  # perhaps between two stages
            return _running_server().fork(module, directory)
    # -P: a user's own data.py in the current directory must not stand in for ours.
    command = [sys.executable, "-P", "-m", f"training.{module}", str(directory)]
    return subprocess.Popen(
        [*command, "--events", "--parent", str(os.getpid())],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C reaches it through us, once
        env=_environment(),
    )


def prepare() -> None:
    """Start the server now, so that it imports while this process does other things."""
    if FORKS:
        _running_server()


class _Forked:
    """A stage's process that the server has forked, and that the server waits for."""

    def __init__(self, output: int, status: int) -> None:
        """Wait until it is there.

        Raises:
            ServerDiedError: If the server ends before.
        """
        self.stdout: IO[str] | None = os.fdopen(output, errors="replace")
        self._status = os.fdopen(status)
        self._code: int | None = None
        try:
            line = self._status.readline()
            if not line:
                raise ServerDiedError
            self.pid = int(line)
        except BaseException:
            self._close()
            raise

    def wait(self, timeout: float | None = None) -> int:
        if self._code is None:
            if not connection.wait([self._status.fileno()], timeout):
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
            self._code = int(self._status.readline() or SERVER_DIED)
        return self._code

    def send_signal(self, sig: int, /) -> None:
        with suppress(subprocess.TimeoutExpired):
            if self.wait(timeout=0) != SERVER_DIED:
                return
        with suppress(ProcessLookupError):
            os.kill(self.pid, sig)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
        /,
    ) -> None:
        self._close()

    def _close(self) -> None:
        assert self.stdout is not None
        self.stdout.close()
        self._status.close()


class _Server:
    """The server's process, seen from the one that asks it to fork."""

    def __init__(self) -> None:
        self._environment = _environment()
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the server)
        # It keeps requests apart, and tells the server when we are gone, however we went. (The
        # death of the thread that started it, which the kernel could tell too, means nothing.)
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        descriptor = str(theirs.fileno())
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "tasks.stage_server", descriptor, stage_server.ROOM],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._said,
                start_new_session=True,
                env=self._environment,
            )

    def is_of_use(self) -> bool:
        """Whether it runs, in the environment that this process has now."""
        return self._process.poll() is None and self._environment == _environment()

    def fork(self, module: str, directory: Path) -> _Forked:
        """Have a stage's process forked.

        Raises:
            ServerDiedError: If the server ends before; with its last words.
        """
        output, childs_output = os.pipe()
        status, childs_status = os.pipe()
        # Not by its name: it may have lost that.
        place = os.open(".", os.O_PATH | os.O_DIRECTORY)
        given = [childs_output, childs_status, place]
        try:
            try:
                with suppress(OSError):  # it is gone; then nobody writes to the status
                    message = json.dumps([module, str(directory)]).encode()
                    socket.send_fds(self._requests, [message], given)
            finally:
                for descriptor in given:
                    os.close(descriptor)
            return _Forked(output, status)
        except ServerDiedError:
            raise ServerDiedError(self._last_words()) from None
        except BaseException:  # Ctrl-C. A request that it has not seen yet must not be served
            self.close()
            raise

    def _last_words(self) -> str:
        self._process.kill()  # if it is not on its way out, it has not got the request
        code = self._process.wait()
        end = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        self._said.seek(0)
        said = self._said.read().decode(errors="replace").strip()
        return f"The server that stages are forked from ended with {end}. {said}".strip()

    def close(self) -> None:
        """End it; there is nothing that it would have to tidy up. Stages hear of it, and save."""
        self._process.kill()
        self._process.wait()
        self._requests.close()
        self._said.close()


_server: _Server | None = None


def _running_server() -> _Server:
    global _server
    if _server is None or not _server.is_of_use():
        _end_server()
        _server = _Server()
    return _server


@atexit.register
def _end_server() -> None:
    global _server
    if _server is not None:
        _server.close()
        _server = None


def _environment() -> dict[str, str]:
    return {"GOMP_SPINCOUNT": "1000", **os.environ}  # see training/hardware.py
