"""A stand-in for the Hugging Face Hub on the loopback, which fails on demand.

It answers what `huggingface_hub` and `datasets` ask for: the facts of a repository, its tree, and
files, by way of a redirect to another address as the real one does.
"""

import hashlib
import json
import re
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.loopback_server import LoopbackServer, QuietHandler

PIECE = 512


@dataclass
class Fault:
    """What goes wrong with the next request of a file's content.

    kind is one of: status, cut, stall, drip, flip, short, long, whole.
    """

    kind: str
    after: int = 0
    """Bytes that come first (cut, stall), or the status."""
    headers: dict[str, str] = field(default_factory=dict)
    times: int = 1


@dataclass
class Repository:
    files: dict[str, bytes]
    commit: str = "c" * 40
    revisions: tuple[str, ...] = ("main",)
    gated_for: str | None = None
    """The token whose owner accepted the terms; None for a repository without terms."""


class StandInHub(LoopbackServer):
    """The server. `requests` lists what was asked: method, path, range, token."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.faults: list[Fault] = []
        self.api_faults: list[Fault] = []
        self.card_faults: list[Fault] = []
        """Of requests for the README, HEAD among them."""
        self.requests: list[tuple[str, str, str | None, str | None]] = []
        super().__init__(_Handler)
        self.cdn = self.url.replace("127.0.0.1", "localhost")
        """The same server by another name: a redirect to it is one to another host."""

    def add(self, name: str, files: dict[str, bytes], **facts: Any) -> Repository:
        self.repositories[name] = Repository(files, **facts)
        return self.repositories[name]

    def content_requests(self) -> list[tuple[str, str, str | None, str | None]]:
        return [each for each in self.requests if each[1].startswith(("/cdn/", "/plain/"))]


class _Handler(QuietHandler):
    standin: StandInHub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        self._answer(self.rfile.read(length))

    def _answer(self, body: bytes = b"") -> None:
        hub = self.standin
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        token = self.headers.get("Authorization")
        hub.requests.append((self.command, path, self.headers.get("Range"), token))
        try:
            if path.startswith("/api/datasets/"):
                self._api(path.removeprefix("/api/datasets/"), body)
            elif found := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/(.+)", path):
                self._resolve(found[1], found[2])
            elif path.startswith("/cdn/"):
                self._content(next(c for c in self._contents() if _sha256(c) == path[5:]))
            elif path.startswith("/plain/"):
                name, _, file = path.removeprefix("/plain/").partition("/-/")
                self._content(hub.repositories[name].files[file])
            else:
                self._status(404)
        except (BrokenPipeError, ConnectionResetError, StopIteration, KeyError):
            self.close_connection = True

    def _contents(self) -> Iterator[bytes]:
        for repository in self.standin.repositories.values():
            yield from repository.files.values()

    def _api(self, rest: str, body: bytes) -> None:
        if self._fails(self.standin.api_faults):
            return
        owner, name, *more = rest.split("/")
        repository = self.standin.repositories.get(f"{owner}/{name}")
        if repository is None:
            self._status(404, {"X-Error-Code": "RepoNotFound"})
            return
        if more[:1] == ["auth-check"]:
            if not self._refuses(repository):
                self._json({})
            return
        if more[:1] == ["revision"]:
            revision = "/".join(more[1:])
            if revision not in (*repository.revisions, repository.commit):
                self._status(404, {"X-Error-Code": "RevisionNotFound"})
                return
        if more[:1] == ["tree"]:
            prefix = "/".join(more[2:])
            self._json(self._tree(repository, prefix))
            return
        if more[:1] == ["paths-info"]:
            form = urllib.parse.parse_qs(body.decode())
            wanted = form.get("paths") or json.loads(body or b"{}").get("paths", [])
            self._json([_entry(n, c) for n, c in repository.files.items() if n in wanted])
            return
        siblings = [
            {
                "rfilename": name,
                "size": len(content),
                "blobId": _git(content),
                **({"lfs": _lfs(content)} if name.endswith(".parquet") else {}),
            }
            for name, content in repository.files.items()
        ]
        self._json(
            {
                "id": f"{owner}/{name}",
                "sha": repository.commit,
                "private": False,
                "gated": repository.gated_for is not None,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "siblings": siblings,
            }
        )

    def _tree(self, repository: Repository, prefix: str) -> list[dict[str, Any]]:
        below = f"{prefix}/" if prefix else ""
        inside = {n: c for n, c in repository.files.items() if n.startswith(below)}
        if "recursive=true" in self.path.lower():
            names = {
                below + "/".join(n[len(below) :].split("/")[:depth])
                for n in inside
                for depth in range(1, n[len(below) :].count("/") + 1)
            }
        else:
            names = {
                below + n[len(below) :].split("/")[0] for n in inside if "/" in n[len(below) :]
            }
            inside = {n: c for n, c in inside.items() if "/" not in n[len(below) :]}
        folders = [{"type": "directory", "path": n, "oid": "0", "size": 0} for n in sorted(names)]
        return [*folders, *(_entry(n, c) for n, c in inside.items())]

    def _resolve(self, name: str, rest: str) -> None:
        repository = self.standin.repositories.get(name)
        if repository is None:
            self._status(404, {"X-Error-Code": "RepoNotFound"})
            return
        if self._refuses(repository):
            return
        revision = next(
            (r for r in (*repository.revisions, repository.commit) if rest.startswith(f"{r}/")), ""
        )
        file = rest.removeprefix(f"{revision}/")
        content = repository.files.get(file)
        if not revision or content is None:
            self._status(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": repository.commit})
            return
        if file == "README.md" and (fault := self._next(self.standin.card_faults, head=True)):
            if fault.kind == "cut":
                self.close_connection = True
            else:
                self._status(fault.after)
            return
        facts = {"X-Repo-Commit": repository.commit}
        if file.endswith(".parquet"):
            facts |= {"X-Linked-Etag": f'"{_sha256(content)}"', "X-Linked-Size": str(len(content))}
            self._status(302, {**facts, "Location": f"{self.standin.cdn}/cdn/{_sha256(content)}"})
        elif self.command == "HEAD":
            facts |= {"ETag": f'"{_git(content)}"', "Content-Length": str(len(content))}
            self._status(200, facts)
        else:
            self._content(content, facts)

    def _refuses(self, repository: Repository) -> bool:
        token = self.headers.get("Authorization")
        if repository.gated_for is None or token == f"Bearer {repository.gated_for}":
            return False
        self._status(403 if token else 401, {"X-Error-Code": "GatedRepo"})
        return True

    def _content(self, content: bytes, facts: dict[str, str] | None = None) -> None:
        etag = f'"{_sha256(content)}"'
        range_ = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if_range = self.headers.get("If-Range")
        whole = range_ is None or (if_range is not None and if_range != etag)
        fault = self._next(self.standin.faults)
        if fault and fault.kind == "whole":
            whole = True
        start = 0 if whole or range_ is None else int(range_[1])
        end = len(content)
        if not whole and range_ is not None and range_[2]:
            end = min(end, int(range_[2]) + 1)
        if fault and fault.kind == "status":
            self._status(fault.after, fault.headers)
            return
        body = content[start:end]
        total = len(content)
        if fault and fault.kind == "flip":
            body = body[:-1] + bytes([body[-1] ^ 1])
        if fault and fault.kind == "short":
            body, total = body[: len(body) // 2], total // 2
        if fault and fault.kind == "long":
            body, total = body + b"x" * 100, total + 100
        self.send_response(200 if whole else 206)
        self.send_header("ETag", etag)
        self.send_header("Accept-Ranges", "bytes")
        for name, value in (facts or {}).items():
            self.send_header(name, value)
        if not whole:
            self.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{total}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self._send(body, fault)

    def _send(self, body: bytes, fault: Fault | None) -> None:
        if fault and fault.kind in ("cut", "stall"):
            self.wfile.write(body[: fault.after])
            self.wfile.flush()
            if fault.kind == "stall":
                self.standin.closing.wait(5)
            self.close_connection = True
            return
        if fault and fault.kind == "drip":
            for number in range(len(body)):
                self.wfile.write(body[number : number + 1])
                self.wfile.flush()
                if self.standin.closing.is_set():
                    return
                time.sleep(0.02)
            return
        self.wfile.write(body)

    def _fails(self, faults: list[Fault]) -> bool:
        fault = self._next(faults)
        if fault:
            self._status(fault.after, fault.headers)
        return fault is not None

    def _next(self, faults: list[Fault], *, head: bool = False) -> Fault | None:
        if not faults or (self.command == "HEAD" and not head):
            return None
        faults[0].times -= 1
        return faults[0] if faults[0].times > 0 else faults.pop(0)

    def _status(self, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        headers = headers or {}
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", "0")
        self.end_headers()

    def _json(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def standin_hub() -> Iterator[StandInHub]:
    """Start a stand-in and stop it afterwards."""
    hub = StandInHub()
    try:
        yield hub
    finally:
        hub.close()


def _entry(name: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "type": "file",
        "path": name,
        "oid": _git(content),
        "size": len(content),
    }
    return (
        {**entry, "lfs": {**_lfs(content), "oid": _sha256(content)}}
        if (name.endswith(".parquet"))
        else entry
    )


def _lfs(content: bytes) -> dict[str, Any]:
    return {"sha256": _sha256(content), "size": len(content), "pointerSize": 130}


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
