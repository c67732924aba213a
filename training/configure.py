"""Settings from a preset, a YAML file and `path.to.setting=value` overrides, and back to YAML."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from training.settings import ConfigError, Settings, merge, nearest


def build_settings(
    preset: str | None = None,
    *,
    config: Path | None = None,
    overrides: Iterable[str] = (),
    seed: int | None = None,
) -> Settings:
    """Build settings from a preset or a YAML file, then `path.to.setting=value` overrides.

    Args:
        preset: Name of a preset; `drawn` where neither it nor `config` is given.
        config: YAML file as `rotvit config` prints it; may leave settings out.
        overrides: Later ones win. The value is read as YAML, and `none` as YAML's null.
        seed: Short for an override of `seed`.

    Raises:
        ConfigError: With one line that names the setting, its value and what must hold.
    """
    if preset is not None and config is not None:
        raise ConfigError(
            "Give either a preset or a config file, not both; a config names its own."
        )
    given: dict[str, Any] = _read_yaml(config) if config else {}
    if preset is not None:
        given["preset"] = preset
    for override in overrides:
        given = merge(given, _parse_override(override))
    if seed is not None:
        given["seed"] = seed
    return validate(given)


def override(settings: Settings, overrides: Iterable[str]) -> Settings:
    """Return settings with some of them changed.

    Args:
        settings: Complete; its preset has been laid under it already.
        overrides: `path.to.setting=value`, as `--set` takes them; later ones win.

    Raises:
        ConfigError: If one of them is no setting, or has a value that it cannot have.
    """
    given: dict[str, Any] = settings.model_dump()
    for text in overrides:
        change = _parse_override(text)
        if "preset" in change:
            raise ConfigError(
                f"overrides change single settings, not the preset they are laid over; got "
                f"{text!r}. Choose the preset with settings.preset, or the deployment of its name."
            )
        given = merge(given, change)
    return validate(given)


def validate(given: Mapping[str, Any]) -> Settings:
    """Build settings from nested plain values.

    Raises:
        ConfigError: With one line per wrong setting.
    """
    try:
        return Settings.model_validate(given)
    except ValidationError as error:
        raise ConfigError(" ".join(_explain(item) for item in error.errors())) from error


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield `(dotted name, value)` of nested values, in their order."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def setting_names() -> list[str]:
    """Every setting's dotted name, as `--set` takes it."""
    return [name for name, _ in flatten(Settings().model_dump())]


def to_yaml(settings: Settings) -> str:
    """Return settings as YAML that `build_settings(config=...)` reads back."""
    text: str = yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)
    return text


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"The config file must be readable, but {path} is not: {error.strerror}. "
            "`rotvit config --preset drawn > my.yaml` writes one to start from."
        ) from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: 2026-02-30, bytes that are no text
        raise ConfigError(
            f"The config file must be YAML, but {path} is not: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(values, dict):
        raise ConfigError(f"The config file must hold `setting: value` lines, {path} does not.")
    return values


def _parse_override(override: str) -> dict[str, Any]:
    name, equals, text = override.partition("=")
    if not equals or not name.strip():
        raise ConfigError(
            f"--set takes path.to.setting=value, got {override!r}. Example: --set pretrain.epochs=3"
        )
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        value = text  # a glob or a path that YAML would read as its own syntax
    if isinstance(value, str | dict) and not text.lstrip().startswith(("'", '"', "{")):
        value = text.strip()  # YAML would end a path at ` #` and split it at `: `
    if value == "none":  # as the descriptions of the settings say; YAML's own word is null
        value = None
    nested: Any = value
    for part in reversed(name.strip().split(".")):
        nested = {part: nested}
    result: dict[str, Any] = nested
    return result


def _explain(item: Any) -> str:
    name = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"{name} is not a setting.{nearest(name, setting_names())}"
    if item["type"] == "value_error":  # raised by a validator here: a whole sentence already
        message = str(item["ctx"]["error"])
        starts_with_setting = message.startswith(("warmup_epochs", "accumulation_steps"))
        section = f"{name}." if name and starts_with_setting else ""
        return section + message
    if item["type"] in {"model_type", "model_attributes_type"}:
        return f"{name} is a group of settings, not one; got {item['input']!r}."
    message = item["msg"].removeprefix("Input ").replace("should ", "must ")
    return f"{name} {message}, got {item['input']!r}."
