"""Taking a finished model along: its directory as it is, or as ONNX."""

import shutil
from pathlib import Path
from typing import Literal

from models.export import CONFIG_FILE, PROCESSOR_FILE, WEIGHTS_FILE, load_model, read_prepared_size
from training.new_folder import new_folder

ONNX_FILE = "model.onnx"

Format = Literal["transformers", "onnx"]
FORMATS: tuple[Format, ...] = ("transformers", "onnx")


def export_model(directory: Path, out: Path, kind: Format) -> str:
    """Write a model into a new folder, and say how it was checked.

    Both kinds hold `config.json` with the class names and `preprocessor_config.json`.

    Args:
        directory: A `model/` directory.
        out: Folder to make.
        kind: `transformers` for the weights as they are, `onnx` for `model.onnx`.

    Raises:
        ModelError: If the model is damaged or none of this project's, ONNX is not installed, or
            what was written does not say the same as the model.
        OutputsError: If `out` exists or cannot be written.
    """
    read_prepared_size(directory)
    model = load_model(directory)
    if kind == "onnx":
        from models.onnx_export import check_installed, export_onnx  # slow to import

        check_installed()
        with new_folder(out) as folder:
            difference = export_onnx(model, folder / ONNX_FILE)
            _copy(directory, folder, (CONFIG_FILE, PROCESSOR_FILE))
        return f"ONNX Runtime gives the same probabilities, to {difference:.1g}"
    with new_folder(out) as folder:
        _copy(directory, folder, (CONFIG_FILE, WEIGHTS_FILE, PROCESSOR_FILE))
    return "all weights fit; load it with transformers.AutoModelForImageClassification"


def _copy(directory: Path, folder: Path, names: tuple[str, ...]) -> None:
    for name in names:
        shutil.copyfile(directory / name, folder / name)
