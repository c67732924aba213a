"""How far a stage is, told to whoever listens: a terminal, Prefect's UI, a parent process.

Stages call `report`; they know nothing of the listeners. A listener must return at once and must
not raise.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a stage is.

    Attributes:
        stage: Its name.
        done: Units finished, those of earlier attempts included.
        total: Units in all.
        unit: What is counted, in the plural.
        detail: What else is worth seeing: epoch, loss, rate.
        resumed_from: Units that earlier attempts had finished.
    """

    stage: str
    done: int
    total: int
    unit: str
    detail: str = ""
    resumed_from: int = 0


Listener = Callable[[Progress], None]

_listeners: list[Listener] = []


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Have `listener` called with every report made inside the `with` block."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def report(progress: Progress) -> None:
    """Tell all listeners."""
    for listener in list(_listeners):
        listener(progress)
