"""Features that are taken once, against the model that they are taken of."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data.loaders import eval_batches
from data.splits import Subset
from models.export import load_model
from models.resolution import at_image_size
from training import features, stage_files, store
from training.configure import validate
from training.features import Backbone, open_features
from training.images import open_labelled
from training.network import build_model
from training.runner import StageContext, run_stage
from training.settings import Settings, merge
from training.stage_files import OutputsError
from training.stages import STAGES
from training.stopping import StopRequest
from training.store import StageResult

RunStages = Callable[..., dict[str, StageResult]]

CPU = torch.device("cpu")


@pytest.fixture
def results(
    run_stages: RunStages, tiny_settings: Settings, tmp_path: Path
) -> dict[str, StageResult]:
    return run_stages(tiny_settings, tmp_path / "outputs", "features")


@torch.no_grad()
def hidden_states(model: Any, subset: Subset, side: int) -> list[Tensor]:
    """Tokens by layer as transformers itself returns them, and last those after the norm."""
    (batch,) = eval_batches(subset, batch_size=99, side=side, device=CPU)
    found = model.eval().vit(batch.images, output_hidden_states=True)
    return [*found.hidden_states, found.last_hidden_state]


@pytest.mark.parametrize(
    ("backbone", "pretrained_at"), [("pretrained", 16), ("pretrained", 8), ("random", 16)]
)
def test_every_row_is_what_the_model_says(
    run_stages: RunStages,
    tiny_values: dict[str, Any],
    tmp_path: Path,
    backbone: Backbone,
    pretrained_at: int,
) -> None:
    """Also where the backbone was pretrained on smaller images: at the full size it is asked."""
    settings = validate(merge(tiny_values, {"pretrain": {"image_size": pretrained_at}}))
    results = run_stages(settings, tmp_path / "outputs", "features")
    images = open_labelled(results["prepare_data"].directory, settings)
    found = open_features(results["features"].directory, backbone, images)
    if backbone == "pretrained":
        model = at_image_size(load_model(results["pretrain"].directory / "model"), 16)
    else:
        request = store.read_config(results["features"].directory)
        model = build_model(StageContext(request, StopRequest()))
    for part, subset in ((found.train, images.train), (found.test, images.test)):
        *layers, normed = hidden_states(model, subset, settings.model.image_size)
        assert part.layers == len(layers) == 3
        for layer, tokens in enumerate(layers):
            assert torch.allclose(part.mean[layer], tokens[:, 1:].mean(dim=1), atol=1e-5)
            assert torch.allclose(part.cls[layer], tokens[:, 0], atol=1e-5)
        assert torch.allclose(part.final_cls[0], normed[:, 0], atol=1e-5)
        assert subset.labels is not None
        assert part.labels.tolist() == subset.labels.tolist()


def test_another_number_of_labels_reads_other_rows_of_the_same_features(
    results: dict[str, StageResult],
    run_stages: RunStages,
    tiny_values: dict[str, Any],
    tmp_path: Path,
) -> None:
    fewer = validate(merge(tiny_values, {"transfer": {"labels": 12}}))
    again = run_stages(fewer, tmp_path / "outputs", "features")["features"]
    assert (again.status, again.digest) == ("cached", results["features"].digest)
    prepared = results["prepare_data"].directory
    few, all_of_them = (
        open_labelled(prepared, settings)
        for settings in (fewer, validate(merge(tiny_values, {"transfer": {"labels": None}})))
    )
    chosen = open_features(again.directory, "pretrained", few).train
    everything = open_features(again.directory, "pretrained", all_of_them).train
    assert (len(chosen.labels), everything.rows.shape[1]) == (12, len(all_of_them.train))
    places = np.isin(all_of_them.train.indices, few.train.indices)
    assert torch.equal(chosen.rows, everything.rows[:, torch.from_numpy(places)])


def test_a_stop_is_followed_between_batches_and_leaves_no_result(
    results: dict[str, StageResult],
    tiny_settings: Settings,
    tmp_path: Path,
    stop_after: type[StopRequest],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(features, "_BATCH_SIZE", 4)
    outputs = tmp_path / "outputs"
    (results["features"].directory / "result.json").unlink()
    request = store.make_request(STAGES["features"], tiny_settings, outputs, results)
    with pytest.raises(InterruptedError):
        run_stage(request, features.compute, stop_after(3))  # type: ignore[call-arg]
    assert store.inspect(request).state == "missing"
    monkeypatch.undo()
    assert run_stage(request, features.compute).digest == results["features"].digest


def test_a_large_file_is_hashed_only_where_its_time_stamp_is_another(
    results: dict[str, StageResult],
    tiny_settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stage_files, "LARGE_BYTES", 1000)
    (results["features"].directory / "result.json").unlink()
    request = store.make_request(STAGES["features"], tiny_settings, tmp_path / "outputs", results)
    run_stage(request, features.compute)
    path = request.directory / "features" / "pretrained-test.npy"
    stamp = path.stat().st_mtime_ns
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    os.utime(path, ns=(stamp, stamp))
    assert store.inspect(request).state == "cached", "size and time stamp are what they were"
    os.utime(path, ns=(stamp, stamp + 1))
    assert "pretrained-test.npy is damaged" in store.inspect(request).why


def test_a_disk_that_is_too_small_is_an_error_before_any_pass(
    results: dict[str, StageResult],
    tiny_settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_space(descriptor: int, start: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (results["features"].directory / "result.json").unlink()
    request = store.make_request(STAGES["features"], tiny_settings, tmp_path / "outputs", results)
    monkeypatch.setattr(os, "posix_fallocate", no_space)
    with pytest.raises(OutputsError, match="is full"):
        run_stage(request, features.compute)
