"""Processes that compute in turn, each a block of steps at a time, and stand still in between.

A process that waits is stopped (SIGSTOP), its loader's workers with it: it takes no processor from
the others, and reads nothing ahead in time that is not its own.
"""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch


class Turns:
    """What a computation knows of the others: when it is its turn."""

    def __init__(self, pipe: Connection, block: int) -> None:
        """Take turns of `block` steps, as the process at the other end of the pipe says."""
        self._pipe, self._block = pipe, block
        self._left, self._since = block, 0.0

    def begin(self) -> None:
        """Wait for the first turn; what is done from here on counts to it."""
        self._pipe.send(0.0)
        self._wait()

    def step_ended(self) -> None:
        """Count one step; after the last one of a block, wait for the next turn."""
        self._left -= 1
        if self._left == 0:
            self.block_ended()

    def block_ended(self) -> None:
        """Say how long the block took, once the device has done it; wait for the next turn."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._pipe.send(time.perf_counter() - self._since)
        self._wait()

    def _wait(self) -> None:
        self._pipe.recv()
        self._left, self._since = self._block, time.perf_counter()


class Player:
    """A process of its own for one computation, seen from outside."""

    def __init__(self, name: str, compute: Callable[[Any, Turns], None], job: Any, block: int):
        """Start it, and let it import what it needs.

        Args:
            name: For messages.
            compute: A module's function: calls `begin`, then `step_ended` after every step. May end
                by an error, or take more steps than it gets turns for.
            job: What `compute` is given; can be pickled.
            block: Steps per turn.
        """
        context = multiprocessing.get_context("spawn")
        self._name = name
        self._pipe, end = context.Pipe()
        self._process = context.Process(target=_play, args=(compute, job, end, block))
        self._process.start()
        end.close()  # so that the end of the process is the end of the pipe
        self._receive()
        self._send(signal.SIGSTOP)

    def turn(self) -> float:
        """Have it compute one block; return the seconds that it took."""
        self._send(signal.SIGCONT)
        self._pipe.send(None)
        seconds = self._receive()
        self._send(signal.SIGSTOP)
        return seconds

    def end(self) -> None:
        """End it and its workers: nothing that they hold is of use."""
        if self._process.is_alive():
            self._send(signal.SIGKILL)
        self._process.join()

    def _receive(self) -> float:
        try:
            seconds: float = self._pipe.recv()
        except EOFError:
            raise RuntimeError(
                f"{self._name} must compute until it is ended, but its process ended by itself. "
                "What it said is above."
            ) from None
        return seconds

    def _send(self, number: signal.Signals) -> None:
        assert self._process.pid is not None
        os.killpg(self._process.pid, number)


def _play(compute: Callable[[Any, Turns], None], job: Any, pipe: Connection, block: int) -> None:
    # A group of its own, for the signals, but in the session of who started it: when that one dies,
    # the kernel ends a group that stands still.
    os.setpgrp()
    # Loaders start their workers as they do in a program of their own: by what comes first here.
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    compute(job, Turns(pipe, block))
