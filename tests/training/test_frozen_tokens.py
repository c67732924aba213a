"""Fine-tuning from what the frozen blocks made of the images, on a few drawn ones."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from data.loaders import eval_batches, token_eval_batches
from models.boundary import LastBlocks, tokens_below
from models.export import load_model
from models.vit import eval_mode
from training import finetune, frozen_tokens, stage_files, store, supervised
from training.configure import validate
from training.frozen_tokens import FOLDER, open_tokens
from training.images import LabelledImages, open_labelled
from training.runner import run_stage
from training.settings import Settings, merge
from training.stage_files import KEEP_TOKENS, OutputsError
from training.stages import STAGES, TRAINED_BLOCKS
from training.stopping import Stopped, StopRequest
from training.store import StageRequest, StageResult
from training.wandb_process import Tracking

RunStages = Callable[..., dict[str, StageResult]]

STILL = {"data": {"crop_margin": 0.0}, "finetune": {"flip": False}}
"""Settings under which an image is the same in every epoch."""

TOLERANCE = 0.01
"""Relative, of losses: bfloat16 rounds tokens by up to 0.004, and a step reads many of them."""

BYTES = (30 + 6) * 2 * (5 * 12) * 2
"""Images to train and choose on, boundaries, numbers of an image, bytes of a number."""


class Both(NamedTuple):
    outputs: Path
    settings: Settings
    kept: dict[str, StageResult]
    off: dict[str, StageResult]
    images: LabelledImages


def still(values: dict[str, Any], **changes: Any) -> Settings:
    return validate(merge(merge(values, STILL), changes))


@pytest.fixture(scope="module")
def both(
    run_stages: RunStages, tiny_run: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Both:
    """Both fine-tunings, from tokens and without. Not to be changed."""
    outputs = tmp_path_factory.mktemp("both")
    settings = still(tiny_run)
    found = []
    for chosen in (settings, still(tiny_run, hardware={"frozen_tokens": "never"})):
        results: dict[str, StageResult] = {}
        for stage in TRAINED_BLOCKS:
            results |= run_stages(chosen, outputs, stage)
        found.append(results)
    images = open_labelled(found[0]["prepare_data"].directory, settings)
    return Both(outputs, settings, kept=found[0], off=found[1], images=images)


@pytest.fixture
def request_tokens(both: Both, tmp_path: Path) -> StageRequest:
    """The request of the pass, with nothing done for it yet."""
    return store.make_request(STAGES["frozen_tokens"], both.settings, tmp_path, both.kept)


def values_of(result: StageResult, name: str) -> list[float]:
    lines = (result.directory / "metrics.jsonl").read_text().splitlines()
    return [row[name] for row in map(json.loads, lines) if name in row]


def weights_sha(result: StageResult) -> str:
    return stage_files.sha256_of(result.directory / "model" / "model.safetensors")


@pytest.mark.parametrize("stage", TRAINED_BLOCKS)
def test_fine_tuning_from_tokens_goes_the_way_of_the_whole_network(both: Both, stage: str) -> None:
    with_tokens, without = both.kept[stage], both.off[stage]
    assert with_tokens.key != without.key
    assert set(with_tokens.inputs) == {"start", "data", "tokens"}
    for name, count in (("train/loss", 12), ("val/loss", 3)):
        losses = values_of(with_tokens, name)
        assert len(losses) == count
        assert losses == pytest.approx(values_of(without, name), rel=TOLERANCE)
    assert max(values_of(without, "train/loss")) > (1 + 10 * TOLERANCE) * min(
        values_of(without, "train/loss")
    ), "the losses of a training that stood still would agree, too"


@pytest.mark.parametrize("stage", TRAINED_BLOCKS)
def test_frozen_weights_stay_and_the_whole_network_is_saved(both: Both, stage: str) -> None:
    before = load_model(both.kept["linear_probe"].directory / "model").state_dict()
    after = load_model(both.kept[stage].directory / "model").state_dict()
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    trained = {"vit.layernorm", "classifier"} | {
        f"vit.layers.{number}" for number in range(2 - TRAINED_BLOCKS[stage], 2)
    }
    assert {next(part for part in trained if name.startswith(part)) for name in moved} == trained


def test_chained_fine_tuning_goes_that_way_too(
    both: Both, run_stages: RunStages, tiny_run: dict[str, Any]
) -> None:
    losses = []
    for use in ("auto", "never"):
        settings = still(
            tiny_run, finetune={"start_from": "previous"}, hardware={"frozen_tokens": use}
        )
        results = run_stages(settings, both.outputs, "finetune_2")
        losses.append(values_of(results["finetune_2"], "train/loss"))
        assert (
            results.get("frozen_tokens")
            == both.kept["frozen_tokens"].model_copy(update={"status": "cached"})
        ) == (use == "auto"), "the same tokens"
    assert losses[0] == pytest.approx(losses[1], rel=TOLERANCE)
    assert losses[0] != values_of(both.kept["finetune_2"], "train/loss")


@pytest.mark.parametrize("blocks", [1, 2])
def test_the_network_says_the_same_from_tokens_as_from_images(both: Both, blocks: int) -> None:
    """Rounding tokens once changes less than training in bfloat16, which rounds every product."""
    model = load_model(both.kept["linear_probe"].directory / "model")
    tokens = open_tokens(both.kept["frozen_tokens"].directory, both.images, blocks)
    assert tokens is not None
    upper, cpu = LastBlocks(model, blocks), torch.device("cpu")
    for kept, subset in ((tokens.train, both.images.train), (tokens.val, both.images.val)):
        (of_tokens,) = token_eval_batches(kept, 99, cpu)
        (of_images,) = eval_batches(subset, 99, 16, cpu)
        (exact,) = tokens_below(model, of_images.images, [blocks])
        assert torch.equal(of_tokens.images, exact.bfloat16().float())
        with torch.no_grad(), eval_mode(model):
            found, whole = upper(of_tokens.images).logits, model(of_images.images).logits
            with torch.autocast("cpu", torch.bfloat16):
                trained_so = model(of_images.images).logits.float()
        assert 0 < (found - whole).abs().mean() < (trained_so - whole).abs().mean()


def test_a_backbone_of_smaller_images_gives_tokens_of_the_full_size(
    run_stages: RunStages, tiny_run: dict[str, Any], tmp_path: Path
) -> None:
    settings = still(tiny_run, pretrain={"image_size": 8})
    results = run_stages(settings, tmp_path, "finetune_1")
    images = open_labelled(results["prepare_data"].directory, settings)
    tokens = open_tokens(results["frozen_tokens"].directory, images, 1)
    assert tokens is not None
    (found,) = token_eval_batches(tokens.val, 99, torch.device("cpu"))
    (batch,) = eval_batches(images.val, 99, 16, torch.device("cpu"))
    probed = load_model(results["linear_probe"].directory / "model")
    (exact,) = tokens_below(probed, batch.images, [1])
    assert torch.equal(found.images, exact.bfloat16().float())


def test_branches_are_left_out_from_tokens_as_in_the_whole_network(
    both: Both, run_stages: RunStages, tiny_run: dict[str, Any]
) -> None:
    """Below the boundary nothing is left out, so both draw the same numbers."""
    losses = []
    for use in ("auto", "never"):
        settings = still(tiny_run, finetune={"drop_path": 0.5}, hardware={"frozen_tokens": use})
        result = run_stages(settings, both.outputs, "finetune_1")["finetune_1"]
        losses.append(values_of(result, "train/loss"))
    assert losses[0] == pytest.approx(losses[1], rel=TOLERANCE)
    assert losses[0] != pytest.approx(
        values_of(both.kept["finetune_1"], "train/loss"), rel=TOLERANCE
    )


def test_no_image_is_read_to_train_or_to_choose_and_the_score_is_that_of_the_saved_model(
    both: Both, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []

    def only_test(subset: Any, *arguments: Any) -> Any:
        read.append(subset)
        return eval_batches(subset, *arguments)

    monkeypatch.setattr(supervised, "Batches", None)
    monkeypatch.setattr(supervised, "eval_batches", only_test)
    request = store.make_request(STAGES["finetune_1"], both.settings, tmp_path, both.kept)
    result = run_stage(request, finetune.compute)
    assert [len(subset) for subset in read] == [21]
    (batch,) = eval_batches(both.images.test, 99, 16, torch.device("cpu"))
    model = load_model(result.directory / "model")
    with torch.no_grad(), eval_mode(model):
        logits = model(batch.images).logits
    assert int((logits.argmax(dim=1) == batch.labels).sum()) == result.scores["correct"]
    assert weights_sha(result) == weights_sha(both.kept["finetune_1"])


def test_what_is_kept_is_what_was_foretold(both: Both) -> None:
    result = both.kept["frozen_tokens"]
    assert result.scores == {"kept": True, "images": 36, "bytes": BYTES}
    assert set(result.files) == {
        f"{FOLDER}/{split}-below-last-{blocks}.npy"
        for split in ("train", "val")
        for blocks in (1, 2)
    }
    header = 128
    assert sum(file.size - header for file in result.files.values()) == BYTES


@pytest.mark.parametrize(
    ("most", "free", "kept"),
    [
        (BYTES, 10 * BYTES, True),
        (BYTES - 1, 10 * BYTES, False),
        (10 * BYTES, 2 * BYTES, True),
        (10 * BYTES, 2 * BYTES - 1, False),
    ],
)
def test_the_size_decides_once_per_key(
    both: Both,
    request_tokens: StageRequest,
    monkeypatch: pytest.MonkeyPatch,
    most: int,
    free: int,
    kept: bool,
) -> None:
    set_sizes(monkeypatch, most=most, free=free)
    first = run_stage(request_tokens, frozen_tokens.compute)
    assert first.scores == {"kept": kept, "images": 36, "bytes": BYTES}
    assert (request_tokens.directory / FOLDER).is_dir() == kept
    assert (open_tokens(request_tokens.directory, both.images, 1) is not None) == kept

    # Interrupted, and gone on with where the rule would decide the opposite.
    set_sizes(monkeypatch, most=0 if kept else 10 * BYTES, free=10 * BYTES)
    (request_tokens.directory / "result.json").unlink()
    again = run_stage(request_tokens, frozen_tokens.compute)
    assert (again.status, again.digest) == ("computed", first.digest)


def set_sizes(monkeypatch: pytest.MonkeyPatch, *, most: int, free: int) -> None:
    monkeypatch.setattr(frozen_tokens, "MOST_BYTES", most)
    usage = shutil.disk_usage("/")._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)


def test_tokens_too_large_to_keep_leave_fine_tuning_as_it_is_without(
    both: Both, request_tokens: StageRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_sizes(monkeypatch, most=0, free=10 * BYTES)
    results = {**both.kept, "frozen_tokens": run_stage(request_tokens, frozen_tokens.compute)}
    request = store.make_request(STAGES["finetune_2"], both.settings, tmp_path, results)
    assert request.key == both.kept["finetune_2"].key
    assert weights_sha(run_stage(request, finetune.compute)) == weights_sha(both.off["finetune_2"])


def test_always_keeps_them_whatever_their_size_and_says_where_the_disk_is_too_small(
    both: Both, tmp_path: Path, tiny_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = still(tiny_run, hardware={"frozen_tokens": "always"})
    request = store.make_request(STAGES["frozen_tokens"], settings, tmp_path, both.kept)
    set_sizes(monkeypatch, most=0, free=BYTES - 1)
    with pytest.raises(OutputsError, match=r"needs 0\.0 GiB.*hardware\.frozen_tokens=never"):
        run_stage(request, frozen_tokens.compute)
    set_sizes(monkeypatch, most=0, free=BYTES)
    assert run_stage(request, frozen_tokens.compute).digest == both.kept["frozen_tokens"].digest


def test_a_stored_decision_that_cannot_be_read_is_an_error(request_tokens: StageRequest) -> None:
    request_tokens.directory.mkdir(parents=True)
    (request_tokens.directory / KEEP_TOKENS).write_text("[]")
    with pytest.raises(OutputsError, match="it is damaged"):
        run_stage(request_tokens, frozen_tokens.compute)


def test_an_interrupted_pass_begins_anew_and_makes_the_same_bytes(
    both: Both,
    request_tokens: StageRequest,
    stop_after: Callable[[int], StopRequest],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(frozen_tokens, "_BATCH_SIZE", 7)
    with pytest.raises(InterruptedError, match="Stopped after 14 of 36 images"):
        run_stage(request_tokens, frozen_tokens.compute, stop_after(1))
    assert any((request_tokens.directory / FOLDER).iterdir())
    monkeypatch.undo()
    result = run_stage(request_tokens, frozen_tokens.compute)
    assert result.files == both.kept["frozen_tokens"].files
    assert result.digest == both.kept["frozen_tokens"].digest


def test_a_damaged_file_is_computed_again_and_what_was_built_on_it_stands(
    both: Both,
    run_stages: RunStages,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_sizes(monkeypatch, most=0, free=10 * BYTES)  # the decision stands, too
    path = both.kept["frozen_tokens"].directory / FOLDER / "train-below-last-1.npy"
    sound = path.read_bytes()
    path.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    results = run_stages(both.settings, both.outputs, "finetune_1")
    assert {name for name, found in results.items() if found.status != "cached"} == {
        "frozen_tokens"
    }
    assert (
        "frozen_tokens is computed again: tokens/train-below-last-1.npy is damaged" in caplog.text
    )
    assert path.read_bytes() == sound


@pytest.mark.slow
def test_a_stopped_fine_tuning_from_tokens_resumes_to_the_same_bytes(
    both: Both, tmp_path: Path
) -> None:
    class StopOnce(StopRequest):
        def __bool__(self) -> bool:
            self.asked = getattr(self, "asked", 0) + 1
            return self.asked > 7

    request = store.make_request(STAGES["finetune_2"], both.settings, tmp_path, both.kept)
    with pytest.raises((Stopped, InterruptedError)):
        run_stage(request, finetune.compute, StopOnce())
    result = run_stage(request, finetune.compute)
    assert result.status == "resumed"
    whole = both.kept["finetune_2"]
    assert result.scores == whole.scores
    assert weights_sha(result) == weights_sha(whole)
    # The best epoch may have come before the stop; the losses after it tell.
    for name in ("train/loss", "val/loss"):
        assert values_of(result, name) == values_of(whole, name)


def test_both_fine_tunings_and_all_of_theirs_share_the_tokens(
    both: Both, tiny_run: dict[str, Any]
) -> None:
    def key(**changes: Any) -> str:
        settings = still(tiny_run, **changes)
        results = both.kept
        return store.make_request(STAGES["frozen_tokens"], settings, both.outputs, results).key

    for same in (
        {"finetune": {"base_lr": 0.5, "epochs": 7, "start_from": "previous"}},
        {"seed": 5},  # of the same backbone
        {"hardware": {"compile": True, "threads": 2}},
        {"from_scratch": {"epochs": 7}},
    ):
        assert key(**same) == both.kept["frozen_tokens"].key, same
    others = [
        key(hardware={"precision": "bfloat16"}),
        key(hardware={"frozen_tokens": "always"}),
        key(transfer={"labels": 29}),
        key(data={"val_fraction": 0.2}),
    ]
    assert len({both.kept["frozen_tokens"].key, *others}) == 5


def test_a_network_of_one_block_has_one_boundary(
    run_stages: RunStages, tiny_run: dict[str, Any], tmp_path: Path
) -> None:
    settings = still(tiny_run, model={"depth": 1})
    results = run_stages(settings, tmp_path, "finetune_1")
    assert {Path(name).stem for name in results["frozen_tokens"].files} == {
        "train-below-last-1",
        "val-below-last-1",
    }


def test_the_pass_is_no_run_in_wandb(request_tokens: StageRequest) -> None:
    with Tracking(request_tokens, "offline") as tracking:
        assert tracking._process is None
