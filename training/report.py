"""The report: tables and figures of all stages as one HTML page that loads nothing.

It shows what is in the stages' `result.json` and `metrics.jsonl` and computes no score of its own;
a stage that did not run is left out. Its pictures come from the models (`report_pictures`).
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from data.records import DatasetError
from data.specs import without_secrets
from training import figures, remote_outputs, report_pictures, runner, store
from training.configure import flatten
from training.hardware import decide
from training.images import copies_in_pretraining
from training.label_curves import label_chart, label_curves
from training.metrics_file import METRICS, read_metrics
from training.report_pictures import Pictures
from training.report_scores import TITLES, class_chance, class_scores, rotation_score, summary
from training.resumes import read_resumes
from training.run_record import run_directory
from training.runner import StageContext, StageOutcome
from training.seeds import over_seeds
from training.settings import Settings
from training.stages import plan
from training.steps import Found, steps
from training.store import StageResult, write_atomically
from training.variants import variants as variants_of
from training.wording import pretraining_in_words

PAGE = "index.html"
"""Name of the page, below the stage's directory."""

_TRAINED_ON_LABELS = ("finetune_1", "finetune_2", "finetune_all", "from_scratch")


def compute(context: StageContext) -> StageOutcome:
    """Write the page from what the run's other stages recorded."""
    found = Found()
    for role in context.request.inputs:
        directory = context.input(role)
        result = StageResult.model_validate_json((directory / "result.json").read_bytes())
        # Where it lies now; the outputs may have been moved since it was written.
        found.add(result.model_copy(update={"directory": directory}), role.rpartition("/")[0])
    pictures = report_pictures.draw(found.stages, context.settings, context.hardware())
    page = render(found.stages, context.settings, variants=found.variants, pictures=pictures)
    write_atomically(context.directory / PAGE, page.encode())
    return StageOutcome(scores={}, made=[PAGE])


def write_so_far(settings: Settings, outputs: Path) -> Path:
    """Write a run's page from what there is, also while it is going or after it failed.

    Nothing is waited for, and nothing but the page is written.

    Args:
        settings: Of the run.
        outputs: Folder of everything that is written.

    Returns:
        The page.

    Raises:
        DatasetError: If a source of images cannot be read.
    """
    found = Found()
    begun: dict[str, Path] = {}
    for step in steps(settings, outputs, found):
        if step.request is None:
            continue
        verdict = store.inspect(step.request)
        if verdict.result:
            found.add(verdict.result, step.request.variant)
        elif not verdict.stale and (step.request.directory / METRICS).is_file():
            begun[step.title] = step.request.directory
    path = run_directory(settings, outputs) / "report" / PAGE
    if "report" in found.stages:
        page = (found.stages["report"].directory / PAGE).read_bytes()
    else:
        page = whole_page(found, settings, begun=begun, finished=False).encode()
    write_atomically(path, page)
    return path


def whole_page(
    found: Found,
    settings: Settings,
    *,
    begun: Mapping[str, Path] | None = None,
    finished: bool = True,
) -> str:
    """Return the page with its pictures; see `render`."""
    chosen = settings.hardware
    if not finished:  # the GPU is the training's that is going
        chosen = chosen.model_copy(update={"device": "cpu"})
    for result in (*found.stages.values(), *found.by_role.values()):
        if not result.stage.startswith("download"):
            remote_outputs.fetch(result.directory)
    hardware = decide(chosen)
    return render(
        found.stages,
        settings,
        variants=found.variants,
        pictures=report_pictures.draw(found.stages, settings, hardware),
        begun=begun,
        finished=finished,
    )


