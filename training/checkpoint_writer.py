"""Saving beside training: the step that takes the snapshot is the only one that waits."""

import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError
from torch import Tensor

from training import checkpoint
from training.checkpoint import Snapshot
from training.errors import CheckpointError

logger = logging.getLogger(__name__)


class CheckpointWriter:
    """Writes one checkpoint at a time in a thread; use as a context manager.

    A checkpoint that cannot be written (full disk, unreadable afterwards) costs a warning and not
    the run: the older ones are kept, and training goes on to the next.
    """

    def __init__(
        self,
        root: Path,
        *,
        identity: Mapping[str, Any],
        made_with: Mapping[str, Any] | None = None,
        saved_step: int | None = None,
    ) -> None:
        """Start with nothing to write.

        Args:
            root: Folder of all checkpoints of one stage key.
            identity: What they belong to; see `checkpoint.save`.
            made_with: What besides can change their bytes; see there.
            saved_step: Step of the newest sound checkpoint that is there.
        """
        self.saved_step = saved_step
        """Step of the newest checkpoint known to be on disk, once `wait` has returned."""
        self._root, self._identity, self._made_with = root, identity, made_with
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._staged: dict[tuple[str, str], Tensor] = {}

    def submit(self, snapshot: Snapshot) -> None:
        """Copy a snapshot to the host and have it written; wait only for the one before it."""
        self.wait()
        staged = {
            group: {name: self._stage(group, name, tensor) for name, tensor in tensors.items()}
            for group, tensors in snapshot.tensors.items()
        }
        frozen = replace(snapshot, tensors=staged, state=dict(snapshot.state))
        self._writing = self._pool.submit(self._write, frozen)

    def is_idle(self, seconds: float = 1.0) -> bool:
        """Wait a little for what is being written; say whether nothing is."""
        if self._writing is not None:
            wait([self._writing], timeout=seconds)
        return self._writing is None or self._writing.done()

    def wait(self) -> None:
        """Return when what was submitted is on disk, or has failed and been reported."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def report_failure(self, step: int, error: Exception) -> None:
        """Say that the checkpoint of a step cannot be saved, and what that means."""
        logger.warning(
            "The checkpoint of step %d cannot be saved (%s). Training goes on; a resume would "
            "start from %s.",
            step,
            error,
            "the beginning" if self.saved_step is None else f"step {self.saved_step}",
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.wait()
        finally:
            self._pool.shutdown()

    def _stage(self, group: str, name: str, tensor: Tensor) -> Tensor:
        # The same buffers each time: touching fresh memory takes longer than copying.
        buffer = self._staged.get((group, name))
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype)
            self._staged[group, name] = buffer
        return buffer.copy_(tensor.detach())

    def _write(self, snapshot: Snapshot) -> None:
        try:
            checkpoint.save(
                self._root, snapshot, identity=self._identity, made_with=self._made_with
            )
        except (OSError, SafetensorError, CheckpointError) as error:
            self.report_failure(snapshot.step, error)
        else:
            self.saved_step = snapshot.step
