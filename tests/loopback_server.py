"""What the stand-ins for services have in common: a server on a free port of the loopback."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class LoopbackServer:
    """Answers in threads of its own until it is closed.

    Attributes:
        url: Where it is.
        closing: Set when it is closed, for answers that hang until then.
    """

    def __init__(self, handler: "type[QuietHandler]") -> None:
        self.closing = threading.Event()
        bound = type("Handler", (handler,), {"standin": self})
        self._server = _Server(("127.0.0.1", 0), bound)
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)


class QuietHandler(BaseHTTPRequestHandler):
    """Answers one connection; `standin` is the server that it belongs to."""

    standin: Any
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that closed its connection, as it may
