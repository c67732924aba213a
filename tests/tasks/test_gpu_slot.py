"""The GPU slot against a real server, reached through a line that can be cut."""

import contextvars
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from urllib.parse import urlsplit

import pytest
from prefect import get_client
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_CLIENT_MAX_RETRIES,
    temporary_settings,
)

from tasks import gpu_slot as module
from tasks.gpu_slot import gpu_slot

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("prefect_backend")]


class Line:
    """A TCP port that leads to the server as long as it is not cut."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._open: list[socket.socket] = []
        self.cut = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def hang_up(self) -> None:
        self.cut = True
        for each in self._open:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            caller, _ = self._listener.accept()
            if self.cut:
                caller.close()
                continue
            server = socket.create_connection(self._target)
            self._open += [caller, server]
            for ends in ((caller, server), (server, caller)):
                threading.Thread(target=self._pass_on, args=ends, daemon=True).start()

    @staticmethod
    def _pass_on(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)


@pytest.fixture
def line() -> Iterator[Line]:
    address = urlsplit(PREFECT_API_URL.value() or "")
    assert address.hostname
    assert address.port
    made = Line((address.hostname, address.port))
    with temporary_settings(
        {
            PREFECT_API_URL: f"http://127.0.0.1:{made.port}/api",
            PREFECT_CLIENT_MAX_RETRIES: 0,
        }
    ):
        yield made


@pytest.fixture
def limit(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slot of the test's own: Prefect keeps a connection per name, and with it the line."""
    monkeypatch.setattr(module, "SLOT", f"gpu-{line.port}")
    with get_client(sync_client=True) as client:
        client.upsert_global_concurrency_limit_by_name(module.SLOT, limit=1)


def active() -> int:
    with get_client(sync_client=True) as client:
        return client.read_global_concurrency_limit_by_name(module.SLOT).active_slots


@contextmanager
def waiting() -> Iterator[tuple[threading.Event, list[str]]]:
    """Another run that wants the slot: what tells that it trains, and the states that it named."""
    trains, ends, said = threading.Event(), threading.Event(), list[str]()

    def other() -> None:
        with gpu_slot(lambda name, _: said.append(name)):
            trains.set()
            ends.wait(60)

    thread = threading.Thread(target=contextvars.copy_context().run, args=(other,))
    thread.start()
    try:
        yield trains, said
    finally:
        ends.set()
        thread.join(60)


def test_without_a_limit_nobody_waits() -> None:
    with gpu_slot(lambda *_: pytest.fail("it waits")), gpu_slot(lambda *_: pytest.fail("it waits")):
        pass


@pytest.mark.usefixtures("limit")
def test_one_trains_and_the_other_waits_and_says_so() -> None:
    with ExitStack() as first:
        first.enter_context(gpu_slot(lambda *_: pytest.fail("it waits")))
        assert active() == 1
        with waiting() as (trains, said):
            assert not trains.wait(3)
            first.close()
            assert trains.wait(60)
            assert said == ["Waiting for GPU", "Running"]
    assert active() == 0


@pytest.mark.usefixtures("limit")
def test_a_server_that_is_away_at_the_start_costs_the_slot_and_no_time(
    line: Line, caplog: pytest.LogCaptureFixture
) -> None:
    line.hang_up()
    started = time.monotonic()
    with gpu_slot(lambda *_: pytest.fail("it waits")):
        assert time.monotonic() - started < 5
    assert "The GPU slot is not to be had" in caplog.text


@pytest.mark.usefixtures("limit")
def test_who_waits_does_not_train_beside_the_other_while_the_server_is_away(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ASK_AGAIN_SECONDS", 0.2)
    with ExitStack() as first:
        first.enter_context(gpu_slot(lambda *_: pytest.fail("it waits")))
        with waiting() as (trains, said):
            while not said:
                time.sleep(0.05)
            line.hang_up()
            assert not trains.wait(5), "it trains beside the other"
            line.cut = False
            first.close()
            assert trains.wait(60)
            assert said == ["Waiting for GPU", "Running"]
