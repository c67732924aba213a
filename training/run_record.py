"""The record of a pipeline run: `config.yaml`, `run.json` and `results.json`, always complete.

`results.json` is what other programs read; its form is fixed by `schema_version`.
"""

import json
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from training import remote_outputs, stage_files
from training.commit import describe_commit
from training.configure import to_yaml
from training.seeds import over_seeds
from training.settings import Settings
from training.stage_files import digest_of
from training.stages import STAGES
from training.steps import Found, steps
from training.store import (
    StageRequest,
    StageResult,
    inspect,
    stage_of_variant,
    write_atomically,
)
from training.variants import Variant

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
        self.found = Found()
        self._overrides: dict[str, Sequence[str]] = {}
        self._outputs, self._until = outputs, until
        self._command = list(command or ["rotvit", *sys.argv[1:]])
        self._started = _now()
        self._places: dict[str, str] = {}
        remote_outputs.fetch_record(self.directory)
        self._earlier = self._read_earlier()
        self.write(state="running")

    @property
    def stages(self) -> dict[str, StageResult]:
        """Results of the run's own stages, by name."""
        return self.found.stages

    def begin(self, request: StageRequest) -> None:
        """Record that a stage is next, before it does anything."""
        self._places[request.title] = str(request.directory.relative_to(self._outputs))
        self.write(state="running")

    def add(self, result: StageResult, variant: Variant | None = None) -> None:
        """Record a stage's result, of a variant or the run's own; put the report beside the record.

        A variant's is told from the run's own by the name, and what it differs in is recorded.
        """
        self.found.add(result, variant.name if variant else "")
        title = result.stage
        if variant:
            self._overrides[variant.name] = variant.overrides
            title = stage_of_variant(result.stage, variant.name)
        if result.directory.is_relative_to(self._outputs):
            self._places[title] = str(result.directory.relative_to(self._outputs))
        if result.stage == "report":
            page = (result.directory / "index.html").read_bytes()
            write_atomically(self.directory / "report" / "index.html", page)
        self.write(state="running")

    def write(self, *, state: str) -> None:
        """Write everything; `state` is running, finished or failed.

        Raises:
            OutputsError: If a finished run cannot be stored at the address of the outputs.
        """
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
        remote_outputs.store_record(self.directory, must=state == "finished")

    def _write_page_of_what_there_is(self) -> None:
        """Report a run that ended before the report stage, such as one without labels."""
        path = self.directory / "report" / "index.html"
        stages = self._results_and_earlier()["stages"]
        every = [*self.stages.values(), *self.found.by_role.values()]
        is_new = any(result.status != "cached" for result in every)
        if "pretrain" not in self.stages or "report" in stages or (path.exists() and not is_new):
            return
        from training.report import whole_page  # its figures take a second to import

        write_atomically(path, whole_page(self.found, self.settings).encode())

    def _read_earlier(self) -> dict[str, Any]:
        """Return what an earlier run with these settings found: one that went further counts."""
        try:
            found: dict[str, Any] = json.loads((self.directory / "results.json").read_bytes())
            return {"stages": found["stages"], "variants": found.get("variants", {})}
        except (OSError, ValueError, KeyError):
            return {"stages": {}, "variants": {}}

    def _results_and_earlier(self) -> dict[str, Any]:
        results = self.results()
        rows, variants = results["stages"], results.get("variants", {})
        before = self._earlier["stages"]
        if all(before[name]["key"] == rows[name]["key"] for name in rows if name in before):
            merged = {**before, **rows}
            rows = {name: merged[name] for name in STAGES if name in merged}
            for name, earlier in self._earlier["variants"].items():
                now = variants.get(name, {"stages": {}})["stages"]
                variants = {**variants, name: {**earlier, "stages": {**earlier["stages"], **now}}}
        return self._with_variants({**results, "stages": rows}, variants)

    def _with_variants(self, results: dict[str, Any], variants: dict[str, Any]) -> dict[str, Any]:
        """Return results with those of variants, and the spread over seeds, where there are any."""
        if not variants:
            return results
        spread = over_seeds(results["stages"], [variant["stages"] for variant in variants.values()])
        over = {
            "pretraining": self.settings.evaluation.pretraining,
            "stages": {
                stage: {score: asdict(found) for score, found in scores.items()}
                for stage, scores in spread.items()
            },
        }
        return {**results, "variants": variants} | ({"over_seeds": over} if spread else {})

    def results(self) -> dict[str, Any]:
        """Return the content of `results.json`."""
        data = self.stages.get("prepare_data")
        variants = {
            name: {
                "overrides": list(self._overrides[name]),
                "stages": {stage: _row(result) for stage, result in stages.items()},
            }
            for name, stages in self.found.variants.items()
        }
        results = {
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
        return self._with_variants(results, variants)


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
    remote_outputs.store_record(directory, must=False)
    return added


def resume_command(directory: Path, outputs: Path, until: str | None) -> str:
    """Return the command that goes on with the run recorded in `directory`."""
    words = ["rotvit", "run", "--config", str(directory / "config.yaml")]
    words += ["--outputs", remote_outputs.address_of(outputs)]
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
    found, results = Found(), list[tuple[StageResult, Variant | None]]()
    for step in steps(settings, outputs, found, until):
        result = inspect(step.request).result if step.request else None
        if result is None or not step.request or not remote_outputs.is_stored(step.request):
            return None
        found.add(result, step.variant.name if step.variant else "")
        results.append((result, step.variant))
    record = RunRecord(settings, outputs, until=until)
    for result, variant in results:
        record.add(result, variant)
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
