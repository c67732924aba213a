"""predict, upright, export and publish as a user types them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sklearn
import torch

from data.decode import decode_square
from data.transforms import normalise
from flows.cli import main
from models.export import label_names, load_model
from tests.landscapes import landscape
from training.finished_models import find_model

Capture = pytest.CaptureFixture[str]

PHOTO = Path(sklearn.__file__).parent / "datasets" / "images" / "china.jpg"
"""A real photo, 640 x 427, that comes with scikit-learn."""


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    landscape(1).save(folder / "up.jpg")
    landscape(2).rotate(90, expand=True).save(folder / "left.jpg")
    return folder


def test_predict_shows_the_most_probable_classes(finished_run: Path, capsys: Capture) -> None:
    assert main(["predict", str(finished_run), str(PHOTO), "--top", "2"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["image", "class", "probability"]
    shares = [float(row.split()[-1]) for row in rows if row.split()[-1].startswith("0.")]
    assert len(shares) == 2
    assert shares == sorted(shares, reverse=True)


def test_predict_prints_json_with_every_class(finished_run: Path, capsys: Capture) -> None:
    words = ["predict", finished_run.name, str(PHOTO), str(PHOTO), "--json"]
    assert main([*words, "--outputs", str(finished_run.parents[1]), "--stage", "finetune-1"]) == 0
    found = json.loads(capsys.readouterr().out)
    directory = find_model(str(finished_run), Path(), stage="finetune_1")
    assert found["model"] == str(directory)
    assert found["tells"] == "classes"
    one, other = found["images"]
    assert one == other
    shares = {row["label"]: row["probability"] for row in one["probabilities"]}
    square = torch.from_numpy(decode_square(PHOTO, 20)).permute(2, 0, 1)[None, :, 2:-2, 2:-2]
    with torch.no_grad():
        expected = load_model(directory)(normalise(square)).logits[0].softmax(0).tolist()
    assert [shares[name] for name in ("car", "house", "tree")] == pytest.approx(expected, abs=1e-5)


def test_predict_says_in_words_which_way_up_a_photo_is(
    landscape_model: Path, photos: Path, capsys: Capture
) -> None:
    words = ["predict", str(landscape_model)]
    assert main([*words, str(photos / "left.jpg"), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["images"]
    assert found["turned_degrees"] == 90
    said = "turned 90° counter-clockwise; turn it 90° clockwise to be upright"
    assert found["in_words"] == said
    assert found["probabilities"][0]["label"] == "90"
    assert main([*words, str(photos / "up.jpg")]) == 0
    assert "upright" in capsys.readouterr().out


def test_upright_lists_what_it_did(landscape_model: Path, photos: Path, capsys: Capture) -> None:
    (photos / "broken.jpg").write_bytes(b"no picture")
    words = ["upright", str(landscape_model), str(photos)]
    assert main([*words, "--out", str(photos.parent / "out")]) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[-1] == "1 turned, 1 upright, 1 skipped."
    assert "skipped: not an image" in " ".join(said.split())
    assert {path.name for path in (photos.parent / "out").iterdir()} == {"up.jpg", "left.jpg"}
    assert main([*words, "--in-place", "--json"]) == 0
    found = {row["image"]: row for row in json.loads(capsys.readouterr().out)["photos"]}
    assert found["left.jpg"]["outcome"] == "turned"
    assert found["up.jpg"]["outcome"] == "upright"


def test_export_writes_the_model_as_it_is(
    finished_run: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "new" / "model"
    assert main(["export", str(finished_run), "--stage", "pretrain", "--out", str(out)]) == 0
    assert "all weights fit" in capsys.readouterr().out
    source = find_model(str(finished_run), Path(), stage="pretrain")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        path.name: path.read_bytes() for path in source.iterdir()
    }


@pytest.mark.slow
def test_export_writes_onnx(landscape_model: Path, tmp_path: Path, capsys: Capture) -> None:
    pytest.importorskip("onnxruntime")
    words = ["export", str(landscape_model), "--format", "onnx", "--out", str(tmp_path / "onnx")]
    assert main(words) == 0
    assert "ONNX Runtime gives the same probabilities" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "onnx").iterdir()}
    assert names == {"model.onnx", "config.json", "preprocessor_config.json"}
    assert json.loads((tmp_path / "onnx" / "config.json").read_text())["id2label"]["1"] == "90"


def test_publish_can_be_looked_at_without_a_network(finished_run: Path, capsys: Capture) -> None:
    words = ["publish", str(finished_run), "--repo", "me/mine", "--stage", "finetune-2"]
    assert main([*words, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("---\nlibrary_name: transformers\n")
    weights = find_model(str(finished_run), Path(), stage="finetune_2") / "model.safetensors"
    assert f"{weights.stat().st_size:,} bytes  model.safetensors" in said
    assert main(words) == 2
    assert capsys.readouterr().err.startswith("Publishing needs a token of the Hub")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("predict {empty} {photo}", "must be a model directory, a stage that has one, or a run"),
        ("predict {other} {photo}", "must be a model that this project wrote"),
        ("predict {model} {notes}", "notes.jpg must be a photo, but it cannot be decoded"),
        ("predict {model} {empty}/none.jpg", "none.jpg must be a photo"),
        ("predict {model} {photo} --stage pretrain", "--stage chooses among the models of a run"),
        ("predict {run} {photo} --stage pretrian", "A stage must be one of download, "),
        ("predict {model}", "Missing argument 'IMAGE...'"),
        ("upright {model} {empty} --out {new}", "must hold images, found none"),
        ("upright {model} {new} --out {new}", "must be a folder of photos, and there is none"),
        ("upright {model} {photos} --out {taken}", "exists already and is left as it is"),
        ("upright {model} {photos}", "Give either --out FOLDER or --in-place, and not both."),
        ("upright {model} {photos} --out {new} --in-place", "and not both"),
        ("upright {run} {photos} --out {new} --stage finetune-1", "is told by a model of pretrain"),
        ("export {model} --out {taken}", "exists already and is left as it is"),
        ("export {model} --out {notes}", "exists already and is left as it is"),
        ("export {model} --out {new} --format onx", "--format must be transformers or onnx, got"),
        ("publish {empty} --repo a/b", "must be a model directory, a stage that has one, or a run"),
        ("publish {run} --repo a", "--repo must be owner/name, got 'a'"),
    ],
)
def test_a_mistake_costs_one_line_and_overwrites_nothing(
    arguments: str,
    words: str,
    finished_run: Path,
    landscape_model: Path,
    photos: Path,
    capsys: Capture,
) -> None:
    root = photos.parent
    places = {name: root / name for name in ("empty", "other", "taken", "new")}
    for name in ("empty", "other", "taken"):
        places[name].mkdir()
    (places["taken"] / "up.jpg").write_text("mine")
    (places["other"] / "config.json").write_text('{"model_type": "bert"}')
    notes = root / "notes.jpg"
    notes.write_text("no picture")
    filled = arguments.format(
        **places,
        model=landscape_model,
        run=finished_run,
        photos=photos,
        photo=photos / "up.jpg",
        notes=notes,
    )
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert main(filled.split()) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert words in said.err
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before
    assert not places["new"].exists()


WITHOUT_US = """
import sys
sys.path += {site_packages!r}
from importlib.util import find_spec
ours = [name for name in ("flows", "tasks", "training", "models", "data") if find_spec(name)]
assert not ours, f"this is to run without {{ours}}"
import json
import numpy, torch
from transformers import AutoModelForImageClassification, pipeline
pixels = torch.from_numpy(numpy.load({pixels!r}))
found = {{}}
for directory in {directories!r}:
    model = AutoModelForImageClassification.from_pretrained(directory)
    with torch.no_grad():
        exact = model(pixels).logits.softmax(dim=1).tolist()
    classify = pipeline("image-classification", model=directory, device="cpu")
    found[directory] = exact, classify({photo!r}, top_k=4)
