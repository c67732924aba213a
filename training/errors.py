"""The errors that a user can mend, gathered from where they are raised. Imports no torch."""

from data.patience import RefusedError
from data.records import DatasetError
from models.errors import ModelError
from training.remote_store import StoreAwayError
from training.settings import ConfigError
from training.stage_files import OutputsError


class CheckpointError(ValueError):
    """Checkpoints are there, and none can be used."""


class DivergedError(ArithmeticError):
    """The loss, a gradient or a weight is not a number any more."""


class OutOfMemoryError(MemoryError):
    """A training step does not fit into the memory of the device."""


class PublishError(RuntimeError):
    """The Hub did not take what was to be published."""


USER_ERRORS = (
    ConfigError,
    DatasetError,
    RefusedError,
    ModelError,
    OutputsError,
    CheckpointError,
    DivergedError,
    OutOfMemoryError,
    PublishError,
)
"""Errors whose message says what to do; none of them passes by itself but `StoreAwayError`."""

EXIT_USER_ERROR = 2
"""Exit status where one of these ended a stage."""

ERRORS_BY_NAME = {error.__name__: error for error in (*USER_ERRORS, StoreAwayError)}
"""The same, for messages from another process."""


def is_final(error: object) -> bool:
    """Return whether an error is a user's to mend, so that a retry is of no use."""
    return isinstance(error, USER_ERRORS) and not isinstance(error, StoreAwayError)
