from pathlib import Path

import pytest

from training.configure import build_settings, flatten, setting_names, to_yaml, validate
from training.presets import PRESETS
from training.settings import ConfigError, Settings, merge


def message(*overrides: str, preset: str | None = None) -> str:
    with pytest.raises(ConfigError) as error:
        build_settings(preset, overrides=overrides)
    return str(error.value)


def test_without_any_choice_the_preset_is_drawn() -> None:
    settings = build_settings()
    assert settings.preset == "drawn"
    assert settings.data.source == "drawn10"
    assert settings == Settings()


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_sets_what_it_lists_and_leaves_the_rest_at_the_missions_values(name: str) -> None:
    found = dict(flatten(build_settings(name).model_dump()))
    mission = dict(flatten(build_settings("imagenet").model_dump()))
    listed = dict(flatten(PRESETS[name].values))
    assert found == mission | listed | {"preset": name}


def test_the_mission_is_what_the_project_set_out_to_do() -> None:
    settings = build_settings("imagenet")
    assert (settings.data.source, settings.transfer.source) == ("imagenet-1k", "imagenette")
    model = settings.model
    assert (model.image_size, model.patch_size) == (160, 16)
    assert (model.embed_dim, model.depth, model.num_heads) == (512, 8, 8)
    assert settings.pretrain.epochs == 5
    assert settings.pretrain.base_lr == 1.5e-4


@pytest.mark.parametrize("name", PRESETS)
def test_what_is_printed_as_yaml_builds_the_same_settings(name: str, tmp_path: Path) -> None:
    settings = build_settings(name, overrides=["linear_probe.lrs=[0.5]", "transfer.labels=7"])
    path = tmp_path / "my.yaml"
    path.write_text(to_yaml(settings))
    assert build_settings(config=path) == settings


