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


@contextmanager
def gpu_slot(tell: Callable[[str, str], None]) -> Iterator[None]:
    """Hold the slot for the `with` block, waiting for it as long as it takes.

    A server that does not answer costs the slot, not the training.

    Args:
        tell: Given name and message of the task run's state, when it waits and when it goes on.
    """
    held = ExitStack()
    try:
        _acquire(held, tell)
    except Exception as error:  # whatever the server does
        logger.warning("The GPU slot is not to be had, training goes on without: %s", error)
    try:
        yield
    finally:
        try:
            held.close()
        except Exception as error:  # as above; the lease frees the slot
            logger.warning("The GPU slot could not be given back, its lease will: %s", error)


def _acquire(held: ExitStack, tell: Callable[[str, str], None]) -> None:
    with get_client(sync_client=True) as client:
        try:
            limit = client.read_global_concurrency_limit_by_name(SLOT)
        except ObjectNotFound:
            return
    # Asked beforehand: trying with a time-out makes Prefect log an error where the slot is taken.
    is_taken = limit.active_slots >= limit.limit
    if is_taken:
        tell("Waiting for GPU", "Another run is training; this one goes on when it is done.")
    held.enter_context(
        concurrency(
            SLOT, occupy=1, lease_duration=LEASE_SECONDS, raise_on_lease_renewal_failure=False
        )
    )
    if is_taken:
        tell("Running", "The GPU is free.")
