"""The report: tables and figures of all stages as one HTML page that loads nothing.

It shows what is in the stages' `result.json` and `metrics.jsonl` and computes no score of its own;
a stage that did not run is left out.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from data.records import DatasetError
from training import figures
from training.images import copies_in_pretraining
from training.metrics_file import read_metrics
from training.probes import wilson_interval
from training.runner import StageContext, StageOutcome
from training.settings import Settings, flatten
from training.store import StageResult, write_atomically

PAGE = "index.html"
"""Name of the page, below the stage's directory."""

TITLES = {
    "download": "Download",
    "download_transfer": "Download for transfer",
    "prepare_data": "Prepare data",
    "prepare_transfer_data": "Prepare transfer data",
    "pretrain": "Pretrain",
    "linear_probe": "Linear probe",
    "finetune_1": "Fine-tune, last block",
    "finetune_2": "Fine-tune, last two blocks",
    "from_scratch": "From scratch",
    "feature_analysis": "Feature analysis",
}
"""What people read for each stage, in the order of the report."""

_TRAINED_ON_LABELS = ("finetune_1", "finetune_2", "from_scratch")


@dataclass(frozen=True, kw_only=True)
class Score:
    """One row of the headline table.

    Attributes:
        name: What was measured, in words.
        note: How.
        score: Share of right answers on test.
        correct: Right answers, where they were counted.
        total: Answers, where they were counted.
        control: Whether it is there to be compared with.
    """

    name: str
    note: str
    score: float
    correct: int | None
    total: int | None
    control: bool = False

    @property
    def interval(self) -> tuple[float, float] | None:
        """95% Wilson interval, where the answers were counted."""
        if self.correct is None or not self.total:
            return None
        return wilson_interval(self.correct, self.total)


def compute(context: StageContext) -> StageOutcome:
    """Write the page from what the run's other stages recorded."""
    results = {}
    for role, item in context.request.inputs.items():
        directory = context.input(role)
        result = StageResult.model_validate_json((directory / "result.json").read_bytes())
        # Where it lies now; the outputs may have been moved since it was written.
        results[item.stage] = result.model_copy(update={"directory": directory})
    page = render(results, context.settings)
    write_atomically(context.directory / PAGE, page.encode())
    return StageOutcome(scores={}, made=[PAGE])


