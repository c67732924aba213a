"""One GPU, one training: a slot that a training holds while it runs.

A global concurrency limit of Prefect's named `gpu`, which `make ui` creates; where there is none,
nobody waits. It is not a deployment's limit: the lease of that one ends the run when the server
is away as it is renewed (Prefect 3.8.8, `flow_engine.py`).
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

from prefect import get_client
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

logger = logging.getLogger("training.gpu_slot")

SLOT = "gpu"
"""Name of the limit; its size is the number of trainings that may run at once."""

LEASE_SECONDS = 60.0
"""Time after which the slot of a holder that was killed is free again; it is renewed meanwhile. A
longer one would outlive an absence of the server, but a killed run that starts again would wait for
itself as long."""

PATIENCE_SECONDS = 600.0
"""Longest absence of the server that who is in the queue waits for; then it trains nevertheless."""

ASK_AGAIN_SECONDS = 5.0
"""Time between two tries meanwhile."""


@contextmanager
def gpu_slot(tell: Callable[[str, str], None]) -> Iterator[None]:
    """Hold the slot for the `with` block, waiting for it as long as it takes.

    A server that does not answer costs the slot, not the training; only who knows that another
    one trains waits for the server to come back, `PATIENCE_SECONDS` at most.

    Args:
        tell: Given name and message of the task run's state, when it waits and when it goes on.
    """
    held = ExitStack()
    try:
        is_taken = _is_taken()
        if is_taken:
            tell("Waiting for GPU", "Another run is training; this one goes on when it is done.")
        if is_taken is not None:
            _acquire(held, patience=PATIENCE_SECONDS if is_taken else 0)
        if is_taken:
            tell("Running", "The GPU is free.")
    except Exception as error:  # whatever the server does
        logger.warning("The GPU slot is not to be had, training goes on without: %s", error)
    try:
        yield
    finally:
        try:
            with _no_retries():
                held.close()
        except Exception as error:  # as above; the lease frees the slot
            logger.warning("The GPU slot could not be given back, its lease will: %s", error)


def _is_taken() -> bool | None:
    """Tell whether somebody holds the slot; None where there is no such limit.

    Asked beforehand: trying with a time-out makes Prefect log an error where the slot is taken.
    """
    with _no_retries(), get_client(sync_client=True) as client:
        try:
            limit = client.read_global_concurrency_limit_by_name(SLOT)
        except ObjectNotFound:
            return None
    return limit.active_slots >= limit.limit


def _acquire(held: ExitStack, patience: float) -> None:
    away_since: float | None = None
    while True:
        try:
            if away_since is not None:
                _is_taken()  # raises at once where the server is still away
            held.enter_context(
                concurrency(
                    SLOT,
                    occupy=1,
                    lease_duration=LEASE_SECONDS,
                    raise_on_lease_renewal_failure=False,
                )
            )
        except Exception as error:
            if away_since is None:
                away_since = time.monotonic()
                logger.info("The GPU slot is asked for again until there is an answer: %s", error)
            if time.monotonic() - away_since > patience:
                raise
            time.sleep(ASK_AGAIN_SECONDS)
        else:
            return


def _no_retries() -> AbstractContextManager[object]:
    """Ask the server once: Prefect's client tries for some 70 seconds otherwise."""
    return temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0})
