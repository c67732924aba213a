"""The model card: what a published model is, its numbers, data, limits, and how to cite it."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from safetensors import safe_open

from data.rotation import ROTATION_NAMES
from data.specs import KNOWN, hub_address, public_source
from models.export import (
    WEIGHTS_FILE,
    architecture,
    label_names,
    read_config,
    read_prepared_size,
)
from training.finished_models import FinishedRun
from training.probes import wilson_interval
from training.stage_files import MODEL

LICENCES = {
    "drawn10": "`drawn10`: drawn by rotation-vit itself; nobody else has rights in the images.",
    "imagenette": (
        "`imagenette`: the data set is published under Apache-2.0; its photos are from ImageNet, "
        "whose [terms](https://image-net.org/download.php) allow non-commercial research and "
        "education only."
    ),
    "imagenet-1k": (
        "`imagenet-1k`: ImageNet's [terms](https://image-net.org/download.php) allow "
        "non-commercial research and education only."
    ),
    "cifar10": "`cifar10`: its authors state no licence; ask them before other than research use.",
}
"""What is known of the licences of the data sets that have a name here."""

_MADE = {
    "linear_probe": (
        "Its backbone was pretrained without labels, by rotation prediction, and is frozen; its "
        "head is linear."
    ),
    "finetune_1": (
        "It was pretrained without labels, by rotation prediction; then its head and last block "
        "were trained on labels."
    ),
    "finetune_2": (
        "It was pretrained without labels, by rotation prediction; then its head and last two "
        "blocks were trained on labels."
    ),
    "finetune_all": (
        "It was pretrained without labels, by rotation prediction; then all of it was trained on "
        "labels."
    ),
    "from_scratch": "It was trained on labels alone, as a baseline without pretraining.",
}

_ROWS = (
    ("pretrain", "rotation accuracy", "rotation_accuracy", "correct"),
    ("linear_probe", "linear probe of a random backbone", "", "random_backbone_correct"),
    ("linear_probe", "linear probe", "top1", "correct"),
    ("from_scratch", "from scratch, same labels", "top1", "correct"),
    ("finetune_1", "fine-tune 1: head + last block", "top1", "correct"),
    ("finetune_2", "fine-tune 2: head + last two blocks", "top1", "correct"),
    ("finetune_all", "fine-tune all of the network", "top1", "correct"),
)
"""Stage, name of the row, whether the stage's own model has this score (by its name), the count."""


def render_card(
    run: FinishedRun, stage: str, *, repository: str, why: str, data_licence: str | None
) -> str:
    """Return the README.md of a model.

    Args:
        run: The record of the run that made it.
        stage: Whose model it is.
        repository: `owner/name` on the Hub.
        why: Why this stage was chosen, in words; may be empty.
        data_licence: What to say of the data's licence; None says what is known.

    Raises:
        ModelError: If the model is damaged.
    """
    directory = run.stage_directory(stage) / MODEL
    config = read_config(directory)
    sources = {role: _code(run.results["data"][role]) for role in ("pretrain", "transfer")}
    if stage == "pretrain":
        del sources["transfer"]
    elif stage == "from_scratch":
        del sources["pretrain"]
    facts = _facts(run)
    owner, name = repository.split("/")
    classes = label_names(config)
    rows = list(_rows(run, stage))
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=False,  # Markdown; `plain` takes the meaning out of the user's names
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["plain"] = _plain
    return environment.get_template("model_card.md.j2").render(
        metadata=_metadata(name, run, stage, rows, sources),
        repository=repository,
        owner=owner,
        name=name,
        key=re.sub(r"\W", "", name).lower(),
        rotations=classes == ROTATION_NAMES,
        classes=classes,
        made=_MADE.get(stage, ""),
        size=architecture(config),
        parameters=_parameters(directory / WEIGHTS_FILE),
        prepared_size=read_prepared_size(directory),
        version=metadata.version("rotation-vit"),
        commit=facts.get("commit"),
        year=str(facts.get("written_at", ""))[:4] or "n.d.",
        seed=run.results["seed"],
        rows=rows,
        stage=stage.replace("_", "-"),
        why=why,
        data=list(_data(run, sources)),
        copies=0 if stage == "from_scratch" else _copies(run, stage),
        licences=[data_licence] if data_licence else _licences(sources),
    )