def render(
    results: Mapping[str, StageResult],
    settings: Settings,
    *,
    variants: Mapping[str, Mapping[str, StageResult]] | None = None,
    pictures: Pictures = report_pictures.NOTHING,
    begun: Mapping[str, Path] | None = None,
    finished: bool = True,
) -> str:
    """Return the page for the stages that are there.

    Args:
        results: By stage name, any of them; `metrics.jsonl` is read from their directories.
        settings: Of the run.
        variants: The same of the run's variants, by the variant's name.
        pictures: What `report_pictures.draw` made of the run's own.
        begun: Directories of stages that have metrics and no result yet, by title of their step.
        finished: Whether the run is over, with all that it was to compute.

    Returns:
        A whole HTML document that refers to nothing outside it. The same arguments give the same
        bytes.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # names of classes and files are the user's
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"duration": _duration, "svg": Markup}
    places = {name: result.directory for name, result in results.items()} | dict(begun or {})
    metrics = {name: read_metrics(directory) for name, directory in places.items()}
    resumes = read_resumes(places["pretrain"]) if "pretrain" in places else []
    beside = variants or {}
    spreads = over_seeds(_scores(results), [_scores(one) for one in beside.values()])
    scores, chance = list(class_scores(results, spreads)), class_chance(results)
    pretrain = results.get("pretrain")
    analysis = results["feature_analysis"].scores if "feature_analysis" in results else {}
    layers = analysis.get("layers", [])
    curves = label_curves(results, beside)
    bars = [
        figures.Bar(label=row.name, score=row.score, low=low, high=high, control=row.control)
        for row in scores
        for low, high in [row.whiskers]
    ]
    whiskers = "standard deviations between seeds" if spreads else "95% intervals"
    titled = list(_titled(results, beside))
    return environment.get_template("report.html.j2").render(
        settings=settings,
        summary=list(summary(results, spreads)),
        unfinished=None
        if finished
        else list(_standing(results, beside, begun or {}, metrics, settings)),
        rotation=rotation_score(pretrain, spreads) if pretrain else None,
        rotation_chance=figures.ROTATION_CHANCE,
        scores=scores,
        chance=chance,
        spreads=spreads,
        pretraining=pretraining_in_words(settings.evaluation.pretraining),
        score_chart=figures.score_chart(bars, chance=chance, whiskers=whiskers) if bars else None,
        pretraining_charts=figures.pretraining_charts(
            metrics.get("pretrain", []), resumed=[resume["epoch"] for resume in resumes]
        ),
        resumes=resumes,
        transfer_chart=figures.transfer_chart(
            {TITLES[name]: metrics[name] for name in _TRAINED_ON_LABELS if name in metrics},
            control=TITLES["from_scratch"],
        ),
        pictures=pictures,
        readings=results["linear_probe"].scores["readings"] if "linear_probe" in results else [],
        layers=layers,
        neighbours=list(layers[0]["knn"]) if layers else [],
        layer_chart=figures.layer_chart(layers, chance=chance) if layers else None,
        cka=analysis.get("cka"),
        random_cka=analysis.get("random_cka"),
        curves=curves,
        label_counts=sorted({count for curve in curves for count in curve.scores}),
        label_chart=label_chart(curves, chance=chance) if curves else None,
        prepared=list(_prepared(results, settings)),
        setting_groups=_setting_groups(settings, results),
        environment=list(_environment(titled)),
        times=list(_times(titled)),
    )


def _scores(results: Mapping[str, StageResult]) -> dict[str, dict[str, Any]]:
    return {name: result.scores for name, result in results.items()}


def _titled(
    results: Mapping[str, StageResult], variants: Mapping[str, Mapping[str, StageResult]]
) -> Iterator[tuple[str, StageResult]]:
    """Yield the results with what people read for each, those of the variants last."""
    for name, title in TITLES.items():
        if name in results:
            yield title, results[name]
    for variant, found in variants.items():
        for name, result in found.items():
            yield f"{TITLES[name]}, {variant}", result


def _standing(
    results: Mapping[str, StageResult],
    variants: Mapping[str, Mapping[str, StageResult]],
    begun: Mapping[str, Path],
    metrics: Mapping[str, list[dict[str, Any]]],
    settings: Settings,
) -> Iterator[tuple[str, str]]:
    """Yield the stages that a run has still to finish, and where they stand."""
    shown = {stage.name for stage in plan(settings)} - {"report", *results}
    waiting = {name: title for name, title in TITLES.items() if name in shown}
    for variant in variants_of(settings, results):
        for stage in variant.stages:
            if stage.name not in variants.get(variant.name, {}):
                step = store.stage_of_variant(stage.name, variant.name)
                waiting[step] = f"{TITLES[stage.name]}, {variant.name}"
    for name, title in waiting.items():
        rows = metrics[name] if name in begun else []
        yield title, f"at epoch {rows[-1]['epoch']:.2f}" if rows else "not finished"


def _prepared(results: Mapping[str, StageResult], settings: Settings) -> Iterator[dict[str, Any]]:
    shown = set()
    for name in ("prepare_data", "prepare_transfer_data"):
        result = results.get(name)
        if result is None or result.key in shown:
            continue
        shown.add(result.key)
        scores = result.scores
        yield {
            "title": "To pretrain on" if name == "prepare_data" else "To transfer to",
            "source": without_secrets(str(scores.get("source", ""))),
            "side": scores.get("side"),
            "counts": scores.get("counts", {}),
            "classes": scores.get("classes", []),
            "fingerprint": scores.get("fingerprint", result.digest),
            "copies": scores.get("test_copies_in_train"),
            "seen": _seen_in_pretraining(name, results, settings),
            "left_out": results["pretrain"].scores.get("left_out", 0)
            if "pretrain" in results
            else 0,
            "skipped": scores.get("skipped", 0),
            "skipped_examples": scores.get("skipped_examples", []),
        }


def _seen_in_pretraining(
    name: str, results: Mapping[str, StageResult], settings: Settings
) -> int | None:
    """Count test images that were there to pretrain on, where the preparation could not."""
    result, pretrained = results[name], results.get("prepare_data")
    counted = name == "prepare_data" and result.scores.get("test_copies_in_train") is not None
    if pretrained is None or counted:
        return None
    try:
        return copies_in_pretraining(pretrained.directory, result.directory, settings)
    except DatasetError:  # moved away or damaged since: a page of what there is
        return None


def _setting_groups(
    settings: Settings, results: Mapping[str, StageResult]
) -> list[tuple[str, list[tuple[str, str]]]]:
    # Those that cannot change a result are left out: they are in no stage's key, so that a cached
    # page could show others than were used.
    values = settings.model_dump(
        mode="json",
        exclude={
            "data": {"max_skipped"},
            "checkpoint": True,
            "tracking": True,
            "hardware": {
                *("device", "threads", "data_on_device"),
                *(() if "frozen_tokens" in results else ("frozen_tokens",)),
            },
            **({} if "finetune_all" in results else {"finetune_all": True}),
        },
    )
    groups: dict[str, list[tuple[str, str]]] = {}
    for name, value in flatten(values):
        group, _, setting = name.rpartition(".")
        if setting.endswith("source") and isinstance(value, str):
            value = without_secrets(value)  # the page is shared
        groups.setdefault(group or "run", []).append((setting, _plain(value)))
    return list(groups.items())


def _environment(titled: Sequence[tuple[str, StageResult]]) -> Iterator[tuple[str, str]]:
    """Yield each fact once, or by stage where the stages differ in it."""
    facts: dict[str, dict[str, list[str]]] = {}
    for title, result in titled:
        for fact, value in result.environment.items():
            if fact != "finished_at":  # in the table of times
                facts.setdefault(fact, {}).setdefault(str(value), []).append(title)
    for fact, stages in facts.items():
        if len(stages) == 1:
            yield fact, next(iter(stages))
        else:
            yield fact, "; ".join(f"{value} ({', '.join(who)})" for value, who in stages.items())


def _times(titled: Sequence[tuple[str, StageResult]]) -> Iterator[dict[str, Any]]:
    for title, result in titled:
        yield {
            "title": title,
            "status": result.status,
            "seconds": result.wall_seconds,
            "rate": result.timing.get("samples_per_second"),
            "finished": _moment(result.environment.get("finished_at", "")),
        }


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_plain(item) for item in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def _moment(timestamp: str) -> str:
    """Return an ISO 8601 time in UTC as people write it, to the minute."""
    return timestamp[:16].replace("T", " ") + timestamp[19:].replace("+00:00", " UTC")


def _duration(seconds: float) -> str:
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


if __name__ == "__main__":
    raise SystemExit(runner.main(compute))