def render(results: Mapping[str, StageResult], settings: Settings) -> str:
    """Return the page for the stages that are there.

    Args:
        results: By stage name, any of them; `metrics.jsonl` is read from their directories.
        settings: Of the run.

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
    scores, chance = list(_class_scores(results)), _class_chance(results)
    pretrain = results.get("pretrain")
    layers = results["feature_analysis"].scores["layers"] if "feature_analysis" in results else []
    bars = [
        figures.Bar(label=row.name, score=row.score, low=low, high=high, control=row.control)
        for row in scores
        for low, high in [row.interval or (row.score, row.score)]
    ]
    return environment.get_template("report.html.j2").render(
        settings=settings,
        summary=list(_summary(results)),
        rotation=_rotation_score(pretrain) if pretrain else None,
        rotation_chance=figures.ROTATION_CHANCE,
        scores=scores,
        chance=chance,
        score_chart=figures.score_chart(bars, chance=chance) if bars else None,
        pretraining_charts=figures.pretraining_charts(
            read_metrics(pretrain.directory) if pretrain else []
        ),
        transfer_chart=figures.transfer_chart(
            {
                TITLES[name]: read_metrics(results[name].directory)
                for name in _TRAINED_ON_LABELS
                if name in results
            },
            control=TITLES["from_scratch"],
        ),
        layers=layers,
        layer_chart=figures.layer_chart(layers, chance=chance) if layers else None,
        prepared=list(_prepared(results, settings)),
        setting_groups=_setting_groups(settings),
        environment=list(_environment(results)),
        times=list(_times(results)),
    )


def _rotation_score(result: StageResult) -> Score:
    return Score(
        name="Rotation",
        note="which of four ways a test image was turned",
        score=result.scores["rotation_accuracy"],
        correct=result.scores.get("correct"),
        total=result.scores.get("total"),
    )


def _class_scores(results: Mapping[str, StageResult]) -> Iterator[Score]:
    if "linear_probe" in results:
        probe = results["linear_probe"].scores
        yield Score(
            name="Random backbone",
            note="linear probe of the untrained network",
            score=probe["random_backbone_top1"],
            correct=probe.get("random_backbone_correct"),
            total=probe.get("total"),
            control=True,
        )
    if "from_scratch" in results:
        note = "same network and labels, not pretrained"
        yield _top1(results["from_scratch"], note, control=True)
    for name, note in (
        ("linear_probe", "linear head on the frozen backbone"),
        ("finetune_1", "head and last block trained"),
        ("finetune_2", "head and last two blocks trained"),
    ):
        if name in results:
            yield _top1(results[name], note)


def _top1(result: StageResult, note: str, *, control: bool = False) -> Score:
    return Score(
        name=TITLES[result.stage],
        note=note,
        score=result.scores["top1"],
        correct=result.scores.get("correct"),
        total=result.scores.get("total"),
        control=control,
    )


def _class_chance(results: Mapping[str, StageResult]) -> float | None:
    data = results.get("prepare_transfer_data") or results.get("prepare_data")
    classes = len(data.scores.get("classes", ())) if data else 0
    return 1 / classes if classes else None


def _summary(results: Mapping[str, StageResult]) -> Iterator[str]:
    """Say in sentences what the tables say in numbers."""
    if "pretrain" in results:
        score = results["pretrain"].scores["rotation_accuracy"]
        yield (
            "Trained without any label to tell which way up an image is, the network is right for "
            f"{score:.0%} of the turned test images; guessing gives 25%."
        )
    if "linear_probe" in results:
        probe = results["linear_probe"].scores
        labels = f"With {probe['labels']:,} labels, a" if "labels" in probe else "A"
        yield (
            f"{labels} linear head on its frozen features names {probe['top1']:.0%} of the test "
            f"images right; on those of the untrained network, {probe['random_backbone_top1']:.0%}."
        )
    tuned = [
        results[name].scores["top1"] for name in ("finetune_1", "finetune_2") if name in results
    ]
    if tuned and "from_scratch" in results:
        yield (
            f"Fine-tuned it reaches {max(tuned):.0%}, where the same network trained from scratch "
            f"on the same labels reaches {results['from_scratch'].scores['top1']:.0%}."
        )


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
            "source": scores.get("source"),
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


def _setting_groups(settings: Settings) -> list[tuple[str, list[tuple[str, str]]]]:
    # Those that cannot change a result are left out: they are in no stage's key, so that a cached
    # page could show others than were used.
    values = settings.model_dump(
        mode="json",
        exclude={
            "data": {"max_skipped"},
            "checkpoint": True,
            "tracking": True,
            "hardware": {"device", "threads"},
        },
    )
    groups: dict[str, list[tuple[str, str]]] = {}
    for name, value in flatten(values):
        group, _, setting = name.rpartition(".")
        groups.setdefault(group or "run", []).append((setting, _plain(value)))
    return list(groups.items())


def _environment(results: Mapping[str, StageResult]) -> Iterator[tuple[str, str]]:
    """Yield each fact once, or by stage where the stages differ in it."""
    facts: dict[str, dict[str, list[str]]] = {}
    for name, result in results.items():
        for fact, value in result.environment.items():
            if fact != "finished_at":  # in the table of times
                facts.setdefault(fact, {}).setdefault(str(value), []).append(TITLES[name])
    for fact, stages in facts.items():
        if len(stages) == 1:
            yield fact, next(iter(stages))
        else:
            yield fact, "; ".join(f"{value} ({', '.join(who)})" for value, who in stages.items())


def _times(results: Mapping[str, StageResult]) -> Iterator[dict[str, Any]]:
    for name, title in TITLES.items():
        if name in results:
            yield {
                "title": title,
                "status": results[name].status,
                "seconds": results[name].wall_seconds,
                "rate": results[name].timing.get("samples_per_second"),
                "finished": _moment(results[name].environment.get("finished_at", "")),
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
