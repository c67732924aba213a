"""One GPU, one training: a slot that a training holds while it runs.

A global concurrency limit of Prefect's named `gpu`, which `make ui` creates; where there is none,
nobody waits. It is not a deployment's limit: the lease of that one ends the run when the server
is away as it is renewed (Prefect 3.8.8, `flow_engine.py`).
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from prefect import get_client
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectNotFound

logger = logging.getLogger("training.gpu_slot")

SLOT = "gpu"
"""Name of the limit; its size is the number of trainings that may run at once."""

LEASE_SECONDS = 60.0
"""Time after which the slot of a holder that was killed is free again; it is renewed meanwhile."""

TRY_SECONDS = 1.0
"""Time after which a training is said to wait."""


@contextmanager
def gpu_slot(on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold the slot for the `with` block, waiting for it as long as it takes.

    A server that does not answer costs the slot, not the training.

    Args:
        on_wait: Called once if the slot is taken.
    """
    held = ExitStack()
    try:
        _acquire(held, on_wait)
    except Exception as error:  # whatever the server does
        logger.warning("The GPU slot is not to be had, training goes on without: %s", error)
    try:
        yield
    finally:
        try:
            held.close()
        except Exception as error:  # as above; the lease frees the slot
            logger.warning("The GPU slot could not be given back, its lease will: %s", error)


def _acquire(held: ExitStack, on_wait: Callable[[], None]) -> None:
    with get_client(sync_client=True) as client:
        try:
            client.read_global_concurrency_limit_by_name(SLOT)
        except ObjectNotFound:
            return
    try:
        held.enter_context(_slot(TRY_SECONDS))
    except TimeoutError:
        on_wait()
        held.enter_context(_slot(None))


def _slot(timeout_seconds: float | None):  # type: ignore[no-untyped-def]  # Prefect's is untyped
    return concurrency(
        SLOT,
        occupy=1,
        timeout_seconds=timeout_seconds,
        lease_duration=LEASE_SECONDS,
        raise_on_lease_renewal_failure=False,
    )
