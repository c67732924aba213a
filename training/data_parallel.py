"""Several processes that train together: what each of them computes, and what all agree on.

Each has a copy of the network and an equal slice of every batch. Gradients are averaged by
`DistributedDataParallel`; whatever decides how training goes on (losses, skipped steps, scores, a
request to stop) is made common first, so that all decide alike. The first process alone writes.
"""

import logging
import os
import re
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from data.loaders import Share
from training.stopping import StopRequest, hear_of_death

logger = logging.getLogger(__name__)

T = TypeVar("T")

BEGIN_SECONDS = 600
"""Longest time that processes wait for each other until they have taken a step: they import, open
their images, compile."""

LOST_AFTER_SECONDS = 25
"""Longest time that they wait afterwards. Torch's launcher gives a process that hangs 30 seconds
more to end by itself, so that all of them have ended within a minute."""


class TeamError(RuntimeError):
    """What went wrong is the matter of another process."""


class LostProcessError(TeamError):
    """Another process has ended, or does not answer."""


class PeerError(TeamError):
    """Another process has failed, and says itself how."""


class Team:
    """The processes that train together, seen from one of them.

    Every method but the plain properties is called by all of them, in the same order. One process
    alone talks to nobody.
    """

    def __init__(self, index: int = 0, count: int = 1) -> None:
        """Take a place among processes that have found each other; see `join`.

        Args:
            index: Number of this process, from 0.
            count: Processes in all.
        """
        self.index, self.count = index, count
        self._network: DistributedDataParallel | None = None
        self._in_a_hurry = False

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes."""
        return self.index == 0

    @property
    def place(self) -> tuple[str, ...]:
        """What the numbers that dropout draws depend on besides; nothing for one process."""
        return () if self.count == 1 else (f"process {self.index} of {self.count}",)

    @property
    def share(self) -> Share:
        """The part of the images that this process computes on."""
        return Share(self.index, self.count)

    def parallel(self, network: nn.Module) -> nn.Module:
        """Return what calls a network so that gradients become the mean over all processes.

        Args:
            network: On its device, with its final flags for what is trained. One a process.
        """
        if self.count == 1:
            return network
        # It gives all the weights of the first process. There are no buffers to keep alike.
        self._network = DistributedDataParallel(network, gradient_as_bucket_view=True)
        return self._network

    def keeping_gradients(self) -> AbstractContextManager[None]:
        """Return a context in which gradients stay here: more are to be added to them first."""
        return nullcontext() if self._network is None else self._network.no_sync()

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean over all processes of a scalar; a GPU is not waited for."""
        if self.count == 1:
            return value
        with self.contact():
            total = value.detach().clone()
            distributed.all_reduce(total)
        return total / self.count

    def total(self, *values: float) -> list[float]:
        """Return the sums over all processes, in float64."""
        if self.count == 1:
            return list(values)
        return self._reduce(torch.tensor(values, dtype=torch.float64), distributed.ReduceOp.SUM)

    def any_of(self, *facts: bool) -> list[bool]:
        """Say of each fact whether it holds in any process."""
        if self.count == 1:
            return list(facts)
        found = torch.tensor(facts, dtype=torch.int64)
        return [value > 0 for value in self._reduce(found, distributed.ReduceOp.MAX)]

    def from_first(self, compute: Callable[[], T]) -> T:
        """Return what the first process computes, to all; it should be small, or rare.

        Raises:
            PeerError: In the others, where it raised.
        """
        if self.count == 1:
            return compute()
        found: list[T | None] = [None]
        with self.together():
            if self.is_first:
                found[0] = compute()
        with self.contact():
            distributed.broadcast_object_list(found, device=torch.device("cpu"))
        value: T = found[0]  # type: ignore[assignment]
        return value

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let an error inside the `with` block, in which nobody asks another, be one of all.

        Raises:
            PeerError: Where another process raised.
        """
        if self.count == 1:
            yield
            return
        failed = True
        try:
            yield
            failed = False
        finally:
            (somewhere,) = self.any_of(failed)
        if somewhere:
            raise PeerError("Another process of this training has failed.")

    def wait_for_first(self, is_done: Callable[[], bool]) -> None:
        """Let all wait, as long as it takes, until the first process has done something.

        Args:
            is_done: Asked in the first process again and again; it should take its time, but less
                than `LOST_AFTER_SECONDS`, before it says no.
        """
        while self.count > 1 and not any(self.any_of(self.is_first and is_done())):
            pass

    def until_stopped(self, batches: Iterable[T], stop: StopRequest) -> Iterator[T]:
        """Yield batches, each image once; some processes may have more of them than others.

        Raises:
            InterruptedError: In all of them, once one is asked to stop.
        """
        own = iter(batches)
        while True:
            batch = next(own, None)
            if batch is not None:
                yield batch
            elif self.count == 1:
                return
            asked, goes_on = self.any_of(bool(stop), batch is not None)
            if asked:
                raise InterruptedError("Stopped before all images were seen.")
            if not goes_on:
                return

    def is_asked_while_waiting(self, stop: StopRequest) -> bool:
        """Say in the first process, while the others are in `may_begin`, whether one is to stop."""
        asked, _, _ = self.any_of(bool(stop), False, False)
        return asked

    def let_begin(self, begins: bool) -> None:
        """Let the others leave `may_begin`, to begin or to end."""
        self.any_of(False, True, begins)

    def may_begin(self, stop: StopRequest) -> bool:
        """Wait in the other processes, as long as it takes, for what the first one says."""
        while True:
            _, said, begins = self.any_of(bool(stop), False, False)
            if said:
                return begins

    def hurry(self) -> None:
        """Wait for others no longer than `LOST_AFTER_SECONDS` from now on."""
        if self.count > 1 and not self._in_a_hurry:
            self._in_a_hurry = True
            # The public name is younger than the oldest torch that is supported.
            named = distributed.distributed_c10d
            set_timeout = getattr(named, "set_timeout", None) or named._set_pg_timeout
            set_timeout(timedelta(seconds=LOST_AFTER_SECONDS), None)

    @contextmanager
    def contact(self) -> Iterator[None]:
        """Tell the loss of another process from other errors.

        Raises:
            LostProcessError: For what torch raises then.
        """
        try:
            yield
        except RuntimeError as error:
            if self.count == 1 or not _is_lost_contact(error):
                raise
            raise LostProcessError(
                f"One of the {self.count} processes of this training has ended, or has not "
                f"answered for a while; process {self.index} ends, too. ({_reason(error)})"
            ) from error

    def _reduce(self, values: Tensor, how: "distributed.ReduceOp.RedOpType") -> list[float]:
        with self.contact():
            distributed.all_reduce(values, op=how)
        return values.tolist()


ALONE = Team()
"""One process that trains by itself."""


def is_launched() -> bool:
    """Whether this process is one of several, or one, that torch's launcher has started."""
    # RANK and WORLD_SIZE alone are set by others, too, for the whole of a job.
    return "TORCHELASTIC_RUN_ID" in os.environ


def join() -> Team:
    """Find the other processes that the launcher has started, and say who is who.

    Raises:
        LostProcessError: If one of them ends meanwhile.
    """
    count = int(os.environ["WORLD_SIZE"])
    if count == 1:
        return Team()
    # The launcher ends after its processes, unless it is killed: perhaps because one hangs, which
    # no other signal would end. It has a session of its own, so no kill of a group reaches it.
    hear_of_death(os.getppid(), signal.SIGKILL)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    # What decides about the training is in the host's memory; gradients are where the network is.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    team = Team(int(os.environ["RANK"]), count)
    with team.contact():
        distributed.init_process_group(backend, timeout=timedelta(seconds=BEGIN_SECONDS))
    return team


def _is_lost_contact(error: RuntimeError) -> bool:
    # Gloo raises a plain RuntimeError, which names its source file.
    return isinstance(error, distributed.DistError) or "gloo" in str(error).lower()


def _reason(error: Exception) -> str:
    """Return what gloo or NCCL says first, without the places in their sources and its guesses."""
    line = next(iter(str(error).splitlines()), "")
    return re.sub(r"\[?/\S+:\d+[\],]? ?", "", line).partition(". ")[0]