def _facts(run: FinishedRun) -> Mapping[str, Any]:
    try:
        facts: Mapping[str, Any] = json.loads((run.directory / "run.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return facts


def _rows(run: FinishedRun, stage: str) -> Iterator[dict[str, Any]]:
    for name, title, own, count in _ROWS:
        found = run.stages.get(name, {})
        if count not in found:
            continue
        correct, total = int(found[count]), int(found["total"])
        low, high = wilson_interval(correct, total)
        yield {
            "name": title,
            "score": correct / total,
            "low": low,
            "high": high,
            "correct": correct,
            "total": total,
            "this": bool(own) and name == stage,
        }


def _metadata(
    name: str,
    run: FinishedRun,
    stage: str,
    rows: list[dict[str, Any]],
    sources: Mapping[str, str],
) -> str:
    """Return the YAML that the Hub reads: what it lists, filters and shows beside the card."""
    repositories = [
        KNOWN[spec].address.repository if spec in KNOWN else hub_address(spec).repository
        for spec in dict.fromkeys(sources.values())
        if spec in KNOWN or spec.startswith("hub:")
    ]
    source = sources["pretrain" if stage == "pretrain" else "transfer"]
    results = [
        {
            "task": {"type": "image-classification"},
            "dataset": {"name": source, "type": source, "split": "test"},
            "metrics": [{"type": "accuracy", "name": row["name"], "value": round(row["score"], 4)}],
        }
        for row in rows
        if row["this"]
    ]
    values = {
        "library_name": "transformers",
        "pipeline_tag": "image-classification",
        "tags": ["vit", "self-supervised", "rotation-prediction", "rotation-vit"],
        **({"datasets": repositories} if repositories else {}),
        "model-index": [{"name": name, "results": results}],
    }
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _data(run: FinishedRun, sources: Mapping[str, str]) -> Iterator[dict[str, str]]:
    pretrain = run.stages.get("pretrain", {})
    labels = next((row["labels"] for row in run.stages.values() if "labels" in row), None)
    if "pretrain" in sources and pretrain:
        amount = f"{pretrain['images']:,} images without labels, {pretrain['epochs']} epochs"
        yield {"role": "pretrained on", "source": sources["pretrain"], "amount": amount}
    if "transfer" in sources:
        amount = "" if labels is None else f"{labels:,} labelled images"
        yield {"role": "trained and tested on", "source": sources["transfer"], "amount": amount}


def _copies(run: FinishedRun, stage: str) -> int:
    """Count test images that are, or nearly are, among those that were pretrained on."""
    trained_on_others = stage != "pretrain" and "prepare_transfer_data" in run.stages
    if trained_on_others or "left_out" in run.stages.get("pretrain", {}):
        return 0  # counted among others, or none was pretrained on
    row = run.stages.get("prepare_data", {})
    return int(row.get("test_copies_in_train") or 0)


def _licences(sources: Mapping[str, str]) -> list[str]:
    return [
        LICENCES.get(spec, f"`{spec}`: unknown to rotation-vit; ask where the images come from.")
        for spec in dict.fromkeys(sources.values())
    ]


def _parameters(weights: Path) -> int:
    with safe_open(weights, framework="pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def _code(spec: str) -> str:
    """Return a public source so that it ends neither its line nor its backticks."""
    return " ".join(public_source(spec).replace("`", " ").split())


def _plain(text: str) -> str:
    """Return text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>|#~$])", r"\\\1", " ".join(str(text).split()))
