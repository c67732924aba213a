"""The training loop on a few drawn images: exact resumes, bad steps, memory, foreign states."""

import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from data import rotation
from data.loaders import Batch, Batches
from data.randomness import derive_seed
from data.splits import Subset
from training import checkpoint, evaluation, finetune, loop, pretrain, stage_files, store
from training.checkpoint import Snapshot
from training.checkpoint_writer import CheckpointWriter
from training.configure import override, validate
from training.errors import CheckpointError, DivergedError, OutOfMemoryError
from training.resumes import read_resumes
from training.runner import run_stage
from training.settings import ConfigError, Settings, merge
from training.stage_files import CHECKPOINTS
from training.stages import STAGES
from training.stopping import Stopped, StopRequest
from training.store import StageRequest, StageResult

RunStages = Callable[..., dict[str, StageResult]]
RequestOf = Callable[..., StageRequest]
StopAfter = Callable[[int], StopRequest]


@pytest.fixture
def request_of(run_stages: RunStages, tiny_values: dict[str, Any], tmp_path: Path) -> RequestOf:
    """The request of a pretraining (6 steps an epoch, 18 in all), with changed settings."""

    def build(changes: dict[str, Any] | None = None, outputs: str = "outputs") -> StageRequest:
        settings: Settings = validate(merge(tiny_values, changes or {}))
        results = run_stages(settings, tmp_path / outputs, "prepare_data")
        return store.make_request(STAGES["pretrain"], settings, tmp_path / outputs, results)

    return build


def run_with_stops(
    request: StageRequest, stop_after: StopAfter, every: int
) -> tuple[StageResult, int]:
    """Run a pretraining that is stopped again and again; also say how often."""
    stops = 0
    while True:
        try:
            return run_stage(request, pretrain.compute, stop_after(every)), stops
        except (Stopped, InterruptedError):
            stops += 1


def weights_sha256(request: StageRequest) -> str:
    return stage_files.sha256_of(request.directory / "model" / "model.safetensors")


def metrics(request: StageRequest) -> str:
    return (request.directory / "metrics.jsonl").read_text()


def checkpoint_bytes(request: StageRequest) -> dict[str, str]:
    root = request.directory / CHECKPOINTS
    return {
        path.relative_to(root).as_posix(): stage_files.sha256_of(path)
        for path in root.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("precision", "compiled"),
    [
        ("float32", False),
        pytest.param("bfloat16", False, marks=pytest.mark.slow),
        pytest.param("float32", True, marks=pytest.mark.slow),
        pytest.param("bfloat16", True, marks=pytest.mark.slow),
    ],
)
def test_stopped_and_resumed_ends_in_the_same_bytes(
    stop_after: StopAfter, request_of: RequestOf, precision: str, compiled: bool
) -> None:
    """With dropout, which draws random numbers in every step."""
    changes = {
        "hardware": {"precision": precision, "compile": compiled},
        "pretrain": {"accumulation_steps": 3},
    }
    whole, cut = request_of(changes, "whole"), request_of(changes, "cut")
    assert whole.settings.model.dropout > 0
    expected = run_stage(whole, pretrain.compute)
    result, stops = run_with_stops(cut, stop_after, 9)
    assert stops >= 2
    assert weights_sha256(cut) == weights_sha256(whole)
    assert metrics(cut) == metrics(whole)
    assert result.scores == expected.scores
    resumed = [resume["step"] for resume in read_resumes(cut.directory)]
    assert resumed == sorted(set(resumed))
    assert 2 <= len(resumed) <= stops
    assert read_resumes(whole.directory) == []


def test_the_precision_is_not_without_effect(request_of: RequestOf) -> None:
    """Or the test above would compare a thing with itself."""
    plain = request_of(outputs="plain")
    other = request_of({"hardware": {"precision": "bfloat16"}}, "other")
    run_stage(plain, pretrain.compute)
    run_stage(other, pretrain.compute)
    assert weights_sha256(plain) != weights_sha256(other)


RECIPES: dict[str, dict[str, Any]] = {
    "drop_path": {"drop_path": 0.3},
    "pool": {"pool": "mean"},
    "patches": {"patch_rotation": 1.0},
    "patches and mean": {"patch_rotation": 0.5, "pool": "mean", "rotations": "random"},
    "image_size": {"image_size": 8},
    "patches of larger images": {"image_size": 8, "patch_rotation": 1.0, "patch_gap": 1.0},
    "colours": {"colour_jitter": 0.4, "greyscale": 0.2},
    "colours of resized crops": {"colour_jitter": 0.4, "crop_scale": 0.3},
    "ema": {"ema": 0.9},
    "ema of more than the model": {"ema": 0.9, "pool": "mean"},
}
"""Options of pretraining that have a state, or random numbers, of their own."""


