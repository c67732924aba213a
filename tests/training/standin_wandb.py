"""A stand-in for Weights & Biases on the loopback, which fails on demand.

It answers what wandb asks for to record runs and artifacts: GraphQL by the name of the operation,
the stream of a run's files, and uploads.
"""

import base64
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from tests.loopback_server import LoopbackServer, QuietHandler

HISTORY, SUMMARY = "wandb-history.jsonl", "wandb-summary.json"


@dataclass
class Run:
    """What W&B would know about a run."""

    project: str
    entity: str
    facts: dict[str, Any] = field(default_factory=dict)
    """groupName, displayName, jobType and so on, as they came last."""
    config: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, dict[int, str]] = field(default_factory=dict)
    """Of each streamed file, by number."""
    openings: int = 0
    """Processes that began or resumed it."""
    exit_code: int | None = None

    @property
    def history(self) -> list[dict[str, Any]]:
        """What was logged, in order, without what wandb adds but for `_step`."""
        rows = [json.loads(line) for _, line in sorted(self.lines.get(HISTORY, {}).items())]
        added = {"_timestamp", "_runtime"}
        return [{k: v for k, v in row.items() if k not in added} for row in rows]

    @property
    def steps(self) -> list[int]:
        return [row["_step"] for row in self.history]

    @property
    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.lines.get(SUMMARY, {}).get(0, "{}"))
        return found


@dataclass
class Artifact:
    name: str
    type: str
    run: str
    aliases: list[str]
    manifest: dict[str, Any] = field(default_factory=dict)
    is_committed: bool = False


class StandInWandb(LoopbackServer):
    """The server. `fault` says what it does with every request from now on.

    `hang` accepts and never answers, `cut` closes the connection, `500` answers so.
    """

    def __init__(self) -> None:
        self.runs: dict[str, Run] = {}
        self.artifacts: dict[str, Artifact] = {}
        self.uploads: dict[str, bytes] = {}
        self.keys: set[str] = set()
        """Keys that requests came with."""
        self.unknown: set[str] = set()
        """Operations that there is no answer for here."""
        self.requests = 0
        self.fault: Literal["", "hang", "cut", "500"] = ""
        super().__init__(_Handler)

    def run_of(self, stage: str) -> Run:
        """The one run of a stage."""
        (found,) = [run for name, run in self.runs.items() if name.startswith(f"{stage}-")]
        return found


