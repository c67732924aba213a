"""The error of this package. Apart from the network, so that naming it does not import torch."""


class ModelError(ValueError):
    """A network that cannot be built, or weights that do not fit it."""
