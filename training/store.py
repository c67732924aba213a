"""Where stages keep what they made, and how it is recognised again.

A stage is a pure function of its inputs, so its *key* is a hash of them, and its directory is
`<outputs>/<stage>/<key>/`. `result.json` is written last, with the sha256 of what the stage made;
a directory whose result verifies is *cached*, one with checkpoints but no result is *partial*,
any other is *missing*.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from data import catalogue, prepared, sources
from training.configure import flatten
from training.settings import Settings
from training.stage_files import (
    FileRecord,
    OutputsError,
    digest_of,
    lies_elsewhere,
    newest_step,
    sha256_of,
    sync_path,
)
from training.stages import Stage

TRANSFER_DATA = ("download_transfer", "prepare_transfer_data")
"""Stages for labelled images that come from elsewhere."""


class StageInput(BaseModel):
    """What another stage made, as the stage that uses it sees it."""

    stage: str
    key: str
    directory: Path
    digest: str


class StageRequest(BaseModel):
    """All that is needed to compute one stage, or to find that it has been computed."""

    stage: str
    key: str
    directory: Path
    outputs: Path
    reads: dict[str, Any]
    """The setting values, by dotted name, that the key was made of."""
    inputs: dict[str, StageInput]
    settings: Settings
    run: str = ""
    """Name of the pipeline run that asks; groups tracked runs. Not part of the key."""
    variant: str = ""
    """Name of the run's variant that asks; none for the run itself. Not part of the key."""

    @property
    def title(self) -> str:
        """The stage's name, and the variant's, as people are told it."""
        return stage_of_variant(self.stage, self.variant)


class StageResult(BaseModel):
    """`result.json`: what a stage made. Small, JSON, no tensors."""

    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[1] = 1
    stage: str
    key: str
    directory: Path
    status: Literal["computed", "resumed", "cached"]
    wall_seconds: float
    """Time it took to compute, all attempts together."""
    digest: str
    """Identity of what was made: other bytes, other digest."""
    scores: dict[str, Any]
    """What was measured; the same on every computation of this key."""
    timing: dict[str, float] = {}
    inputs: dict[str, str] = {}
    """Digest of each input that was used."""
    files: dict[str, FileRecord] = {}
    environment: dict[str, Any] = {}
    """Versions, hardware, time."""


class Verdict(BaseModel):
    """What is there for a request, and why it is not more."""

    state: Literal["cached", "partial", "missing"]
    why: str = ""
    step: int | None = None
    """Step of the newest checkpoint, where partial."""
    stale: Literal["", "damaged", "outdated"] = ""
    """Whether something is there that must not be built on: files that do not verify, or work on
    inputs that have been replaced since."""
    result: StageResult | None = None


def make_request(
    stage: Stage,
    settings: Settings,
    outputs: Path,
    results: Mapping[str, StageResult],
    run: str = "",
    *,
    variant: str = "",
    more: Mapping[str, StageResult] | None = None,
) -> StageRequest:
    """Build the request for a stage from the results of those it needs.

    Args:
        stage: The stage.
        settings: Of the run, or of its variant.
        outputs: Folder of everything that is written.
        results: Of other stages, by name: those that it needs, and any others.
        run: Name of the run that asks.
        variant: Name of the run's variant that asks.
        more: What it reads besides, by role: the report the results of a run's variants.

    Raises:
        KeyError: If the result of a stage that it needs is not in `results`.
        DatasetError: If a data source cannot be read.
    """
    needed = {role: results[name] for role, name in stage.needs(settings).items()}
    inputs = {
        role: StageInput(
            stage=result.stage, key=result.key, directory=result.directory, digest=result.digest
        )
        for role, result in {**needed, **(more or {})}.items()
    }
    reads = _values_read(stage, settings)
    if stage.module_name == "prepare_data":
        downloads = inputs["download"].directory if "download" in inputs else None
        source = sources.open_source(*data_source(stage.name, settings), downloads=downloads)
        reads = {"source": digest_of(source.identity()), "side": settings.prepared_size}
        if settings.data.format != "raw":  # the only one once: keys of that time stay valid
            reads["format"] = settings.data.format
    elif stage.module_name == "download":
        reads = {"sources": remote_sources(stage.name, settings)}
    key = digest_of(
        {
            "stage": stage.directory or stage.name,
            "version": stage.version,
            "reads": reads,
            "inputs": {role: _identity(item) for role, item in inputs.items()},
        }
    )[:16]
    return StageRequest(
        stage=stage.name,
        key=key,
        directory=outputs / (stage.directory or stage.name) / key,
        outputs=outputs,
        reads=reads,
        inputs=inputs,
        settings=settings,
        run=run,
        variant=variant,
    )


def stage_of_variant(stage: str, variant: str) -> str:
    """Return a stage's name with that of the variant, if it is one's."""
    return f"{stage}, {variant}" if variant else stage


def data_source(stage_name: str, settings: Settings) -> tuple[str, str | None]:
    """Return source and test source that a downloading or preparing stage reads."""
    if stage_name in TRANSFER_DATA:
        return settings.transfer_source
    return settings.data.source, settings.data.test_source