class _Handler(QuietHandler):
    standin: StandInWandb

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.standin.requests += 1
        kind, _, credentials = self.headers.get("Authorization", "").partition(" ")
        if kind == "Basic":
            self.standin.keys.add(base64.b64decode(credentials).decode().partition(":")[2])
        if self.standin.fault == "hang":
            self.standin.closing.wait()
        if self.standin.fault in {"hang", "cut"}:
            self.close_connection = True
        elif self.standin.fault == "500":
            self._reply({"error": "out of order"}, status=500)
        elif self.path == "/graphql":
            asked = json.loads(body)
            name = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])
            assert name
            self._reply({"data": self._graphql(name[1], asked.get("variables") or {})})
        elif found := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path):
            self._stream(self.standin.runs[found[1]], json.loads(body))
            self._reply({})
        elif self.path.startswith("/uploads/"):
            self.standin.uploads[self.path.removeprefix("/uploads/")] = body
            self._reply({})
        else:
            self.standin.unknown.add(f"{self.command} {self.path}")
            self._reply({}, status=404)

    def _reply(self, content: Any, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _stream(self, run: Run, sent: dict[str, Any]) -> None:
        for name, part in (sent.get("files") or {}).items():
            lines = run.lines.setdefault(name, {})
            for number, line in enumerate(part["content"]):
                lines[part["offset"] + number] = line
        if sent.get("complete"):
            run.exit_code = sent["exitcode"]

    def _graphql(self, name: str, given: dict[str, Any]) -> Any:
        answer = getattr(self, f"_on_{name}", None)
        if answer is None:
            self.standin.unknown.add(name)
            return None
        return answer(given.get("input") or given)

    def _on_Viewer(self, given: dict[str, Any]) -> Any:
        who = {"id": "u", "entity": "somebody", "username": "somebody", "email": "", "flags": "{}"}
        return {"viewer": {**who, "teams": {"edges": []}}}

    def _on_ServerFeaturesQuery(self, given: dict[str, Any]) -> Any:
        return {"serverInfo": {"features": []}}

    def _on_OrganizationCoreWeaveOrganizationID(self, given: dict[str, Any]) -> Any:
        return {"entity": None}

    def _on_RunResumeStatus(self, given: dict[str, Any]) -> Any:
        run = self.standin.runs.get(given["name"])
        if run is None:
            return {"model": None}
        tail = [line for _, line in sorted(run.lines.get(HISTORY, {}).items())][-1:]
        bucket = {
            "id": given["name"],
            "name": given["name"],
            "summaryMetrics": json.dumps(run.summary),
            "displayName": run.facts.get("displayName"),
            "logLineCount": 0,
            "historyLineCount": len(run.lines.get(HISTORY, {})),
            "eventsLineCount": len(run.lines.get("wandb-events.jsonl", {})),
            "historyTail": json.dumps(tail),
            "eventsTail": "[]",
            "config": json.dumps(run.config),
            "tags": [],
            "notes": None,
            "wandbConfig": json.dumps({"t": 1}),
        }
        return {"model": {"id": "p", "name": run.project, "entity": None, "bucket": bucket}}

    def _on_UpsertBucket(self, given: dict[str, Any]) -> Any:
        name = given.get("name") or given["id"]
        entity = given.get("entity") or "somebody"
        is_new = name not in self.standin.runs
        run = self.standin.runs.setdefault(name, Run(given.get("project") or "", entity))
        facts = ("groupName", "displayName", "jobType", "program")
        run.facts |= {fact: given[fact] for fact in facts if given.get(fact)}
        if given.get("config"):
            run.config = json.loads(given["config"])
        project = {"id": "p", "name": run.project, "entity": {"id": "e", "name": run.entity}}
        bucket = {
            "id": name,
            "name": name,
            "displayName": run.facts.get("displayName"),
            "description": "",
            "config": json.dumps(run.config),
            "sweepName": None,
            "project": project,
            "historyLineCount": len(run.lines.get(HISTORY, {})),
        }
        if given.get("displayName"):
            run.openings += 1
        return {"upsertBucket": {"bucket": bucket, "inserted": is_new}}

    def _on_ArtifactType(self, given: dict[str, Any]) -> Any:
        return {"project": {"artifact": None}}

    def _on_CreateRunFiles(self, given: dict[str, Any]) -> Any:
        files = [
            {"name": name, "uploadUrl": f"{self.standin.url}/uploads/{given['run']}/{name}"}
            for name in given["files"]
        ]
        made = {"runID": given["run"], "uploadHeaders": [], "files": files}
        return {"createRunFiles": made}

    def _on_CreateArtifact(self, given: dict[str, Any]) -> Any:
        ident = f"artifact{len(self.standin.artifacts)}"
        self.standin.artifacts[ident] = Artifact(
            name=given["artifactCollectionName"] or given["artifactCollectionNames"][0],
            type=given["artifactTypeName"],
            run=given["runName"],
            aliases=[item["alias"] for item in given["aliases"]],
        )
        sequence = {"latestArtifact": None}
        artifact = {"id": ident, "state": "PENDING", "artifactSequence": sequence}
        return {"createArtifact": {"artifact": artifact}}

    def _on_CreateArtifactManifest(self, given: dict[str, Any]) -> Any:
        url = f"{self.standin.url}/uploads/{given['artifactID']}/manifest"
        file = {"id": "f", "uploadUrl": url, "uploadHeaders": []}
        manifest = {"id": given["artifactID"], "file": file}
        return {"createArtifactManifest": {"artifactManifest": manifest}}

    def _on_CreateArtifactFiles(self, given: dict[str, Any]) -> Any:
        edges = [
            {
                "node": {
                    "storagePath": item["name"],
                    "uploadUrl": f"{self.standin.url}/uploads/{item['artifactID']}/{item['name']}",
                    "uploadHeaders": [],
                    "uploadMultipartUrls": None,
                    "artifact": {"id": item["artifactID"]},
                }
            }
            for item in given["artifactFiles"]
        ]
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def _on_CommitArtifact(self, given: dict[str, Any]) -> Any:
        artifact = self.standin.artifacts[given["artifactID"]]
        artifact.manifest = json.loads(self.standin.uploads[f"{given['artifactID']}/manifest"])
        artifact.is_committed = True
        return {"commitArtifact": {"artifact": {"id": given["artifactID"], "digest": ""}}}

    def _on_UpdateArtifactManifest(self, given: dict[str, Any]) -> Any:
        url = f"{self.standin.url}/uploads/{given['artifactManifestID']}/manifest"
        file = {"id": "f", "uploadUrl": url, "uploadHeaders": []}
        manifest = {"id": given["artifactManifestID"], "file": file}
        return {"updateArtifactManifest": {"artifactManifest": manifest}}


@contextmanager
def standin_wandb() -> Iterator[StandInWandb]:
    """Run the stand-in for the `with` block."""
    standin = StandInWandb()
    try:
        yield standin
    finally:
        standin.close()
