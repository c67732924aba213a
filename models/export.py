"""Models on disk, in transformers' format, with the preprocessing that our data path does.

A directory holds `config.json`, `model.safetensors` and `preprocessor_config.json`, and is what
`transformers.pipeline("image-classification", model=directory)` expects.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import CLIPImageProcessor, ViTConfig, ViTForImageClassification
from transformers.image_utils import PILImageResampling

from models.errors import ModelError
from models.vit import allocate

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
PROCESSOR_FILE = "preprocessor_config.json"

MAX_NAMES_IN_MESSAGE = 5
"""Weights that an error lists by name; the rest is counted."""


def save_model(
    model: ViTForImageClassification, directory: Path, *, image_size: int, prepared_size: int
) -> None:
    """Write the model so that transformers can load it and feed it photos as we did.

    The preprocessing is that of `CLIPImageProcessor`, because ViT's own squashes photos to a
    square: the short side is resized to `prepared_size` (bilinear, antialiased), then the central
    `image_size` square is cut out and scaled to [-1, 1].

    Args:
        model: On any device. Weights are written as float32.
        directory: Created if need be; files of an earlier model are replaced.
        image_size: Side of the input, in pixels; must be the model's.
        prepared_size: Side in pixels of the prepared images that evaluation crops from the
            centre; at least `image_size`.

    Raises:
        ModelError: If the sizes do not fit the model or each other.
    """
    if image_size != model.config.image_size:
        raise ModelError(
            f"image_size must be that of the model, {model.config.image_size} px, "
            f"got {image_size} px."
        )
    if prepared_size < image_size:
        raise ModelError(
            f"prepared_size must be at least image_size, got {prepared_size} px and {image_size} "
            "px. Set data.crop_margin to 0 or more."
        )
    directory.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(directory)
    # Not model.save_pretrained: it draws a progress bar.
    weights = {
        name: tensor.detach().float().cpu().contiguous()
        for name, tensor in model.state_dict().items()
    }
    # Not save_file: it lets nobody but the owner read the file.
    (directory / WEIGHTS_FILE).write_bytes(save(weights, metadata={"format": "pt"}))
    _processor(image_size, prepared_size).save_pretrained(directory)


def load_model(
    directory: Path, *, expect: Mapping[str, int | float] | None = None
) -> ViTForImageClassification:
    """Read what `save_model` wrote; every weight must be there and fit.

    Returns a model on the CPU, float32, in eval mode, everything trainable. The global random
    state is left as it was.

    Args:
        directory: A `model/` directory.
        expect: Settings that the model must have, by the names of `build_vit`: any of
            `image_size`, `patch_size`, `embed_dim`, `depth`, `num_heads`, `mlp_ratio`, `dropout`,
            `num_labels`. None accepts any.

    Raises:
        ModelError: If files are missing or damaged, if weights are missing, unknown or of another
            shape, or if the model is not the expected one.
    """
    config = read_config(directory)
    if expect is not None:
        _check_expected(config, expect, directory)
    model = allocate(config)
    weights = _read_weights(directory)
    _check_fit(model, weights, directory)
    model.load_state_dict(weights)
    model.train(False)
    return model


def read_prepared_size(directory: Path) -> int:
    """Return the side, in pixels, of the prepared images that the model was evaluated on.

    Args:
        directory: A `model/` directory.

    Raises:
        ModelError: If photos are prepared for the model in another way than `save_model` writes
            down: then it is none of ours, and our data path would show it other pictures.
    """
    path = directory / PROCESSOR_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        prepared, side = int(found["size"]["shortest_edge"]), int(found["crop_size"]["height"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{directory} must be a model that this project wrote, but {PROCESSOR_FILE} is missing "
            "or of another kind. Other models work with transformers.pipeline."
        ) from error
    ours = json.loads(_processor(side, prepared).to_json_string())
    other = sorted(name for name in ours if found.get(name) != ours[name])
    if other:
        raise ModelError(
            f"{directory} must be a model that this project wrote, but its {PROCESSOR_FILE} has "
            f"another {', '.join(other)}. Other models work with transformers.pipeline."
        )
    return prepared


def read_config(directory: Path) -> ViTConfig:
    """Return the configuration of a model: sizes and names of the classes.

    Raises:
        ModelError: If there is none, or it is damaged or none of a ViT.
    """
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise ModelError(
            f"{directory} must hold a model, but there is no {CONFIG_FILE} in it. Name a `model` "
            "directory of a finished stage."
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["model_type"] != "vit":
            raise ModelError(
                f"{path} must describe a ViT, got model_type {values['model_type']!r}."
            )
        return ViTConfig.from_dict(values)
    except ModelError:
        raise
    except Exception as error:  # transformers checks the values with errors of several kinds
        raise ModelError(
            f"{path} is damaged ({error}). Delete the directory and run the stage again."
        ) from error


def label_names(config: ViTConfig) -> tuple[str, ...]:
    """Return the names of a model's classes, in the order of the labels."""
    names = {int(label): name for label, name in (config.id2label or {}).items()}
    return tuple(names[label] for label in sorted(names))