def test_a_config_file_may_leave_settings_out(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("preset: cifar10\npretrain: {epochs: 77}\n")
    expected = build_settings("cifar10", overrides=["pretrain.epochs=77"])
    assert build_settings(config=path) == expected


def test_later_overrides_win_and_the_seed_option_wins_over_all() -> None:
    settings = build_settings(overrides=["model.depth=5", "model.depth=7", "seed=3"], seed=11)
    assert settings.model.depth == 7
    assert settings.seed == 11


def test_an_override_leaves_its_neighbours_alone() -> None:
    given = build_settings("cifar10", overrides=["model.depth=7"])
    assert given.model == build_settings("cifar10").model.model_copy(update={"depth": 7})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("pretrain.base_lr=1e-3", 0.001),  # YAML 1.1 takes this for text
        ("pretrain.flip=no", False),
        ("pretrain.clip_norm=none", None),
        ("pretrain.clip_norm=null", None),
        ("transfer.source=none", None),
        ("linear_probe.lrs=[0.5, 1]", (0.5, 1.0)),
        ("data.source=folder:/photos/of: cats", "folder:/photos/of: cats"),
        ("data.source=folder:/photos #2", "folder:/photos #2"),
        ("data.source='quoted'", "quoted"),
        ("hardware.compile=auto", "auto"),
        ("hardware.compile=on", True),
        ("hardware.data_on_device=off", False),
        ("hardware.compile=false", False),
        ("pretrain.crop_scale=none", None),
        ("pretrain.crop_scale=1", 1.0),
        ("data.source=parquet:data/*.parquet", "parquet:data/*.parquet"),
    ],
)
def test_values_are_read_as_people_write_them(text: str, value: object) -> None:
    settings = build_settings("imagenet", overrides=[text])
    assert dict(flatten(settings.model_dump()))[text.partition("=")[0]] == value


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("preset=imagnet", "preset must be one of drawn, imagenette, photos, imagenet, cifar10"),
        ("preset=imagnet", "Did you mean imagenet?"),
        ("preset=[drawn]", "preset must be one of"),
        ("pretrain.epoch=3", "pretrain.epoch is not a setting. Did you mean pretrain.epochs?"),
        ("modle.depth=3", "Did you mean model.depth?"),
        ("model.knn_ks=[3]", "Did you mean feature_analysis.knn_ks?"),
        ("pretrain.epochs=0", "pretrain.epochs must be greater than or equal to 1, got 0"),
        ("pretrain.epochs=many", "pretrain.epochs must be a valid integer"),
        ("pretrain.base_lr=-1", "pretrain.base_lr must be greater than 0, got -1"),
        ("pretrain.base_lr=.nan", "pretrain.base_lr must be"),
        ("pretrain.base_lr=.inf", "pretrain.base_lr must be"),
        ("data.val_fraction=1", "data.val_fraction must be less than 1, got 1"),
        ("model.dropout=1", "model.dropout must be less than 1, got 1"),
        ("seed=-1", "seed must be greater than or equal to 0, got -1"),
        ("hardware.device=gpu", "hardware.device must be 'auto', 'cpu' or 'cuda', got 'gpu'"),
        ("hardware.compile=maybe", "hardware.compile must be 'auto', True or False, got 'maybe'"),
        ("pretrain.crop_scale=0", "pretrain.crop_scale must be greater than 0, got 0"),
        ("finetune.crop_scale=1.1", "finetune.crop_scale must be less than or equal to 1"),
        ("linear_probe.lrs=[]", "linear_probe.lrs"),
        ("model=3", "model is a group of settings, not one; got 3"),
        ("model=none", "model is a group of settings, not one; got None"),
        ("pretrain.warmup_epochs=15", "pretrain.warmup_epochs must be smaller than epochs"),
        ("epochs", "--set takes path.to.setting=value, got 'epochs'"),
        ("=3", "--set takes path.to.setting=value, got '=3'"),
        (f"pretrain.epochs={'9' * 5000}", "pretrain.epochs"),
        ("pretrain.epochs=2026-02-30", "pretrain.epochs must be a valid integer"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line_that_names_it(override: str, words: str) -> None:
    found = message(override)
    assert words in found
    assert "\n" not in found


def test_an_image_that_patches_do_not_fill_is_refused_with_a_size_that_works() -> None:
    found = message("model.image_size=37", "model.patch_size=8")
    assert "model.image_size must be a multiple of model.patch_size, got 37 and 8." in found
    assert "Try model.image_size=40." in found
    build_settings(overrides=["model.image_size=40", "model.patch_size=8"])


def test_a_width_that_heads_do_not_share_evenly_is_refused_with_one_that_works() -> None:
    found = message("model.embed_dim=100", "model.num_heads=3")
    assert "model.embed_dim must be a multiple of model.num_heads, got 100 and 3." in found
    assert "Try model.embed_dim=99." in found
    build_settings(overrides=["model.embed_dim=99", "model.num_heads=3"])


def test_frozen_tokens_of_images_that_change_are_refused_with_what_to_set() -> None:
    found = message("hardware.frozen_tokens=always", "preset=imagenette", "finetune.flip=false")
    assert "hardware.frozen_tokens=always needs images that are the same in every epoch" in found
    assert "finetune.crop_scale=none and data.crop_margin=0.125" in found
    build_settings(
        overrides=[
            *("preset=imagenette", "hardware.frozen_tokens=always"),
            *("finetune.flip=false", "data.crop_margin=0"),
        ]
    )


def test_an_absurd_size_is_refused_like_any_other() -> None:
    assert "model.image_size must be a multiple" in message(f"model.image_size={'1' * 400}")


def test_two_mistakes_are_both_named() -> None:
    found = message("pretrain.epochs=0", "model.dpeth=3")
    assert "pretrain.epochs" in found
    assert "model.dpeth" in found


def test_a_preset_and_a_config_file_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="either a preset or a config file"):
        build_settings("drawn", config=tmp_path / "my.yaml")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "must be readable"),
        (b"a: [1", "must be YAML"),
        (b"\xff\xfe\x00", "must be YAML"),
        (b"- a\n- b\n", "must hold `setting: value` lines"),
        (b"seed: 2026-02-30\n", "must be YAML"),
        (b"pretrain:\n  epoch: 3\n", "Did you mean pretrain.epochs?"),
        (b"preset: imagnet\n", "Did you mean imagenet?"),
        (b"1: 2\n", "1"),
    ],
)
def test_a_config_file_that_cannot_be_used_is_refused_in_one_line(
    content: bytes | None, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "my.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        build_settings(config=path)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_settings_cannot_be_changed_after_they_were_checked() -> None:
    settings = build_settings()
    with pytest.raises(ValueError, match="frozen"):
        settings.model.depth = 3  # type: ignore[misc]


def test_one_step_sees_four_turns_of_an_image_or_one() -> None:
    assert build_settings(overrides=["pretrain.batch_size=7"]).pretrain.samples_per_step == 28
    settings = build_settings(overrides=["pretrain.batch_size=7", "pretrain.rotations=random"])
    assert settings.pretrain.samples_per_step == 7


def test_images_are_stored_larger_by_the_margin_they_are_cropped_from() -> None:
    settings = build_settings(
        overrides=["model.image_size=160", "model.patch_size=16", "data.crop_margin=0.125"]
    )
    assert settings.prepared_size == 180


@pytest.mark.parametrize(
    ("overrides", "source", "shared"),
    [
        ([], ("a", None), True),
        (["transfer.source=a"], ("a", None), True),
        (["transfer.source=b"], ("b", None), False),
        (["transfer.source=b", "transfer.test_source=c"], ("b", "c"), False),
        (["data.test_source=t"], ("a", "t"), True),
        (["data.test_source=t", "transfer.test_source=c"], ("a", "c"), False),
    ],
)
def test_labelled_images_come_from_the_pretraining_source_unless_told_otherwise(
    overrides: list[str], source: tuple[str, str | None], shared: bool
) -> None:
    settings = build_settings(overrides=["data.source=a", "transfer.source=none", *overrides])
    assert settings.transfer_source == source
    assert settings.transfer_is_pretrain_data is shared


@pytest.mark.parametrize("size", [24, 20, 48])
def test_pretraining_shows_images_of_whole_patches_and_none_larger_than_the_model_s(
    size: int,
) -> None:
    sizes = ["model.image_size=32", "model.patch_size=8", f"pretrain.image_size={size}"]
    if size == 24:
        assert build_settings(overrides=sizes).pretrain_size == 24
        return
    with pytest.raises(ConfigError, match=rf"pretrain\.image_size must be .* \(32\), got {size}"):
        build_settings(overrides=sizes)


def test_every_setting_has_a_description() -> None:
    def undescribed(model: type[Settings], prefix: str = "") -> list[str]:
        found = []
        for name, field in model.model_fields.items():
            if isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields"):
                found += undescribed(field.annotation, f"{prefix}{name}.")
            elif not field.description:
                found.append(prefix + name)
        return found

    # Told by the name, and described once where they are declared: an override of a default.
    redeclared = {"epochs", "batch_size", "base_lr", "warmup_epochs"}
    assert [name for name in undescribed(Settings) if name.split(".")[-1] not in redeclared] == []


def test_names_of_settings_are_those_of_the_printed_yaml() -> None:
    names = setting_names()
    assert names == list(dict.fromkeys(names))
    for name in ("seed", "model.depth", "transfer.labels", "linear_probe.lrs", "tracking.wandb"):
        assert name in names


def test_merging_goes_into_sections_and_replaces_everything_else() -> None:
    below = {"a": {"x": 1, "y": [1, 2]}, "b": 3}
    above = {"a": {"y": [9]}, "c": {"z": 0}}
    assert merge(below, above) == {"a": {"x": 1, "y": [9]}, "b": 3, "c": {"z": 0}}
    assert below == {"a": {"x": 1, "y": [1, 2]}, "b": 3}


def test_settings_given_as_plain_values_are_checked_too() -> None:
    with pytest.raises(ConfigError, match="no_such"):
        validate({"no_such": 1})
