"""The errors that a user can mend, gathered from where they are raised. Imports no torch."""

from data.patience import RefusedError
from data.records import DatasetError
from models.errors import ModelError
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
"""Errors that a retry cannot mend and whose message says what to do."""

EXIT_USER_ERROR = 2
"""Exit status where one of these ended a stage."""

ERRORS_BY_NAME = {error.__name__: error for error in USER_ERRORS}
"""The same, for messages from another process."""