def input_side(config: ViTConfig) -> int:
    """Return the side of the square that a model reads, in pixels."""
    return _whole(config.image_size)


def architecture(config: ViTConfig) -> dict[str, int | float]:
    """Return the sizes of a model by the names that the settings use."""
    return {
        "image_size": _whole(config.image_size),
        "patch_size": _whole(config.patch_size),
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": config.intermediate_size / config.hidden_size,
        "dropout": config.hidden_dropout_prob,
        "num_labels": _whole(config.num_labels),
    }


def _whole(size: object) -> int:
    if not isinstance(size, int):
        raise ModelError(f"The sizes of a model must be whole numbers (square images), got {size}.")
    return size


def _processor(image_size: int, prepared_size: int) -> CLIPImageProcessor:
    return CLIPImageProcessor(
        size={"shortest_edge": prepared_size},
        resample=PILImageResampling.BILINEAR,
        crop_size={"height": image_size, "width": image_size},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


def _read_weights(directory: Path) -> dict[str, Tensor]:
    path = directory / WEIGHTS_FILE
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise ModelError(
            f"{directory} has no {WEIGHTS_FILE}. Delete the directory and run the stage again."
        ) from error
    except SafetensorError as error:
        raise ModelError(
            f"{path} is damaged ({error}). Delete the directory and run the stage again."
        ) from error


def _check_expected(config: ViTConfig, expect: Mapping[str, int | float], directory: Path) -> None:
    found = architecture(config)
    unknown = sorted(set(expect) - set(found))
    if unknown:
        raise ModelError(f"expect may name {', '.join(found)}, got {', '.join(unknown)}.")
    # The hidden width of the MLP is a whole number, so its ratio may come back rounded.
    expect = dict(expect)
    if "mlp_ratio" in expect:
        width = config.hidden_size
        expect["mlp_ratio"] = int(width * expect["mlp_ratio"]) / width
    different = [
        f"model.{name}={found[name]} (expected {value})"
        for name, value in expect.items()
        if found[name] != value
    ]
    if different:
        raise ModelError(
            f"{directory} holds another network than the settings describe: it has "
            f"{', '.join(different)}. Change the settings to match it, or train it again."
        )


def _check_fit(
    model: ViTForImageClassification, weights: Mapping[str, Tensor], directory: Path
) -> None:
    needed = model.state_dict()
    problems = []
    if missing := [name for name in needed if name not in weights]:
        problems.append(f"has no {_listed(missing)}")
    if extra := [name for name in weights if name not in needed]:
        problems.append(f"has {_listed(extra)}, which the network does not know")
    reshaped = [
        f"{name} of shape {tuple(weights[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in needed.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    if reshaped:
        problems.append(f"has {_listed(reshaped)}")
    if problems:
        raise ModelError(
            f"{directory / WEIGHTS_FILE} must hold exactly the weights of the network in "
            f"{CONFIG_FILE}, but it {'; it '.join(problems)}. The two files are from different "
            "models or versions: delete the directory and run the stage again."
        )


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:MAX_NAMES_IN_MESSAGE])
    rest = len(names) - MAX_NAMES_IN_MESSAGE
    return f"{shown} and {rest} more" if rest > 0 else shown
