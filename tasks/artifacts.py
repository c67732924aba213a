"""What a run found, in Prefect's UI: a page of results after every stage, a table of the layers."""

import base64
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from training.metrics_file import read_metrics
from training.resumes import read_resumes
from training.store import StageRequest
from training.wording import (
    duration,
    scores_in_words,
    seeds_in_words,
    spread_in_words,
    stage_title,
    variant_in_words,
)

logger = logging.getLogger("training.artifacts")


def publish(results: Mapping[str, Any], newest: StageRequest, run_directory: Path) -> None:
    """Show the results so far; a server that does not take them costs nothing else.

    Args:
        results: Content of `results.json`.
        newest: Of the stage that was finished last; its figures are shown.
        run_directory: Where the report is, or will be.
    """
    key = "results-" + str(results["run"]).lower()
    try:
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
            page = results_page(results, newest, run_directory)
            create_markdown_artifact(
                page, key=key, description=f"After {stage_title(newest.title)}"
            )
            if newest.stage == "feature_analysis":
                rows = layer_rows(results["stages"][newest.stage]["layers"])
                create_table_artifact(rows, key=f"layers-{key}", description="What layers know")
    except Exception as error:  # whatever the server does, the run goes on
        logger.warning("Results are not shown in Prefect's UI: %s", error)


def results_page(results: Mapping[str, Any], newest: StageRequest, run_directory: Path) -> str:
    """Return the tables of stages and variants, the newest one's figures, the report's address."""
    lines = [
        f"# {results['preset']}, seed {results['seed']}",
        "",
        "| stage | score on test | state | time |",
        "|---|---|---|---|",
    ]
    for name, row in results["stages"].items():
        score = "; ".join(filter(None, (scores_in_words(name, row), seeds_in_words(name, results))))
        state, time = row["status"], duration(row["wall_seconds"])
        lines.append(f"| {stage_title(name)} | {score} | {state} | {time} |")
    for name, variant in results.get("variants", {}).items():
        scores, state, seconds = variant_in_words(variant["stages"])
        lines.append(f"| {name} | {scores} | {state} | {duration(seconds)} |")
    lines += ["", spread_in_words(results), ""]
    of = results["variants"][newest.variant] if newest.variant else results
    for alt, picture in _figures(newest.stage, of["stages"][newest.stage]):
        uri = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
        lines += [f"![{alt}]({uri})", ""]
    report = run_directory / "report" / "index.html"
    address = f"[{report}]({report.as_uri()})" if report.is_file() else "when all stages are done"
    lines += [f"Report: {address}", "", f"Results: `{run_directory / 'results.json'}`", ""]
    return "\n".join(lines)


def layer_rows(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the scores of the layers as plain values: the UI shows no table with a nan in it."""
    return [dict(_cells(layer)) for layer in layers]


def _figures(stage: str, row: Mapping[str, Any]) -> Iterator[tuple[str, bytes]]:
    if stage not in {"pretrain", "feature_analysis"}:
        return
    from training import figures  # matplotlib takes a second to import

    if stage == "pretrain":
        directory = Path(row["directory"])
        resumed = [resume["epoch"] for resume in read_resumes(directory)]
        drawings = figures.pretraining_charts(read_metrics(directory), resumed=resumed)
    else:
        drawings = [figures.layer_chart(row["layers"], chance=None)]
    for drawing in drawings:
        yield drawing.alt, drawing.png()


def _cells(layer: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in layer.items():
        if isinstance(value, Mapping):  # top-1 by the number of neighbours
            yield from ((f"{name}_{k}", _plain(top1)) for k, top1 in value.items())
        else:
            yield name, _plain(value)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4) if math.isfinite(value) else None
    return value