@pytest.mark.parametrize("name", RECIPES)
def test_an_option_of_the_recipe_is_not_without_effect_and_resumes_to_the_same_bytes(
    stop_after: StopAfter, request_of: RequestOf, name: str
) -> None:
    changes = {"pretrain": {**RECIPES[name], "epochs": 2}}
    plain = request_of({"pretrain": {"epochs": 2}}, "plain")
    whole, cut = request_of(changes, "whole"), request_of(changes, "cut")
    run_stage(plain, pretrain.compute)
    expected = run_stage(whole, pretrain.compute)
    assert weights_sha256(plain) != weights_sha256(whole)
    result, stops = run_with_stops(cut, stop_after, 5)
    assert stops >= 2
    assert weights_sha256(cut) == weights_sha256(whole)
    assert metrics(cut) == metrics(whole)
    assert result.scores == expected.scores


@pytest.mark.parametrize(
    ("options", "losses"),
    [
        ({}, 1.0),
        ({"pool": "mean"}, 2.0),
        ({"patch_rotation": 0.5}, 1.5),
        ({"patch_rotation": 0.5, "pool": "mean"}, 2.5),
    ],
)
def test_the_first_loss_is_that_of_guessing_in_each_task(
    request_of: RequestOf, options: dict[str, Any], losses: float
) -> None:
    request = request_of({"pretrain": {**options, "epochs": 1, "warmup_epochs": 0}})
    run_stage(request, pretrain.compute)
    first = json.loads(metrics(request).splitlines()[0])["train/loss"]
    assert first == pytest.approx(losses * math.log(4), rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
def test_all_options_together_resume_to_the_same_bytes(
    stop_after: StopAfter, request_of: RequestOf, compiled: bool
) -> None:
    together: dict[str, Any] = {"epochs": 2, "accumulation_steps": 3, "image_size": 8}
    for options in RECIPES.values():
        together |= options
    changes = {"pretrain": together, "hardware": {"compile": compiled, "precision": "bfloat16"}}
    whole, cut = request_of(changes, "whole"), request_of(changes, "cut")
    run_stage(whole, pretrain.compute)
    _, stops = run_with_stops(cut, stop_after, 7)
    assert stops >= 1
    assert weights_sha256(cut) == weights_sha256(whole)
    assert checkpoint_bytes(cut).keys() >= {"step-00000012-evaluated/average.safetensors"}


class HostWaits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts, by optimiser step, the operations that make the host wait for numbers of a GPU."""

    WAITING = (
        torch.ops.aten._local_scalar_dense.default,  # item(), int(), bool(), `if tensor:`
        torch.ops.aten.nonzero.default,  # also indexing by a mask
        torch.ops.aten.masked_select.default,
        torch.ops.aten.repeat_interleave.Tensor,
        torch.ops.aten.equal.default,
    )

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.step = 1
        self.counts: Counter[int] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in self.WAITING:
            self.counts[self.step] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rotations": "random"},
        {"crop_scale": 0.3},
        {"accumulation_steps": 3},
        {"clip_norm": None},
        *RECIPES.values(),
    ],
)
def test_the_host_waits_for_the_device_only_in_steps_that_are_logged(
    request_of: RequestOf, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """One epoch of six steps, the fourth of which is logged; batches are made in it, too."""
    request = request_of(
        {
            "pretrain": {"epochs": 1, "warmup_epochs": 0, **changes},
            "tracking": {"log_every_steps": 4},
            "hardware": {"data_on_device": True},
        }
    )
    waits = HostWaits()
    train_epoch, take_step = loop._Run._train_epoch, loop._Run._step

    def watched_epoch(run: loop._Run) -> None:
        with waits:
            train_epoch(run)

    def watched_step(run: loop._Run, batch: Batch) -> None:
        take_step(run, batch)
        waits.step += 1

    monkeypatch.setattr(loop._Run, "_train_epoch", watched_epoch)
    monkeypatch.setattr(loop._Run, "_step", watched_step)
    run_stage(request, pretrain.compute)
    assert waits.step == 7
    assert list(waits.counts) == [4]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", [{}, *RECIPES.values()])
@pytest.mark.parametrize("data_on_device", [True, False])
def test_no_step_waits_for_a_gpu_nor_for_a_copy_to_it(
    request_of: RequestOf,
    monkeypatch: pytest.MonkeyPatch,
    data_on_device: bool,
    options: dict[str, Any],
) -> None:
    request = request_of(
        {
            "pretrain": {"crop_scale": 0.3, "rotations": "random", **options},
            "tracking": {"log_every_steps": 1000},
            "hardware": {"device": "cuda", "data_on_device": data_on_device},
        }
    )
    train_epoch = loop._Run._train_epoch

    def strict(run: loop._Run) -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            train_epoch(run)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(loop._Run, "_train_epoch", strict)
    assert run_stage(request, pretrain.compute).status == "computed"


@pytest.mark.parametrize(
    "stage", ["pretrain", pytest.param("from_scratch", marks=pytest.mark.slow)]
)
def test_where_the_images_are_kept_changes_no_byte(
    run_stages: RunStages,
    tiny_settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
) -> None:
    kept: list[bool] = []
    original = Batches.__init__

    def note(self: Batches, subset: Subset, **named: Any) -> None:
        kept.append(named["keep_on_device"])
        original(self, subset, **named)

    monkeypatch.setattr(Batches, "__init__", note)
    sums = []
    for wanted in ("off", "on"):
        settings = override(tiny_settings, [f"hardware.data_on_device={wanted}"])
        results = run_stages(settings, tmp_path / wanted, stage)
        sums.append(results[stage].files)
    assert kept == [False, True]
    assert sums[0] == sums[1]


@pytest.mark.parametrize("crashing", [1, 2, 3, 4])
def test_a_crash_in_an_evaluation_changes_nothing(
    request_of: RequestOf, monkeypatch: pytest.MonkeyPatch, crashing: int
) -> None:
    """1 to 3 are on val at the ends of the epochs, 4 is on test after the last one."""
    whole, cut = request_of(outputs="whole"), request_of(outputs="cut")
    run_stage(whole, pretrain.compute)
    original, calls = evaluation.evaluate, 0

    def crash(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == crashing:
            raise KeyboardInterrupt
        return original(*arguments, **named)

    monkeypatch.setattr(pretrain, "evaluate", crash)
    with pytest.raises(KeyboardInterrupt):
        run_stage(cut, pretrain.compute)
    run_stage(cut, pretrain.compute)
    assert weights_sha256(cut) == weights_sha256(whole)
    assert metrics(cut) == metrics(whole)


def test_a_finished_run_is_left_as_it_is(request_of: RequestOf) -> None:
    request = request_of()
    run_stage(request, pretrain.compute)
    before = {path: path.stat().st_mtime_ns for path in request.directory.rglob("*")}
    assert run_stage(request, pretrain.compute).status == "cached"
    assert {path: path.stat().st_mtime_ns for path in request.directory.rglob("*")} == before


@pytest.mark.parametrize("times", [1, 5, 6, 7])
def test_a_run_of_one_epoch_stopped_at_its_first_or_last_step_can_be_finished(
    stop_after: StopAfter, request_of: RequestOf, times: int
) -> None:
    """6 steps; the sixth is the last, the seventh question comes from the evaluation."""
    changes = {"pretrain": {"epochs": 1, "warmup_epochs": 0}}
    whole, cut = request_of(changes, "whole"), request_of(changes, "cut")
    run_stage(whole, pretrain.compute)
    with pytest.raises(Stopped):
        run_stage(cut, pretrain.compute, stop_after(times - 1))
    result = run_stage(cut, pretrain.compute)
    assert result.timing["samples_per_second"] > 0
    assert weights_sha256(cut) == weights_sha256(whole)
    assert metrics(cut) == metrics(whole)


def test_a_checkpoint_is_made_when_the_time_is_up_and_not_before(
    request_of: RequestOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step takes 10 s, a checkpoint is due every 35 s: after 4, 8, 12 … steps."""
    request = request_of({"checkpoint": {"every_seconds": 35}})
    now = 0.0
    saved: list[tuple[int, bool]] = []
    original = CheckpointWriter.submit
    take_step = rotation.make_rotation_batch

    def step(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal now
        now += 10
        return take_step(images)

    def submit(self: CheckpointWriter, snapshot: Snapshot) -> None:
        saved.append((snapshot.step, snapshot.evaluated))
        original(self, snapshot)

    monkeypatch.setattr(pretrain, "make_rotation_batch", step)
    monkeypatch.setattr("time.monotonic", lambda: now)
    monkeypatch.setattr(CheckpointWriter, "submit", submit)
    run_stage(request, pretrain.compute)
    assert saved == [(4, False), (6, True), (10, False), (12, True), (16, False), (18, True)]


def test_a_due_checkpoint_at_the_end_of_an_epoch_does_not_wait_for_the_evaluation(
    request_of: RequestOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_of({"checkpoint": {"every_steps": 6}})

    def killed(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrain, "evaluate", killed)
    with pytest.raises(KeyboardInterrupt):
        run_stage(request, pretrain.compute)
    assert stage_files.newest_step(request.directory) == 6


def test_a_run_cut_off_after_its_last_step_only_finishes(request_of: RequestOf) -> None:
    whole, cut = request_of(outputs="whole"), request_of(outputs="cut")
    run_stage(whole, pretrain.compute)
    run_stage(cut, pretrain.compute)
    (cut.directory / "result.json").unlink()
    result = run_stage(cut, pretrain.compute)
    assert result.status == "resumed"
    assert weights_sha256(cut) == weights_sha256(whole)


@pytest.fixture
def nan_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[Iterator[int] | range | set[int]], None]:
    """Make the losses of some steps (from 0) nan, whoever computes them and how often."""

    def arrange(steps: Any) -> None:
        seeds = {derive_seed(0, "dropout", step) for step in steps}
        original = torch.nn.functional.cross_entropy

        class Functional:
            @staticmethod
            def cross_entropy(*arguments: Any, **named: Any) -> torch.Tensor:
                # The loop seeds each step by its number.
                factor = math.nan if torch.initial_seed() in seeds else 1.0
                return original(*arguments, **named) * factor

        monkeypatch.setattr(pretrain, "functional", Functional)

    return arrange


def test_a_few_bad_steps_are_skipped_counted_and_resumed_over(
    stop_after: StopAfter,
    request_of: RequestOf,
    nan_at: Callable[[Any], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    nan_at({4, 5, 9})  # 5 is the last one of its epoch: no checkpoint is made there
    whole, cut = request_of(outputs="whole"), request_of(outputs="cut")
    result = run_stage(whole, pretrain.compute)
    assert result.scores["skipped_steps"] == 3
    assert "2 steps skipped until step 6" in caplog.text
    again, stops = run_with_stops(cut, stop_after, 7)
    assert stops >= 2
    assert again.scores == result.scores
    assert weights_sha256(cut) == weights_sha256(whole)
    rows = [json.loads(line) for line in metrics(whole).splitlines()]
    assert metrics(cut) == metrics(whole)
    losses = {row["step"]: row["train/loss"] for row in rows if "train/lr" in row}
    assert [step for step, loss in losses.items() if loss is None] == [5, 6, 10]
    assert next(row for row in rows if row["step"] == 11)["train/skipped_steps"] == 3


def test_many_in_a_row_end_the_run_and_leave_the_last_good_checkpoint(
    request_of: RequestOf, nan_at: Callable[[Any], None]
) -> None:
    nan_at(range(8, 18))
    request = request_of({"checkpoint": {"max_skipped_steps": 3, "every_steps": 1}})
    for _ in range(2):  # typed again, it ends in the same way
        with pytest.raises(DivergedError, match=r"at step 11 of pretrain.*pretrain\.base_lr"):
            run_stage(request, pretrain.compute)
        assert store.inspect(request).step == 8
        root = request.directory / CHECKPOINTS
        manifest = json.loads((root / "step-00000008" / "manifest.json").read_bytes())
        loaded = checkpoint.load_newest(root, identity=manifest["identity"])
        assert loaded is not None
        assert all(bool(t.isfinite().all()) for t in loaded.tensors["model"].values())


def test_a_step_in_parts_is_the_same_step(request_of: RequestOf) -> None:
    """Witness: the same batch in one part. Float32 sums differ in their last bits."""
    changes = {"model": {"dropout": 0.0}}
    parts = merge(changes, {"pretrain": {"accumulation_steps": 9}})
    one, nine = request_of(changes, "one"), request_of(parts, "nine")
    run_stage(one, pretrain.compute)
    run_stage(nine, pretrain.compute)
    losses = [
        [row["train/loss"] for row in map(json.loads, metrics(r).splitlines()) if "train/lr" in row]
        for r in (one, nine)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][0] != losses[0][1]


def test_parts_that_would_differ_are_refused(tiny_values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"pretrain\.accumulation_steps must divide batch_size"):
        validate(merge(tiny_values, {"pretrain": {"accumulation_steps": 2}}))


def test_a_step_too_large_for_memory_names_the_settings_that_help(
    request_of: RequestOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.empty(2**50), images  # a petabyte: refused by the allocator

    monkeypatch.setattr(pretrain, "make_rotation_batch", too_large)
    with pytest.raises(OutOfMemoryError, match="one of 9 images in 1 part") as error:
        run_stage(request_of(), pretrain.compute)
    offered = re.search(r"(pretrain\.accumulation_steps)=(\d+)", str(error.value))
    assert offered is not None
    assert offered[2] == "3"
    override(request_of().settings, [offered[0]])  # the offer can be taken
    assert "pretrain.batch_size" in str(error.value)
    with pytest.raises(OutOfMemoryError) as error:
        run_stage(request_of({"pretrain": {"accumulation_steps": 9}}), pretrain.compute)
    assert "Set" not in str(error.value), "there are no smaller parts"


def test_memory_that_an_evaluation_lacks_is_explained_too(
    request_of: RequestOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrain, "evaluate", lambda *_, **__: torch.empty(2**50))
    with pytest.raises(OutOfMemoryError, match=r"pretrain\.batch_size"):
        run_stage(request_of(), pretrain.compute)


def test_an_error_that_is_not_about_memory_stays_what_it_is(
    request_of: RequestOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong_shape(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return images[:, :2], torch.zeros(len(images), dtype=torch.int64)

    monkeypatch.setattr(pretrain, "make_rotation_batch", wrong_shape)
    with pytest.raises(Exception, match="channel"):
        run_stage(request_of(), pretrain.compute)


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"pretrain": {"base_lr": 0.5}}, "pretrain.base_lr is 0.002 there and 0.5 here"),
        ({"model": {"depth": 3}}, "model.depth is 2 there and 3 here"),
        ({"data": {"crop_margin": 0.5}}, "digest of data is '"),
    ],
)
def test_a_checkpoint_copied_from_another_run_is_refused_with_the_difference(
    stop_after: StopAfter, request_of: RequestOf, changes: dict[str, Any], difference: str
) -> None:
    ours, theirs = request_of(changes), request_of()
    with pytest.raises(Stopped):
        run_stage(theirs, pretrain.compute, stop_after(4))
    shutil.copytree(theirs.directory / CHECKPOINTS, ours.directory / CHECKPOINTS)
    with pytest.raises(CheckpointError) as error:
        run_stage(ours, pretrain.compute)
    assert difference in str(error.value)
    assert checkpoint_bytes(ours) == checkpoint_bytes(theirs), "refused, not touched"


def test_a_folder_of_checkpoints_that_is_deleted_meanwhile_is_made_again(
    request_of: RequestOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    request, whole = request_of(), request_of(outputs="whole")
    run_stage(whole, pretrain.compute)
    original = CheckpointWriter.submit

    def delete_first(self: CheckpointWriter, snapshot: Any) -> None:
        self.wait()
        shutil.rmtree(request.directory / CHECKPOINTS, ignore_errors=True)
        original(self, snapshot)

    monkeypatch.setattr(CheckpointWriter, "submit", delete_first)
    run_stage(request, pretrain.compute)
    assert weights_sha256(request) == weights_sha256(whole)
    assert stage_files.newest_step(request.directory) == 18


@pytest.mark.slow
def test_fine_tuning_is_stopped_and_resumed_through_the_same_code(
    stop_after: StopAfter, run_stages: RunStages, tiny_values: dict[str, Any], tmp_path: Path
) -> None:
    changes = {"finetune": {"layer_decay": 0.5, "drop_path": 0.3}}
    tiny_settings = validate(merge(tiny_values, changes))
    sums = []
    for outputs, every in ((tmp_path / "whole", 10**6), (tmp_path / "cut", 4)):
        results = run_stages(tiny_settings, outputs, "linear_probe")
        request = store.make_request(STAGES["finetune_2"], tiny_settings, outputs, results)
        stops, result = 0, None
        while result is None:
            try:
                result = run_stage(request, finetune.compute, stop_after(every))
            except (Stopped, InterruptedError):
                stops += 1
        assert (stops > 2) == (every == 4)
        sums.append((weights_sha256(request), metrics(request), result.scores))
    assert sums[0] == sums[1]
