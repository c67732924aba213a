"""A stand-in, on the loopback, for the part of the Hub's HTTP interface that takes models."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import yaml

from tests.loopback_server import LoopbackServer, QuietHandler

TOKEN = "hf_write"


class UploadHub(LoopbackServer):
    """The server.

    Attributes:
        repositories: Files by name, of each repository.
        private: Names of private repositories.
        commits: Message of each commit, in order.
        refuse: Status by a part of the path: what such requests are answered.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.commits: list[str] = []
        self.refuse: dict[str, int] = {}
        self.requests: list[str] = []
        self.large: dict[str, bytes] = {}
        super().__init__(_Handler)


class _Handler(QuietHandler):
    standin: UploadHub

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self._body())

    def do_PUT(self) -> None:
        self._answer(self._body())

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, body: bytes) -> None:
        hub = self.standin
        path = self.path.partition("?")[0]
        hub.requests.append(f"{self.command} {path}")
        for part, status in hub.refuse.items():
            if part in path:
                return self._send(status, {"error": f"the stand-in answers {status}"})
        if path.startswith("/large/"):  # its address is the permission
            assert hashlib.sha256(body).hexdigest() == path.removeprefix("/large/")
            hub.large[path.removeprefix("/large/")] = body
            return self._send(200, {})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._send(401, {"error": "Invalid username or password."})
        if path == "/api/validate-yaml":
            values = yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
            assert values["model-index"][0]["results"][0]["metrics"]
            return self._send(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            objects = json.loads(body)["objects"]
            for each in objects:
                each["actions"] = {"upload": {"href": f"{hub.url}/large/{each['oid']}"}}
            return self._send(200, {"objects": objects, "transfer": "basic"})
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(tree|preupload|commit)/main", path)
        if not found or found[1] not in hub.repositories:
            return self._send(404, {}, {"X-Error-Code": "RepoNotFound"})
        if found[2] == "tree":
            there = hub.repositories[found[1]]
            return self._send(200, [_entry(name, content) for name, content in there.items()])
        if found[2] == "preupload":
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self._send(200, {"files": files})
        return self._commit(found[1], [json.loads(line) for line in body.splitlines()])

    def _create(self, wanted: dict[str, Any]) -> None:
        hub, name = self.standin, f"{wanted['organization']}/{wanted['name']}"
        if name in hub.repositories:
            return self._send(409, {"error": "You already created this model repo"})
        hub.repositories[name] = {".gitattributes": b"*.safetensors filter=lfs\n"}
        if wanted.get("visibility") == "private":
            hub.private.add(name)
        return self._send(200, {"url": f"{hub.url}/{name}"})

    def _commit(self, name: str, operations: list[dict[str, Any]]) -> None:
        hub = self.standin
        added = {}
        for each in operations:
            value = each["value"]
            if each["key"] == "header":
                hub.commits.append(value["summary"])
            elif each["key"] == "file":
                assert value["encoding"] == "base64"
                added[value["path"]] = base64.b64decode(value["content"])
            else:
                assert each["key"] == "lfsFile"
                added[value["path"]] = hub.large[value["oid"]]
        hub.repositories[name] |= added
        oid = f"{len(hub.commits):040x}"
        self._send(200, {"commitUrl": f"{hub.url}/{name}/commit/{oid}", "commitOid": oid})

    def _send(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, content in (headers or {}).items():
            self.send_header(name, content)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _entry(name: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(content), "oid": "0" * 40}


@contextmanager
def upload_hub() -> Iterator[UploadHub]:
    """Start a stand-in and stop it afterwards."""
    hub = UploadHub()
    try:
        yield hub
    finally:
        hub.close()
