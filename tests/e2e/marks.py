"""What the end-to-end tests have in common."""

import pytest

END_TO_END = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    # What waits for the clock of a shared machine may fail once; twice in a row is a failure.
    pytest.mark.flaky(reruns=1),
]

LONG = "pretrain.epochs=300"
"""Some 20 seconds of training."""

ENDLESS = "pretrain.epochs=100000"
