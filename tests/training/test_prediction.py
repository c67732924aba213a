from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.decode import decode_square
from data.loaders import eval_batches
from data.prepare import prepare
from data.prepared import PreparedData
from data.records import DatasetError
from data.splits import Subset
from models.errors import ModelError
from models.export import load_model
from tests.data.conftest import ListSource
from tests.landscapes import PREPARED, landscape
from training.finished_models import find_model, find_run
from training.prediction import Predictor, predict_photos


@pytest.fixture(scope="module")
def class_model(finished_run: Path) -> Path:
    return find_model(str(finished_run), Path("nowhere"), stage="finetune_1")


def test_what_is_predicted_is_what_evaluation_computes(class_model: Path, tmp_path: Path) -> None:
    photos = [tmp_path / f"{number}.png" for number in range(3)]
    for number, path in enumerate(photos):
        landscape(number, *((61, 47), (47, 61), (50, 50))[number]).save(path)
    source = ListSource([path.read_bytes() for path in photos])
    prepare(source, tmp_path / "p", side=PREPARED, report=lambda done, total: None, workers=1)
    split = PreparedData.open(tmp_path / "p").train
    whole = Subset(split, np.arange(len(photos)))
    model = load_model(class_model)
    (batch,) = eval_batches(whole, batch_size=9, side=16, device=torch.device("cpu"))
    with torch.no_grad():
        expected = model(batch.images).logits.softmax(dim=1)
    found = predict_photos(Predictor.load(class_model), photos)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_a_photo_turned_further_lies_turned_further(landscape_model: Path) -> None:
    predictor = Predictor.load(landscape_model)
    # Of noise, about which a network has no opinion that would hide a mistake.
    noise = np.random.default_rng(5).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    square = torch.from_numpy(decode_square(Image.fromarray(noise), 16)).permute(2, 0, 1)
    before = predictor.turns(square[None])[0]
    assert before.max() - before.min() > 0.01, "nothing to compare"
    for k in (1, 2, 3):
        after = predictor.turns(torch.rot90(square, k, dims=(1, 2))[None])[0]
        torch.testing.assert_close(after, before.roll(k), rtol=0, atol=1e-5)


def test_a_photo_that_is_none_is_named(landscape_model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("no picture")
    with pytest.raises(DatasetError, match=r"a\.jpg must be a photo, .*: not an image"):
        predict_photos(Predictor.load(landscape_model), [tmp_path / "a.jpg"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("bilinear", '"resample": 2', '"resample": 3'), "has another resample"),
        (("mean", "0.5", "0.485"), "has another image_mean"),
        (("squashing", '"shortest_edge"', '"height"'), "of another kind"),
    ],
    ids=lambda each: each[0] if isinstance(each, tuple) else "",
)
def test_a_model_of_another_origin_is_refused(
    change: tuple[str, str, str], message: str, landscape_model: Path, tmp_path: Path
) -> None:
    for file in landscape_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "preprocessor_config.json"
    text = path.read_text()
    assert change[1] in text
    path.write_text(text.replace(change[1], change[2]))
    with pytest.raises(ModelError, match=message):
        Predictor.load(tmp_path)


def test_of_a_run_the_model_that_was_best_on_val_is_taken(finished_run: Path) -> None:
    run = find_run(finished_run.name, finished_run.parents[1])
    rows = {name: dict(row) for name, row in run.stages.items()}
    for stage in ("linear_probe", "finetune_1", "finetune_2", "from_scratch"):
        rows[stage] |= {"val_top1": 0.5, "top1": 0.5}
    run.results["stages"].update(rows)
    assert run.choose(None) == "finetune_2", "of equals the last"
    rows["linear_probe"]["val_top1"] = 0.6
    rows["finetune_1"]["top1"] = 0.9  # on test, which chooses nothing
    rows["from_scratch"]["val_top1"] = 0.9  # not pretrained
    assert run.choose(None) == "linear_probe"
    assert run.choose("from-scratch") == "from_scratch"
    assert run.choose(None, "rotations") == "pretrain"


def test_a_model_is_found_by_run_stage_and_directory(finished_run: Path, tmp_path: Path) -> None:
    outputs = finished_run.parents[1]
    wanted = find_model(finished_run.name, outputs, stage="pretrain")
    assert (wanted / "model.safetensors").is_file()
    for place in (str(finished_run), str(wanted), str(wanted.parent)):
        stage = "pretrain" if place == str(finished_run) else None
        assert find_model(place, tmp_path, stage=stage) == wanted
    moved = tmp_path / "moved"
    outputs.rename(moved)
    try:
        found = find_model(finished_run.name, moved, stage="pretrain")
    finally:
        moved.rename(outputs)
    assert found == moved / wanted.relative_to(outputs)


def test_a_model_that_is_not_as_its_stage_made_it_is_refused(finished_run: Path) -> None:
    outputs = finished_run.parents[1]
    model = find_model(finished_run.name, outputs, stage="from_scratch")
    weights = model / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        for place, stage in ((finished_run.name, "from_scratch"), (str(model), None)):
            with pytest.raises(ModelError, match=r"model\.safetensors is missing or damaged"):
                find_model(place, outputs, stage=stage)
    finally:
        weights.write_bytes(whole)
