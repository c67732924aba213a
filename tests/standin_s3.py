"""A stand-in for S3 on the loopback: moto's server, behind what can go wrong on the way to it."""

import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

CODES = {500: "InternalError", 503: "ServiceUnavailable", 403: "AccessDenied"}

Fault = int | str | None
"""An HTTP status that is answered, `cut` in the middle of what is sent, or none."""


class StandInS3:
    """Attributes:
    url: Where it is.
    seen: What was asked, such as `PUT /bucket/name`.
    fault: What goes wrong with a request; none by default.
    """

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.fault: Callable[[str], Fault] = lambda request: None
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._conditional = threading.Lock()
        self._server = make_server(
            "127.0.0.1", 0, self._answer, threaded=True, request_handler=_Quiet
        )
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)

    def _answer(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        request = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}"
        self.seen.append(request)
        fault = self.fault(request)
        if fault == "cut":
            if length := int(environ.get("CONTENT_LENGTH") or 0):
                environ["wsgi.input"].read(max(1, length // 2))
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionResetError("as asked")
        if fault is not None:
            code = CODES[int(fault)]
            start(f"{fault} {code}", [("Content-Type", "application/xml"), ("Connection", "close")])
            return [f"<Error><Code>{code}</Code><Message>As asked.</Message></Error>".encode()]
        if environ.get("HTTP_IF_NONE_MATCH"):  # moto looks, then writes; S3 does both at once
            with self._conditional:
                return list(self._moto(environ, start))
        found: Iterable[bytes] = self._moto(environ, start)
        return found


class _Quiet(WSGIRequestHandler):
    def log(self, type: str, message: str, *args: Any) -> None:
        pass


@contextmanager
def standin_s3() -> Iterator[StandInS3]:
    server = StandInS3()
    try:
        yield server
    finally:
        server.close()
