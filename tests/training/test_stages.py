import graphlib
import importlib.util
import subprocess
import sys

import pytest

from training.configure import build_settings, setting_names
from training.presets import PRESETS
from training.settings import ConfigError, Settings
from training.stages import STAGES, plan, stage_named, transfer_data

SHARED = build_settings("drawn")
"""Pretraining and transfer on the same images."""
APART = build_settings("drawn", overrides=["transfer.source=folder:flowers"])
"""Labelled images from elsewhere."""
REMOTE = build_settings("imagenet")
"""The same, and all of them must be downloaded."""
STILL = build_settings("imagenet", overrides=["finetune.flip=false"])
"""The same, and to fine-tune an image is the same in every epoch."""


def names(settings: Settings, until: str | None = None) -> list[str]:
    return [stage.name for stage in plan(settings, until)]


def test_a_whole_run_has_every_stage_once() -> None:
    usual = [name for name in STAGES if name != "finetune_all"]
    assert names(STILL) == usual
    augmented = [name for name in usual if name != "frozen_tokens"]
    assert names(REMOTE) == augmented
    local = [name for name in augmented if not name.startswith("download")]
    assert names(APART) == local
    assert names(SHARED) == [name for name in local if name != "prepare_transfer_data"]


@pytest.mark.parametrize(
    "settings", [SHARED, APART, REMOTE, STILL], ids=["shared", "apart", "remote", "still"]
)
def test_stages_come_after_what_they_need(settings: Settings) -> None:
    graph = {
        stage.name: set(stage.needs(settings).values()) & set(names(settings))
        for stage in plan(settings)
    }
    order = names(settings)
    for stage, needed in graph.items():
        assert all(order.index(name) < order.index(stage) for name in needed)
    assert set(graphlib.TopologicalSorter(graph).static_order()) == set(order)


@pytest.mark.parametrize(
    ("until", "shared", "apart"),
    [
        ("prepare_data", ["prepare_data"], ["prepare_data"]),
        ("pretrain", ["prepare_data", "pretrain"], ["prepare_data", "pretrain"]),
        (
            "linear_probe",
            ["prepare_data", "pretrain", "features", "linear_probe"],
            ["prepare_data", "prepare_transfer_data", "pretrain", "features", "linear_probe"],
        ),
        (
            "finetune_2",
            ["prepare_data", "pretrain", "features", "linear_probe", "finetune_2"],
            [
                "prepare_data",
                "prepare_transfer_data",
                "pretrain",
                "features",
                "linear_probe",
                "finetune_2",
            ],
        ),
        (
            "from_scratch",
            ["prepare_data", "from_scratch"],
            ["prepare_transfer_data", "from_scratch"],
        ),
        (
            "feature_analysis",
            ["prepare_data", "pretrain", "features", "feature_analysis"],
            ["prepare_data", "prepare_transfer_data", "pretrain", "features", "feature_analysis"],
        ),
    ],
)
def test_a_run_until_a_stage_has_that_stage_and_what_it_needs(
    until: str, shared: list[str], apart: list[str]
) -> None:
    assert names(SHARED, until) == shared
    assert names(APART, until) == apart


def test_all_is_fine_tuned_where_it_is_asked_for() -> None:
    wanted = ["transfer.finetune_all=true", "finetune.flip=false", "finetune_all.flip=false"]
    third = build_settings("imagenet", overrides=wanted)
    assert names(third) == list(STAGES)
    assert "tokens" not in STAGES["finetune_all"].needs(third), "it has no frozen blocks"
    assert STAGES["report"].needs(third)["finetune_all"] == "finetune_all"
    assert names(SHARED, "finetune-all") == [
        *("prepare_data", "pretrain", "features", "linear_probe", "finetune_all"),
    ]


def test_fine_tuning_twice_starts_from_the_probe_unless_told_to_go_on() -> None:
    goes_on = build_settings(overrides=["finetune.start_from=previous"])
    assert STAGES["finetune_2"].needs(SHARED)["start"] == "linear_probe"
    assert STAGES["finetune_2"].needs(goes_on)["start"] == "finetune_1"
    assert "finetune_1" in names(goes_on, "finetune_2")


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_fine_tune_on_images_as_before_there_were_frozen_tokens(preset: str) -> None:
    """Their results of that time stay valid: the keys are made of the same."""
    settings = build_settings(preset)
    assert "frozen_tokens" not in names(settings)
    for name in ("finetune_1", "finetune_2"):
        assert set(STAGES[name].needs(settings)) == {"start", "data"}
        assert not [read for read in STAGES[name].reads if read.startswith("hardware.frozen")]


