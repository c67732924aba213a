"""Commands for what a run made: predict, upright, export, publish. Imports nothing heavy either."""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.options import outputs_folder

if TYPE_CHECKING:
    from torch import Tensor

    from training.prediction import Predictor
    from training.upright import Photo

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A model/ directory, a stage's directory, or a run: its directory or name.",
        show_default=False,
    ),
]
StageOption = Annotated[
    str | None,
    typer.Option("--stage", metavar="STAGE", help="Whose model of a run."),
]


OutputsOption = Annotated[
    Path,
    typer.Option(
        "--outputs",
        metavar="DIR",
        parser=outputs_folder,
        help="Where the runs are, for a run's name: a folder, or an address.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def add_to(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    for command in (predict, upright, export, publish):
        app.command()(command)


def predict(
    model: ModelArgument,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", show_default=False)],
    top: Annotated[
        int, typer.Option("--top", metavar="K", min=1, help="Most probable classes to show.")
    ] = 5,
    as_json: JsonOption = False,
    stage: StageOption = None,
    outputs: OutputsOption = Path("outputs"),
) -> None:
    """Say what photos show, or which way up they are.

    The photos are decoded, cropped and shrunk as in evaluation. Of a run the model that was best
    on val is taken (linear-probe or one of finetune-*); --stage pretrain asks which way up.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # see training/hardware.py
    from training.finished_models import find_model
    from training.prediction import Predictor, predict_photos

    directory = find_model(model, outputs, stage=stage)
    predictor = Predictor.load(directory)
    found = predict_photos(predictor, images)
    if as_json:
        _print_json(
            {
                "model": str(directory),
                "tells": "rotations" if predictor.tells_rotations else "classes",
                "images": [
                    _prediction(predictor, path, row)
                    for path, row in zip(images, found, strict=True)
                ],
            }
        )
        return
    from flows import display

    if predictor.tells_rotations:
        table = display.turns_table(images, found.tolist())
    else:
        table = display.classes_table(images, found.tolist(), predictor.label_names, top)
    _print(table)


def upright(
    model: ModelArgument,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", show_default=False)],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FOLDER", help="New folder for the photos.")
    ] = None,
    in_place: Annotated[
        bool, typer.Option("--in-place", help="Turn the files themselves, instead of --out.")
    ] = False,
    min_confidence: Annotated[
        float,
        typer.Option(
            "--min-confidence",
            metavar="P",
            min=0,
            max=1,
            help="Photos less sure than this are listed and not written.",
        ),
    ] = 0.9,
    reencode: Annotated[
        bool,
        typer.Option(
            "--reencode",
            help="Encode anew what cannot be turned without loss; metadata are lost.",
        ),
    ] = False,
    as_json: JsonOption = False,
    stage: StageOption = None,
    outputs: OutputsOption = Path("outputs"),
) -> None:
    """Turn the photos of a folder the right way up.

    JPEG is turned by its EXIF orientation, the picture's data stay as they are; PNG by moving its
    pixels. Other formats are listed and not written, unless --reencode is given. Photos that are
    upright are copied. Of a run the model of pretrain is taken.
    """
    from training.settings import ConfigError

    if (out is None) != in_place:
        raise ConfigError("Give either --out FOLDER or --in-place, and not both.")
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    from training.finished_models import find_model
    from training.prediction import Predictor
    from training.upright import turn_upright

    directory = find_model(model, outputs, stage=stage, kind="rotations")
    predictor = Predictor.load(directory)
    from flows import display

    with display.bar("photos") as report:
        photos = turn_upright(
            predictor,
            folder,
            out,
            min_confidence=min_confidence,
            reencode=reencode,
            report=report,
        )
    if as_json:
        _print_json({"model": str(directory), "photos": [_photo(photo) for photo in photos]})
        return
    changed = [photo for photo in photos if photo.outcome != "upright"]
    if changed:
        _print(display.photos_table(changed))
    outcomes = [photo.outcome for photo in photos]
    counts = [f"{outcomes.count(each):,} {each}" for each in ("turned", "upright", "skipped")]
    typer.echo(f"{', '.join(counts)}.")


def export(
    model: ModelArgument,
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="New folder to write.")],
    kind: Annotated[
        str, typer.Option("--format", metavar="FORMAT", help="transformers or onnx.")
    ] = "transformers",
    stage: StageOption = None,
    outputs: OutputsOption = Path("outputs"),
) -> None:
    """Write a model for use elsewhere.

    Of a run the model that was best on val is taken (linear-probe or one of finetune-*).
    """
    from training.finished_models import find_model
    from training.settings import ConfigError

    directory = find_model(model, outputs, stage=stage)
    from training.exporting import FORMATS, export_model

    chosen = next((each for each in FORMATS if each == kind), None)
    if chosen is None:
        raise ConfigError(f"--format must be {' or '.join(FORMATS)}, got {kind!r}.")
    typer.echo(f"{out}: {export_model(directory, out, chosen)}.")


def publish(
    run: Annotated[
        str,
        typer.Argument(metavar="RUN", help="A run's directory or name.", show_default=False),
    ],
    repo: Annotated[
        str, typer.Option("--repo", metavar="OWNER/NAME", help="Where to, on the Hub.")
    ],
    stage: StageOption = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository private.")
    ] = False,
    update: Annotated[
        bool, typer.Option("--update", help="Publish over what the repository has.")
    ] = False,
    data_licence: Annotated[
        str | None,
        typer.Option("--data-licence", metavar="TEXT", help="Of the images, for the card."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show card and files; use no network.")
    ] = False,
    outputs: OutputsOption = Path("outputs"),
) -> None:
    """Publish a model on the Hugging Face Hub, with card and results.

    The model that was best on val is taken (linear-probe or one of finetune-*), or that of
    pretrain where there is no other; --stage chooses. It is one commit, so all arrives or nothing.
    """
    from training.finished_models import find_run
    from training.publishing import assemble
    from training.publishing import publish as push

    publication = assemble(find_run(run, outputs), repo, stage=stage, data_licence=data_licence)
    if not dry_run:
        if not sys.stderr.isatty():  # a bar would fill a log
            from huggingface_hub.utils.tqdm import disable_progress_bars

            disable_progress_bars()
        typer.echo(push(publication, private=private, update=update))
        return
    typer.echo(publication.card)
    for name, size in publication.sizes().items():
        typer.echo(f"{size:>13,} bytes  {name}")


def _prediction(predictor: "Predictor", path: Path, row: "Tensor") -> dict[str, Any]:
    from training.wording import turn_in_words

    found: dict[str, Any] = {
        "image": str(path),
        "probabilities": [
            {"label": predictor.label_names[label], "probability": float(row[label])}
            for label in row.argsort(descending=True).tolist()
        ],
    }
    if predictor.tells_rotations:
        turned = 90 * int(row.argmax())
        found |= {"turned_degrees": turned, "in_words": turn_in_words(turned)}
    return found


def _photo(photo: "Photo") -> dict[str, Any]:
    return {
        "image": photo.name,
        "outcome": photo.outcome,
        "turned_degrees": photo.turned,
        "probability": photo.probability,
        "reason": photo.reason,
    }


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))


def _print(table: Any) -> None:
    from rich.console import Console

    Console().print(table)
