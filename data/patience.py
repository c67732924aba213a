"""How long to go on with a server that fails: what is tried again, after which wait, how often."""

import email.utils
import logging
import random
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from data.records import DatasetError

Result = TypeVar("Result")
Stop = Callable[[], bool]

UNREACHABLE_ATTEMPTS = 3
"""Attempts in a row, the last of which found no server, after which there is no other one: a name
that is not known or a port that is closed is a mistake more often than it passes."""

_log = logging.getLogger(__name__)


class DownloadError(OSError):
    """A server failed, or sent something else, as often as it was asked. May go better later."""


class RefusedError(DatasetError):
    """A server does not give what it is asked for, and will not if asked again."""

    def __init__(self, message: str, *, missing: bool = False) -> None:
        """Say why.

        Args:
            message: What is wrong and what to do.
            missing: Whether there is no such file, as far as the server says.
        """
        super().__init__(message)
        self.missing = missing


class TryAgainError(Exception):
    """One attempt failed in a way that the next one may not."""

    def __init__(
        self, reason: str, wait: float | None = None, *, unreachable: bool = False
    ) -> None:
        """Say why.

        Args:
            reason: Why.
            wait: After how many seconds the server wants to be asked again.
            unreachable: Whether there is no server at the address.
        """
        super().__init__(reason.rstrip("."))
        self.wait, self.unreachable = wait, unreachable


def try_again(error: BaseException) -> TryAgainError:
    """Return the error of an attempt that the network or a server ended, by what it raised."""
    reason = f"{type(error).__name__}: {error}".rstrip(": ")
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        seen.append(cause)
        cause = cause.__cause__ or cause.__context__
    gone = any(isinstance(each, socket.gaierror | ConnectionRefusedError) for each in seen)
    return TryAgainError(reason, unreachable=gone)


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How often and how long.

    Attributes:
        attempts: Attempts in a row that may fail without having brought anything.
        first_wait: Seconds before the second attempt; each later wait is twice as long.
        longest_wait: Bound of that, in seconds.
        longest_asked: Longest wait in seconds that a server may ask for (`Retry-After`).
        stall_seconds: Time without a byte, or with next to none, after which a connection is
            given up. Shorter than the 25 s that a stopped stage has.
        least_bytes: What must come in that time.
        progress_bytes: What an attempt must bring to count as one that got further.
    """

    attempts: int = 8
    first_wait: float = 1.0
    longest_wait: float = 60.0
    longest_asked: float = 600.0
    stall_seconds: float = 15.0
    least_bytes: int = 16 * 2**10
    progress_bytes: int = 2**20

    def wait(self, failures: int, asked: float | None) -> float:
        """Return how many seconds to wait after that many failures in a row.

        A little chance keeps many clients from coming back at the same moment.
        """
        grown = min(self.longest_wait, self.first_wait * 2.0 ** (failures - 1))
        return max(min(asked or 0.0, self.longest_asked), grown * random.uniform(0.8, 1.2))


def never() -> bool:
    """Ask for no stop."""
    return False


def persist(
    action: Callable[[], Result], what: str, patience: Patience, stop: Stop = never
) -> Result:
    """Do something that may fail for a while.

    Args:
        action: Raises `TryAgainError` where another attempt is worth it.
        what: What it is about, for messages.
        patience: How often.
        stop: Asked while waiting; true ends it.

    Raises:
        DownloadError: If every attempt failed.
        InterruptedError: If `stop` said so.
    """
    for failures in range(1, patience.attempts + 1):
        try:
            return action()
        except TryAgainError as error:
            pause(error, failures, what, patience, stop)
    raise AssertionError("pause raises after the last attempt")


def pause(error: TryAgainError, failures: int, what: str, patience: Patience, stop: Stop) -> None:
    """Wait before the next attempt.

    Raises:
        DownloadError: If this was the last one.
        InterruptedError: If `stop` said so.
    """
    most = patience.attempts
    if error.unreachable:
        most = min(most, UNREACHABLE_ATTEMPTS)
    if failures >= most:
        raise DownloadError(
            f"{what} must be downloaded, {failures} attempts in a row failed; the last one: "
            f"{error}. Look at the network and run the same command again; it goes on there."
        ) from error
    seconds = patience.wait(failures, error.wait)
    _log.warning("%s: %s. Next attempt in %.0f s.", what, error, seconds)
    ends = time.monotonic() + seconds
    while (left := ends - time.monotonic()) > 0:
        check_stop(stop, what)
        time.sleep(min(0.2, left))
    check_stop(stop, what)


def check_stop(stop: Stop, what: str) -> None:
    """Raise if a stop was asked for.

    Raises:
        InterruptedError: If so.
    """
    if stop():
        raise InterruptedError(f"Stopped while downloading {what}; the same command goes on there.")


def asked_wait(retry_after: str | None) -> float | None:
    """Return the seconds that a `Retry-After` header asks for: a number, or a date."""
    if not retry_after:
        return None
    if retry_after.strip().isdigit():
        return float(retry_after)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, TypeError):
        return None
