"""Which stages are run once more, under which settings, and which keys that gives."""

from pathlib import Path
from typing import Any

import pytest

from training.configure import override, validate
from training.settings import ConfigError, Settings
from training.stages import plan
from training.steps import Found, steps
from training.store import StageResult
from training.variants import variants

COUNTS = {"train": 3334, "test": 1000}
"""Of the drawn preset: 3,000 to train on."""


def result(stage: str, key: str = "") -> StageResult:
    return StageResult(
        stage=stage,
        key=key or f"key of {stage}",
        directory=Path(stage),
        status="computed",
        wall_seconds=1,
        digest=f"digest of {stage}",
        scores={"counts": COUNTS, "classes": list("abcdefghij")},
    )


def drawn(**evaluation: Any) -> Settings:
    return validate({"preset": "drawn", "evaluation": evaluation})


MADE = {"prepare_data": result("prepare_data")}


def stages_of(settings: Settings, until: str | None = None) -> dict[str, list[str]]:
    return {
        variant.name: [stage.name for stage in variant.stages]
        for variant in variants(settings, MADE, until)
    }


def keys(settings: Settings, until: str | None = None) -> dict[str, str]:
    """Keys of a run's steps, by title, as if each had been computed."""
    found, made = Found(), {}
    for step in steps(settings, Path("out"), found, until):
        assert step.request, step.lacking
        made[step.title] = step.request.key
        found.add(result(step.stage.name, step.request.key), step.request.variant)
    return made


def test_one_seed_without_trained_curves_has_no_variants() -> None:
    assert stages_of(drawn()) == {}
    assert [step.title for step in steps(drawn(), Path(), Found())] == [
        stage.name for stage in plan(drawn())
    ]


def test_seeds_share_the_pretraining_or_have_their_own() -> None:
    trained = ["linear_probe", "finetune_1", "finetune_2", "from_scratch", "label_efficiency"]
    shared, own = drawn(seeds=3), drawn(seeds=3, pretraining="own")
    assert stages_of(shared) == {"seed 1": trained, "seed 2": trained}
    assert stages_of(own)["seed 2"] == ["pretrain", "features", *trained]
    assert [one.settings.seed for one in variants(override(own, ["seed=7"]), {})] == [8, 9]


def test_a_shared_pretraining_is_computed_once_and_an_own_one_for_every_seed() -> None:
    for settings, pretrainings in ((drawn(seeds=3), 1), (drawn(seeds=3, pretraining="own"), 3)):
        made = keys(settings)
        found = {key for title, key in made.items() if title.startswith("pretrain")}
        assert len(found) == pretrainings
        for stage in ("linear_probe", "finetune_1", "finetune_2", "from_scratch"):
            assert len({made[stage], made[f"{stage}, seed 1"], made[f"{stage}, seed 2"]}) == 3


def test_a_seed_of_its_own_is_what_a_run_of_that_seed_computes() -> None:
    """Found again from there, and the other way round; with a shared pretraining only this is."""
    alone = keys(override(drawn(), ["seed=1"]))
    own, shared = keys(drawn(seeds=2, pretraining="own")), keys(drawn(seeds=2))
    for stage in ("pretrain", "features", "linear_probe", "finetune_2", "from_scratch"):
        assert own[f"{stage}, seed 1"] == alone[stage]
    assert shared["from_scratch, seed 1"] == alone["from_scratch"]
    assert shared["linear_probe, seed 1"] != alone["linear_probe"]


def test_the_runs_own_stages_do_not_change_with_the_variants_beside_them() -> None:
    alone = keys(drawn())
    beside = keys(drawn(seeds=2, trained_curves=True))
    assert {name: beside[name] for name in alone if name != "report"} == {
        name: key for name, key in alone.items() if name != "report"
    }
    assert beside["report"] != alone["report"]


def test_the_report_is_of_all_variants() -> None:
    found, settings = Found(), drawn(seeds=2)
    for step in steps(settings, Path("out"), found):
        if step.title == "finetune_2, seed 1":
            continue  # as if it had not been computed yet
        if step.stage.name == "report":
            assert (step.request, step.lacking) == (None, "finetune_2, seed 1")
            break
        assert step.request
        found.add(result(step.stage.name, step.request.key), step.request.variant)
    else:
        raise AssertionError("there was no report")
    found.add(result("finetune_2"), "seed 1")
    *_, last = steps(settings, Path("out"), found)
    assert last.request
    assert last.request.inputs["seed 1/finetune_2"].digest == "digest of finetune_2"
    assert last.request.inputs["finetune_2"].key != "key of finetune_2"


