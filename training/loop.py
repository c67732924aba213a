"""The one training loop. Stages differ in the functions that they pass in.

Position is one integer, the number of optimiser steps; order, augmentation and dropout are
functions of (seed, epoch or step, sample), so that a run that was interrupted anywhere goes on
exactly as if it had not been.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import ViTForImageClassification

from data.loaders import Batch
from data.patience import DownloadError
from data.randomness import derive_seed
from models.freezing import set_train_mode
from training import checkpoint, optim
from training.averaging import WeightAverage
from training.checkpoint import Snapshot
from training.checkpoint_writer import CheckpointWriter
from training.divergence import StepGuard
from training.errors import DivergedError, OutOfMemoryError
from training.metrics_file import MetricsFile
from training.recipes import RecipeSettings
from training.resumes import note_start
from training.runner import StageContext
from training.stage_files import CHECKPOINTS
from training.stages import STAGES
from training.stopping import Stopped

logger = logging.getLogger(__name__)


PASSES_PER_STEP = 3
"""Forward passes that a step's arithmetic is worth: itself, and twice that backward, where the
gradient of each product with respect to its weights and to its input is another product."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is trained, and on what.

    Attributes:
        model: The network; the parameters that require a gradient are trained.
        recipe: Epochs, batch size, rates.
        section: Name of the recipe among the settings, for messages.
        steps_per_epoch: Optimiser steps that make an epoch.
        samples_per_step: Images that go through the network per step.
        batches: `(epoch, first step within it)` → that epoch's batches from there on.
        compute_loss: Mean loss of one batch, or of an equal part of one, a scalar in nats.
        evaluate: Scores on val, by metric key.
        score: The metric that decides which epoch is best (higher is better), where best weights
            are kept; none keeps the last.
        patience: Epochs without a better score after which training stops; none for all.
        layer_decay: Learning rate of each layer over that of the layer above; none for one rate.
        ema: Share that an average of the weights keeps in every step; it is what is evaluated and
            what is left in the end. None for no average.
        network: What is trained where that is more than the model: the model, and heads that are
            not exported. All of it is in the checkpoints.
    """

    model: ViTForImageClassification
    recipe: RecipeSettings
    section: str
    steps_per_epoch: int
    samples_per_step: int
    batches: Callable[[int, int], Iterable[Batch]]
    compute_loss: Callable[[Batch], Tensor]
    evaluate: Callable[[], dict[str, float]]
    score: str | None = None
    patience: int | None = None
    layer_decay: float | None = None
    ema: float | None = None
    network: nn.Module | None = None


@dataclass
class TrainState:
    """Where training is. All of it is in every checkpoint."""

    step: int = 0
    evaluated_epochs: int = 0
    val_scores: dict[str, float] = field(default_factory=dict)
    best_score: float = -math.inf
    best_epoch: int = 0
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    skipped_steps: int = 0
    wall_seconds: float = 0.0
    train_seconds: float = 0.0
    resumed_from: int | None = None
    """Step that this process started at; not saved."""
    wall_seconds_before: float = 0.0
    """Time of earlier attempts; not saved."""

    def to_plain(self) -> dict[str, Any]:
        """Return what goes into `state.json`."""
        return {
            "evaluated_epochs": self.evaluated_epochs,
            "val_scores": self.val_scores,
            # JSON has no infinity.
            "best_score": self.best_score if math.isfinite(self.best_score) else None,
            "best_epoch": self.best_epoch,
            "skipped_steps": self.skipped_steps,
            "wall_seconds": self.wall_seconds,
            "train_seconds": self.train_seconds,
        }


def train(context: StageContext, task: Task, *, seed: int) -> TrainState:
    """Train to the end, from the newest checkpoint where there is one.

    The model is left with its final weights: the average where `task.ema` is set, and of them the
    best epoch's where `task.score` is.

    Raises:
        DivergedError: If `checkpoint.max_skipped_steps` losses or gradients in a row were not
            finite. Fewer are skipped, and counted.
        OutOfMemoryError: If a step does not fit into memory.
        CheckpointError: If checkpoints are there and none can be used.
        Stopped: If the process was asked to stop; the state is saved.
    """
    return _Run(context, task, seed).train()


@dataclass(frozen=True)
class _Files:
    """What the first of the processes that train together writes, and no other."""

    metrics: MetricsFile
    writer: CheckpointWriter


class _Run:
    files: _Files | None = None

    def __init__(self, context: StageContext, task: Task, seed: int) -> None:
        self.context = context
        self.task = task
        self.seed = seed
        self.root = context.directory / CHECKPOINTS
        self.identity = {
            "key": context.request.key,
            "version": STAGES[context.request.stage].version,
            # What the key is made of, so that a refusal can show the difference.
            **context.request.reads,
            **{f"digest of {role}": item.digest for role, item in context.request.inputs.items()},
        }
        recipe = task.recipe
        self.total_steps = recipe.epochs * task.steps_per_epoch
        self.warmup_steps = round(recipe.warmup_epochs * task.steps_per_epoch)
        self.peak_lr = optim.scaled_lr(recipe.base_lr, task.samples_per_step)
        self.network: nn.Module = task.model if task.network is None else task.network
        self.optimizer = optim.make_optimizer(
            self.network, weight_decay=recipe.weight_decay, layer_decay=task.layer_decay
        )
        self.trained = [p for p in self.network.parameters() if p.requires_grad]
        self.average = None if task.ema is None else WeightAverage(self.network, task.ema)
        self.team = context.team
        self.made_with = asdict(context.hardware())
        self.started = self.saved_at = self.lap = time.monotonic()
        self.state = TrainState()

    def train(self) -> TrainState:
        saved = self.team.from_first(
            lambda: checkpoint.load_newest(
                self.root, identity=self.identity, made_with=self.made_with
            )
        )
        if saved:
            self._restore(saved)
        step = self.state.step
        if self.team.is_first:
            note_start(self.context.directory, step=step, epoch=step / self.task.steps_per_epoch)
        self.guard = StepGuard(
            self.trained[0].device,
            limit=self.context.settings.checkpoint.max_skipped_steps,
            skipped=self.state.skipped_steps,
        )
        with ExitStack() as files, self.team.contact(), self._memory_explained():
            if self.team.is_first:
                self.files = self._open_files(files, saved)
            try:
                while not self._is_finished():
                    if self.state.evaluated_epochs < self.state.step // self.task.steps_per_epoch:
                        self._end_epoch()
                    else:
                        self._train_epoch()
            except DownloadError:  # images that lie elsewhere were waited for, and given up
                if self.team.count == 1:  # or the others may wait, in the middle of a step
                    self._save()
                raise
        if self.average:
            self.average.put_in_place()
        if self.task.score and self.state.best_weights:
            self.network.load_state_dict(self.state.best_weights)
        self._count_time()
        return self.state

    def _open_files(self, files: ExitStack, saved: Snapshot | None) -> "_Files":
        return _Files(
            files.enter_context(
                MetricsFile(
                    self.context.directory, position=saved.state["tracker"] if saved else None
                )
            ),
            files.enter_context(
                CheckpointWriter(
                    self.root,
                    identity=self.identity,
                    made_with=self.made_with,
                    saved_step=saved.step if saved else None,
                )
            ),
        )

    def _is_finished(self) -> bool:
        state, task = self.state, self.task
        if state.evaluated_epochs == task.recipe.epochs:
            return True
        waited = state.evaluated_epochs - state.best_epoch
        return bool(task.score and task.patience and waited >= task.patience)

    def _train_epoch(self) -> None:
        epoch, first = divmod(self.state.step, self.task.steps_per_epoch)
        set_train_mode(self.task.model)
        self.lap = time.monotonic()
        try:
            for batch in self.task.batches(epoch, first):
                self._step(batch)
                self._count_lap()
                self._save_if_due()
        except InterruptedError:  # asked to stop while the next batch was waited for
            self._save_and_leave()
        if self.trained[0].is_cuda:
            torch.cuda.synchronize()  # steps that are still queued are no part of the evaluation
        self._count_lap()

    def _step(self, batch: Batch) -> None:
        state, task = self.state, self.task
        lr = optim.learning_rate(
            state.step,
            total_steps=self.total_steps,
            warmup_steps=self.warmup_steps,
            peak_lr=self.peak_lr,
        )
        optim.set_learning_rate(self.optimizer, lr)
        torch.manual_seed(derive_seed(self.seed, "dropout", state.step, *self.team.place))
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._backward(batch)
        gradients = [p.grad for p in self.trained if p.grad is not None]
        norm = get_total_norm(gradients)
        if task.recipe.clip_norm is not None:
            clip_grads_with_norm_(self.trained, task.recipe.clip_norm, norm)
        # Fused AdamW skips the step where this is 1; see StepGuard.
        self.optimizer.found_inf = self.guard.found_inf(loss, norm)  # type: ignore[attr-defined]
        self.optimizer.step()
        self.team.hurry()
        if self.average:
            self.average.update(state.step)
        state.step += 1
        if state.step % self.context.settings.tracking.log_every_steps == 0:
            self._log(loss.item(), lr)

    def _backward(self, batch: Batch) -> Tensor:
        """Add up the gradients of a batch, part by part; return its mean loss."""
        parts = self.task.recipe.accumulation_steps
        total = torch.zeros((), device=batch.images.device)
        for number, part in enumerate(batch.parts(parts), start=1):
            with nullcontext() if number == parts else self.team.keeping_gradients():
                loss = self.task.compute_loss(part) / parts
                loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return self.team.mean(total)

    @contextmanager
    def _memory_explained(self) -> Iterator[None]:
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            recipe, section = self.task.recipe, self.task.section
            more = range(recipe.accumulation_steps + 1, recipe.batch_size + 1)
            parts = next((n for n in more if recipe.batch_size % n == 0), None)
            offer = (
                f"Set {section}.accumulation_steps={parts} (the same samples per step in smaller "
                "parts), or lower"
                if parts
                else "Lower"
            )
            raise OutOfMemoryError(
                f"A step of {self.context.request.title} must fit into memory; one of "
                f"{recipe.batch_size} images in {recipe.accumulation_steps} part(s) does not. "
                f"{offer} {section}.batch_size. Either is another stage key, which starts from "
                "the beginning."
            ) from error

    def _log(self, loss: float, lr: float) -> None:
        step, epoch = self.state.step, self.state.step / self.task.steps_per_epoch
        self._check_guard()
        metrics = {"train/loss": loss, "train/lr": lr}
        if self.state.skipped_steps:
            metrics["train/skipped_steps"] = self.state.skipped_steps
        if self.files:
            self.files.metrics.log(metrics, step=step, epoch=epoch)
        self._report(f"epoch {math.ceil(epoch)}, loss {loss:.3f}")

    def _report(self, detail: str) -> None:
        samples = self.state.step * self.task.samples_per_step
        self.context.progress(
            self.state.step,
            self.total_steps,
            "steps",
            f"{detail}, {samples:,} samples",
            resumed_from=self.state.resumed_from or 0,
        )

    def _check_guard(self) -> None:
        self.guard.check(
            self.state.step, stage=self.context.request.title, section=self.task.section
        )
        skipped = self.guard.skipped()
        if skipped > self.state.skipped_steps:
            logger.warning(
                "%s: %d steps skipped until step %d, their loss or gradient was not finite.",
                self.context.request.title,
                skipped,
                self.state.step,
            )
        self.state.skipped_steps = skipped

    def _end_epoch(self) -> None:
        state, task = self.state, self.task
        try:
            with self.average.in_place() if self.average else nullcontext():
                scores = self._evaluate()
        except InterruptedError:  # asked to stop: the evaluation is done again after a resume
            self._save_and_leave()
        if self.files:
            self.files.metrics.log(scores, step=state.step, epoch=float(state.evaluated_epochs))
        logger.info(
            "%s: epoch %d of %d, %s",
            self.context.request.title,
            state.evaluated_epochs,
            task.recipe.epochs,
            ", ".join(f"{name} {value:.4f}" for name, value in scores.items()),
        )
        self._save()

    def _evaluate(self) -> dict[str, float]:
        """Score the weights as they are, and keep them if they are the best so far."""
        state, task = self.state, self.task
        scores = task.evaluate()
        state.evaluated_epochs += 1
        state.val_scores = scores
        if task.score and scores[task.score] > state.best_score:
            state.best_score = scores[task.score]
            state.best_epoch = state.evaluated_epochs
            # Copies: what state_dict returns are the live weights, which go on changing.
            state.best_weights = {
                name: tensor.detach().clone() for name, tensor in self.network.state_dict().items()
            }
        return scores

    def _save_if_due(self) -> None:
        rule = self.context.settings.checkpoint
        late = time.monotonic() - self.saved_at >= rule.every_seconds
        asked, due = self.team.any_of(bool(self.context.stop), late)
        if asked:
            self._save_and_leave()
        if due or (rule.every_steps and self.state.step % rule.every_steps == 0):
            self._save()  # also where an epoch ends: evaluating it can take long

    def _save_and_leave(self) -> NoReturn:
        self._save()
        self._let_write()
        saved_step = self.files.writer.saved_step if self.files else None
        raise Stopped(self.state.step, saved_step=saved_step) from None

    def _save(self) -> None:
        self._let_write()
        with self.team.together():
            self._save_here()

    def _let_write(self) -> None:
        """Wait until what was saved before is on disk, or has failed and been reported."""
        files = self.files
        self.team.wait_for_first(lambda: files is not None and files.writer.is_idle())
        if files:
            files.writer.wait()

    def _save_here(self) -> None:
        self._check_guard()
        if self.guard.last_was_skipped():
            return  # perhaps the first of many: what is saved must be good to go on from
        self._count_time()
        if not all(bool(torch.isfinite(p).all()) for p in self.trained):
            raise DivergedError(
                f"The weights must be finite, they are not after step {self.state.step} of "
                f"{self.context.request.title}. The last good checkpoint is kept. Lower "
                f"{self.task.section}.base_lr, or raise {self.task.section}.warmup_epochs."
            )
        if not self.files:
            self.saved_at = time.monotonic()
            return
        try:
            position = self.files.metrics.position()
        except OSError as error:
            self.files.writer.report_failure(self.state.step, error)
            return
        snapshot = Snapshot(
            step=self.state.step,
            evaluated=self.state.evaluated_epochs * self.task.steps_per_epoch == self.state.step,
            tensors={
                "model": self.network.state_dict(),
                "optimizer": checkpoint.optimizer_tensors(self.network, self.optimizer),
                **({"best": self.state.best_weights} if self.state.best_weights else {}),
                **({"average": self.average.tensors()} if self.average else {}),
            },
            state={**self.state.to_plain(), "tracker": position},
        )
        self.files.writer.submit(snapshot)
        self.saved_at = time.monotonic()

    def _restore(self, saved: Snapshot) -> None:
        plain = dict(saved.state)
        plain.pop("tracker")
        if plain["best_score"] is None:
            plain["best_score"] = -math.inf
        device = self.trained[0].device
        self.network.load_state_dict(saved.tensors["model"])
        checkpoint.restore_optimizer(self.network, self.optimizer, saved.tensors["optimizer"])
        if self.average:
            self.average.restore(saved.tensors["average"])
        best: Mapping[str, Tensor] = saved.tensors.get("best", {})
        self.state = TrainState(
            **plain,
            step=saved.step,
            best_weights={name: tensor.to(device, copy=True) for name, tensor in best.items()},
            resumed_from=saved.step,
            wall_seconds_before=plain["wall_seconds"],
        )
        logger.info("%s resumes from step %d.", self.context.request.title, saved.step)
        self._report("resumed")

    def _count_lap(self) -> None:
        now = time.monotonic()
        self.state.train_seconds += now - self.lap
        self.lap = now

    def _count_time(self) -> None:
        elapsed = time.monotonic() - self.started
        self.state.wall_seconds = self.state.wall_seconds_before + elapsed


def _is_out_of_memory(error: Exception) -> bool:
    # On the host torch raises a plain RuntimeError.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate" in str(
        error
    )