print("found", json.dumps(found))
"""


@pytest.mark.slow
def test_every_model_works_in_transformers_where_this_project_is_not_installed(
    finished_run: Path, tmp_path: Path
) -> None:
    stages = ("pretrain", "linear_probe", "finetune_1", "finetune_2", "from_scratch")
    directories = [str(find_model(str(finished_run), Path(), stage=stage)) for stage in stages]
    square = torch.from_numpy(decode_square(PHOTO, 20)).permute(2, 0, 1)[None, :, 2:-2, 2:-2]
    pixels = normalise(square)
    np.save(tmp_path / "pixels.npy", pixels.numpy())
    code = WITHOUT_US.format(
        # Without `site` (-S) no editable installation is found; packages are.
        site_packages=[path for path in sys.path if path.endswith("-packages")],
        pixels=str(tmp_path / "pixels.npy"),
        directories=directories,
        photo=str(PHOTO),
    )
    ran = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.rpartition("found ")[2])
    for directory in directories:
        exact, from_photo = found[directory]
        model = load_model(Path(directory))
        with torch.no_grad():
            ours = model(pixels).logits[0].softmax(0).tolist()
        assert exact[0] == pytest.approx(ours, abs=1e-5)
        names = label_names(model.config)
        assert from_photo[0]["label"] == names[int(np.argmax(ours))]
        assert len(from_photo) == len(names)
        for row in from_photo:
            assert row["score"] == pytest.approx(ours[names.index(row["label"])], abs=0.02)