def remote_sources(stage_name: str, settings: Settings) -> list[str]:
    """Return the sources that a downloading stage fetches."""
    return settings.remote_sources("transfer" if stage_name in TRANSFER_DATA else "pretrain")


def inspect(request: StageRequest) -> Verdict:
    """Say what is there for a request. Reads files, changes nothing."""
    path = request.directory / "result.json"
    newest = newest_step(request.directory)
    outdated = _replaced_input(request)
    if outdated and (newest is not None or path.exists()):
        why = f"{outdated} was computed again and is not the same"
        return Verdict(state="missing", why=why, stale="outdated")
    if not path.is_file():
        if newest is not None:
            return Verdict(state="partial", step=newest, why=f"stopped after step {newest}")
        return Verdict(state="missing", why=_why_missing(request))
    try:
        result = StageResult.model_validate_json(path.read_bytes())
    except (ValidationError, OSError) as error:
        why = f"result.json cannot be read ({str(error).splitlines()[0]})"
        return Verdict(state="missing", why=why, stale="damaged", step=newest)
    problem = _first_problem(request.directory, result)
    if problem:
        return Verdict(state="missing", why=problem, stale="damaged", step=newest)
    used = {role: item.digest for role, item in request.inputs.items()}
    if result.inputs != used:
        why = "it was built on other inputs than there are now"
        return Verdict(state="missing", why=why, stale="outdated")
    # The folder may have been moved since.
    result = result.model_copy(update={"status": "cached", "directory": request.directory})
    return Verdict(state="cached", result=result)


def write_config(request: StageRequest) -> None:
    """Write `config.yaml`, from which the stage can be run and its key explained."""
    write_atomically(
        request.directory / "config.yaml",
        yaml.safe_dump(request.model_dump(mode="json"), sort_keys=False).encode(),
    )


def read_config(directory: Path) -> StageRequest:
    """Read back what `write_config` wrote.

    Raises:
        OutputsError: If there is none, or it is not one.
    """
    try:
        values = yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8"))
        return StageRequest.model_validate(values)
    except (OSError, yaml.YAMLError, ValidationError) as error:
        raise OutputsError(
            f"A stage's directory must hold a config.yaml, {directory} has none that can be read: "
            f"{str(error).splitlines()[0]}. `rotvit run` writes it."
        ) from error


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that is complete or absent, also after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_path(path.parent)


def _values_read(stage: Stage, settings: Settings) -> dict[str, Any]:
    defaults = dict(flatten(Settings.model_construct().model_dump(mode="json")))
    found = {}
    for name, value in flatten(settings.model_dump(mode="json")):
        if name in stage.reads_where_set:
            reads = value != defaults[name]
        else:
            reads = any(name == read or name.startswith(f"{read}.") for read in stage.reads)
        if reads:
            found[name] = value
    return found


def _identity(item: StageInput) -> str:
    # Images are the same when their pixels are, wherever they came from; a backbone's bytes may
    # differ between machines, so its key stands for it and its digest is checked besides.
    return item.digest if item.stage.startswith(("download", "prepare")) else item.key


def _replaced_input(request: StageRequest) -> str:
    """Name the stage whose result is not the one that this stage's work was built on."""
    try:
        used = read_config(request.directory).inputs
    except OutputsError:
        return ""
    changed = (
        item.stage
        for role, item in request.inputs.items()
        if role in used and used[role].digest != item.digest
    )
    return next(changed, "")


def _first_problem(directory: Path, result: StageResult) -> str:
    if lies_elsewhere(directory):
        return ""  # verified when it is fetched, before something is computed from it
    for name, record in result.files.items():
        path = directory / name
        if not path.is_file():
            return f"{name} is gone"
        status = path.stat()
        if status.st_size != record.size:
            return f"{name} has {status.st_size} bytes instead of {record.size}"
        if status.st_mtime_ns != record.modified_ns and sha256_of(path) != record.sha256:
            return f"{name} is damaged: its sha256 is not the recorded one"
    if (directory / "manifest.json").is_file():  # prepared images: too large to hash every time
        return prepared.verify(directory, full=False) or ""
    if (directory / catalogue.FILE_NAME).is_file():
        return catalogue.verify(directory) or ""
    return ""


def _why_missing(request: StageRequest) -> str:
    """Compare with the most recent other result of this stage."""
    others = sorted(
        request.directory.parent.glob("*/config.yaml"), key=lambda path: path.stat().st_mtime
    )
    for path in reversed(others):
        if path.parent == request.directory:
            continue
        try:
            other = read_config(path.parent)
        except OutputsError:
            continue
        if other.stage != request.stage:
            continue
        changes = [
            f"{name} changed from {other.reads.get(name)!r} to {value!r}"
            for name, value in request.reads.items()
            if other.reads.get(name) != value
        ]
        changes += [
            f"{item.stage} is another one"
            for role, item in request.inputs.items()
            if role not in other.inputs or _identity(other.inputs[role]) != _identity(item)
        ]
        if changes:
            return "because " + ", ".join(changes)
    return "not computed yet"