def test_nothing_is_repeated_that_the_run_does_not_have() -> None:
    settings = drawn(seeds=2, pretraining="own", trained_curves=True, label_fractions=[0.01])
    assert stages_of(settings, "linear_probe") == {
        "seed 1": ["pretrain", "features", "linear_probe"]
    }
    assert stages_of(settings, "pretrain") == {"seed 1": ["pretrain"]}
    assert stages_of(settings, "from_scratch") == {
        "seed 1": ["from_scratch"],
        "30 labels": ["from_scratch"],
        "30 labels, seed 1": ["from_scratch"],
    }
    assert stages_of(drawn(seeds=2), "feature_analysis") == {}
    assert stages_of(drawn(seeds=2), "pretrain") == {}


def test_curves_are_trained_at_every_fraction_but_the_runs_own_under_every_seed() -> None:
    arms = ["linear_probe", "finetune_2", "from_scratch"]
    settings = drawn(trained_curves=True, label_fractions=[0.01, 0.5, 1.0])
    assert stages_of(settings) == {"30 labels": arms, "1500 labels": arms, "3000 labels": arms}
    for labels in ("3000", "none"):
        beside = override(settings, [f"transfer.labels={labels}"])
        assert stages_of(beside) == {"30 labels": arms, "1500 labels": arms}
    chained = override(settings, ["finetune.start_from=previous"])
    assert stages_of(chained)["30 labels"] == ["linear_probe", "finetune_1", *arms[1:]]
    seeds = override(settings, ["evaluation.seeds=2"])
    assert [name for name in stages_of(seeds) if name.startswith("30 ")] == [
        "30 labels",
        "30 labels, seed 1",
    ]
    assert len(set(keys(seeds).values())) == len(keys(seeds)), "no two steps are the same"


def test_fractions_are_not_known_before_the_images_are() -> None:
    assert variants(drawn(trained_curves=True), {}) == []
    unlabelled = result("prepare_data")
    unlabelled.scores["classes"] = []
    assert variants(drawn(trained_curves=True), {"prepare_data": unlabelled}) == []


def test_a_curve_of_a_seed_builds_on_that_seeds_own_pretraining() -> None:
    settings = drawn(seeds=2, trained_curves=True, label_fractions=[0.01])
    found = Found()
    for step in steps(override(settings, ["evaluation.pretraining=own"]), Path("out"), found):
        assert step.request
        if step.title == "linear_probe, 30 labels, seed 1":
            assert step.request.inputs["start"].key == found.variants["seed 1"]["pretrain"].key
            assert step.request.inputs["start"].key != found.stages["pretrain"].key
        if step.title == "finetune_2, 30 labels, seed 1":
            own = found.variants["30 labels, seed 1"]["linear_probe"]
            assert step.request.inputs["start"].key == own.key
        found.add(result(step.stage.name, step.request.key), step.request.variant)


def test_few_labels_take_smaller_batches_and_enough_steps() -> None:
    settings = override(
        drawn(trained_curves=True, label_fractions=[0.005, 0.05, 1.0], least_steps=100),
        ["finetune.accumulation_steps=16", "finetune.patience=3"],
    )
    few, some, many = variants(settings, MADE)
    assert few.overrides == (
        "transfer.labels=15",
        "finetune.batch_size=15",
        "finetune.accumulation_steps=1",
        "finetune.epochs=100",
        "finetune.warmup_epochs=10",
        "finetune.patience=15",
        "from_scratch.batch_size=15",
        "from_scratch.epochs=100",
        "from_scratch.warmup_epochs=10",
    )
    assert few.settings == override(settings, few.overrides)
    assert some.settings.finetune.epochs == 25, "150 labels are 4 batches of 32"
    assert some.settings.finetune.batch_size == 32
    assert many.overrides == ("transfer.labels=3000",)


def test_more_seeds_than_there_are_numbers_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"seed \+ evaluation\.seeds must be at most 2147483648"):
        validate({"seed": 2**31 - 1, "evaluation": {"seeds": 2}})