@pytest.mark.parametrize(
    ("change", "used"),
    [
        ("finetune.flip=false", True),
        ("hardware.frozen_tokens=always", True),
        ("hardware.frozen_tokens=never", False),
        ("finetune.flip=true", False),
        ("data.crop_margin=0.1", False),
        ("data.crop_margin=0.001", True),  # of 160 px, less than one
        ("pretrain.flip=false", True),
    ],
)
def test_frozen_tokens_are_used_where_images_stay_the_same(change: str, used: bool) -> None:
    settings = build_settings("imagenet", overrides=["finetune.flip=false", change])
    for name in ("finetune_1", "finetune_2"):
        assert (STAGES[name].needs(settings).get("tokens") == "frozen_tokens") == used
        assert ("frozen_tokens" in names(settings, name)) == used
    assert "frozen_tokens" not in names(settings, "from_scratch")


def test_from_scratch_does_not_depend_on_pretraining() -> None:
    stage = STAGES["from_scratch"]
    assert set(stage.needs(SHARED).values()) == {"prepare_data"}
    assert not [name for name in stage.reads if name.startswith("pretrain")]


def test_what_is_here_already_is_not_downloaded() -> None:
    for name in ("prepare_data", "prepare_transfer_data"):
        assert STAGES[name].needs(APART) == {}
    assert names(REMOTE, "from_scratch") == [
        "download_transfer",
        "prepare_transfer_data",
        "from_scratch",
    ]


@pytest.mark.parametrize(
    ("overrides", "remote"),
    [
        (["data.source=folder:x"], []),
        (["data.source=parquet:x/*.parquet"], []),
        (["data.source=cifar10"], ["cifar10"]),
        (["data.source=parquet:s3://x/*.parquet"], ["parquet:s3://x/*.parquet"]),
        (["data.test_source=hub:a/b"], ["hub:a/b"]),
        (["data.source=hub:a/b", "data.test_source=hub:a/b"], ["hub:a/b"]),
    ],
)
def test_only_remote_sources_are_downloaded(overrides: list[str], remote: list[str]) -> None:
    settings = build_settings("drawn", overrides=overrides)
    assert settings.remote_sources("pretrain") == remote
    assert ("download" in names(settings)) == bool(remote)


def test_labelled_images_are_prepared_apart_only_if_they_come_from_elsewhere() -> None:
    assert transfer_data(SHARED) == "prepare_data"
    assert transfer_data(APART) == "prepare_transfer_data"


def test_the_report_reads_every_other_stage_of_the_run() -> None:
    for settings in (SHARED, APART, REMOTE, STILL):
        needed = STAGES["report"].needs(settings)
        assert sorted(needed.values()) == sorted(set(names(settings)) - {"report"})


@pytest.mark.parametrize("name", ["linear-probe", "linear_probe"])
def test_a_stage_is_found_under_both_spellings(name: str) -> None:
    assert stage_named(name).name == "linear_probe"


@pytest.mark.parametrize("name", ["pretrian", "", "finetune-3"])
def test_an_unknown_stage_is_refused_with_those_there_are(name: str) -> None:
    with pytest.raises(ConfigError, match=r"prepare-data, .*, report") as error:
        stage_named(name)
    assert repr(name) in str(error.value)


@pytest.mark.parametrize("name", STAGES)
def test_what_a_stage_reads_is_a_setting_or_a_section(name: str) -> None:
    known = setting_names()
    sections = {setting.rpartition(".")[0] for setting in known}
    for read in STAGES[name].reads:
        assert read in known or read in sections


def test_settings_that_cannot_change_a_result_are_read_by_no_stage() -> None:
    for stage in STAGES.values():
        for read in stage.reads:
            assert not read.startswith(("checkpoint", "tracking", "hardware.device"))


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_has_a_module_of_its_name(name: str) -> None:
    stage = STAGES[name]
    assert importlib.util.find_spec(f"training.{stage.module or stage.name}")


def test_the_table_is_known_without_torch() -> None:
    code = (
        "import sys, training.stages; print([m for m in ('torch', 'pydantic') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
