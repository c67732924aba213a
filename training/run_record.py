"""The record of a pipeline run: `config.yaml`, `run.json` and `results.json`, always complete.

`results.json` is what other programs read; its form is fixed by `schema_version`.
"""

import json
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from training import stage_files, store
from training.commit import describe_commit
from training.configure import to_yaml
from training.settings import Settings
from training.stage_files import digest_of
from training.stages import STAGES, plan
from training.store import StageRequest, StageResult, write_atomically

SCHEMA_VERSION = 1

PACKAGES = ("torch", "torchvision", "transformers", "datasets", "prefect", "wandb", "numpy")


class RunRecord:
    """The directory `<outputs>/runs/<name>/` of one set of settings.

    The name follows from the settings, so that the same command writes to the same place. After
    every stage all of it is written again, each file whole.
    """

    def __init__(
        self,
        settings: Settings,
        outputs: Path,
        *,
        until: str | None = None,
        command: Sequence[str] | None = None,
    ) -> None:
        """Begin the record of a run.

        Args:
            settings: Everything that the run depends on.
            outputs: Folder of everything that is written.
            until: Last stage to run; none for all of them.
            command: What a user typed; by default the command line of this process.
        """
        self.settings = settings
        self.name = run_name(settings)
        self.directory = run_directory(settings, outputs)
        self.stages: dict[str, StageResult] = {}
        self._outputs, self._until = outputs, until
        self._command = list(command or ["rotvit", *sys.argv[1:]])
        self._started = _now()
        self._places: dict[str, str] = {}
        self._earlier = self._read_earlier()
        self.write(state="running")

    def begin(self, request: StageRequest) -> None:
        """Record that a stage is next, before it does anything."""
        self._places[request.stage] = str(request.directory.relative_to(self._outputs))
        self.write(state="running")

    def add(self, result: StageResult) -> None:
        """Record a stage's result; the report is put beside the record."""
        self.stages[result.stage] = result
        if result.stage == "report":
            page = (result.directory / "index.html").read_bytes()
            write_atomically(self.directory / "report" / "index.html", page)
        self.write(state="running")

    def write(self, *, state: str) -> None:
        """Write everything; `state` is running, finished or failed."""
        write_atomically(self.directory / "config.yaml", to_yaml(self.settings).encode())
        facts = {
            "run": self.name,
            "state": state,
            "seed": self.settings.seed,
            "command": self._command,
            "until": self._until,
            "resume": resume_command(self.directory, self._outputs, self._until),
            "directories": self._places,
            "started_at": self._started,
            "written_at": _now(),
            "commit": describe_commit(),
            "python": platform.python_version(),
            "platform": platform.platform(),
            "versions": {name: metadata.version(name) for name in PACKAGES},
            "hardware": next(
                (stage.environment for stage in self.stages.values() if stage.environment), {}
            ),
        }
        if state == "finished":
            self._write_page_of_what_there_is()
        _write_json(self.directory / "run.json", facts)
        _write_json(self.directory / "results.json", self._results_and_earlier())

    def _write_page_of_what_there_is(self) -> None:
        """Report a run that ended before the report stage, such as one without labels."""
        path = self.directory / "report" / "index.html"
        stages = self._results_and_earlier()["stages"]
        is_new = any(result.status != "cached" for result in self.stages.values())
        if "pretrain" not in self.stages or "report" in stages or (path.exists() and not is_new):
            return
        from training.report import whole_page  # its figures take a second to import

        write_atomically(path, whole_page(self.stages, self.settings).encode())

    def _read_earlier(self) -> dict[str, Any]:
        """Return the rows of an earlier run with these settings: one that went further counts."""
        try:
            found = json.loads((self.directory / "results.json").read_bytes())
            rows: dict[str, Any] = found["stages"]
        except (OSError, ValueError, KeyError):
            return {}
        return rows

    def _results_and_earlier(self) -> dict[str, Any]:
        results = self.results()
        rows = results["stages"]
        if all(
            self._earlier[name]["key"] == rows[name]["key"]
            for name in rows
            if name in self._earlier
        ):
            merged = {**self._earlier, **rows}
            results["stages"] = {name: merged[name] for name in STAGES if name in merged}
        return results

    def results(self) -> dict[str, Any]:
        """Return the content of `results.json`."""
        data = self.stages.get("prepare_data")
        return {
            "schema_version": SCHEMA_VERSION,
            "run": self.name,
            "preset": self.settings.preset,
            "seed": self.settings.seed,
            "data": {
                "pretrain": self.settings.data.source,
                "transfer": self.settings.transfer_source[0],
                "fingerprint": data.digest if data else None,
            },
            "stages": {name: _row(result) for name, result in self.stages.items()},
        }


def note_end(
    settings: Settings, outputs: Path, *, state: str, message: str
) -> dict[str, Any] | None:
    """Write into `run.json` how a run ended that could not write it itself.

    Args:
        settings: Of the run.
        outputs: Its outputs folder.
        state: How it ended: failed, crashed or cancelled.
        message: Why, in words.

    Returns:
        What was added: state, message, newest checkpoint and the command that resumes. None
        where there is no record.
    """
    directory = run_directory(settings, outputs)
    try:
        facts = json.loads((directory / "run.json").read_bytes())
    except (OSError, ValueError):
        return None
    added = {
        "state": state,
        "message": message,
        "last_checkpoint": _newest_checkpoint(outputs, facts["directories"]),
        "resume": resume_command(directory, outputs, facts["until"]),
        "written_at": _now(),
    }
    _write_json(directory / "run.json", {**facts, **added})
    return added


def resume_command(directory: Path, outputs: Path, until: str | None) -> str:
    """Return the command that goes on with the run recorded in `directory`."""
    words = ["rotvit", "run", "--config", str(directory / "config.yaml")]
    words += ["--outputs", str(outputs)]
    if until:
        words += ["--until", until.replace("_", "-")]
    return shlex.join(words)


def _newest_checkpoint(outputs: Path, keys: Mapping[str, str]) -> str | None:
    """Return the newest checkpoint of the last stage of a run that has any."""
    for place in reversed(list(keys.values())):
        newest = stage_files.newest_checkpoint(outputs / place)
        if newest is not None:
            return str(newest)
    return None


def record_if_all_cached(
    settings: Settings, outputs: Path, until: str | None = None
) -> dict[str, Any] | None:
    """Record a run that has nothing to compute.

    Returns:
        The content of `results.json`; None, with nothing written, if a stage is not cached.
    """
    results: dict[str, StageResult] = {}
    for stage in plan(settings, until):
        request = store.make_request(stage, settings, outputs, results)
        found = store.inspect(request).result
        if found is None:
            return None
        results[stage.name] = found
    record = RunRecord(settings, outputs, until=until)
    for result in results.values():
        record.add(result)
    record.write(state="finished")
    return record.results()


def run_name(settings: Settings) -> str:
    """Return a name that tells preset and seed, and differs where any other setting does."""
    values = settings.model_dump(mode="json", exclude={"checkpoint", "tracking"})
    return f"{settings.preset}-seed{settings.seed}-{digest_of(values)[:8]}"


def run_directory(settings: Settings, outputs: Path) -> Path:
    """Return where a run with these settings is recorded."""
    return outputs / "runs" / run_name(settings)


def _row(result: StageResult) -> dict[str, Any]:
    return {
        "key": result.key,
        "directory": str(result.directory),
        "status": result.status,
        "wall_seconds": round(result.wall_seconds, 3),
        **result.timing,
        **result.scores,
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=2).encode() + b"\n")
