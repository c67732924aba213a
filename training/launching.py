"""Starting a stage in several processes of this machine, under torch's elastic launcher.

What runs is `torchrun --standalone --nproc-per-node N`, in this process; it starts the stage's own
command N times, and ends all of them when one has failed.
"""

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from training import hardware
from training.errors import EXIT_USER_ERROR
from training.stopping import EXIT_RESUME, PARENT_DIED, PARENT_STOPS, hear_of_death
from training.wording import ended_by

logger = logging.getLogger(__name__)


def launch(
    module: str,
    arguments: Sequence[str],
    count: int,
    *,
    parent: int | None,
    tell: Callable[[str], None],
) -> int:
    """Run a module in several processes until all have ended. Main thread only.

    SIGTERM, SIGINT and what a parent says are passed on to them, and they are given 30 seconds.

    Args:
        module: What each process runs.
        arguments: Of each of them.
        count: How many.
        parent: The process whose death counts as a stop (Linux only); none for no such process.
        tell: Told how a process was lost, where it could not say so itself.

    Returns:
        The exit status, as one process would have it. Once they were told to stop it is the one
        that says so: torch does not tell how they have ended, but for what they print.
    """
    # Here, because it takes long to import and hardly anybody needs it.
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    # Torch passes on the signals that it knows. To the processes this is their parent's death.
    signal.signal(PARENT_STOPS, lambda number, frame: signal.raise_signal(PARENT_DIED))
    signal.signal(PARENT_DIED, _end)
    if parent is not None and not hear_of_death(parent, PARENT_DIED):
        return EXIT_RESUME
    # Or torch would give one thread to each, and say so in a banner.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, hardware.default_threads() // count)))
    command = [sys.executable, "-P", "-m", module, *arguments]
    logger.info("The images are divided among %d processes.", count)
    with tempfile.TemporaryDirectory(prefix="rotvit-launcher-") as logs:
        options = ["--standalone", "--nproc-per-node", str(count), "--log-dir", logs]
        try:
            chosen = run.parse_args([*options, "--no-python", *command])  # type: ignore[no-untyped-call]
            run.run(chosen)  # type: ignore[no-untyped-call]
        except ChildFailedError as error:
            failures: Mapping[int, ProcessFailure] = error.failures
            return _status_of(failures, count, tell)
        except SignalException:  # they have been told, and have ended
            return EXIT_RESUME
    return 0


def _end(number: int, frame: Any) -> None:
    raise SystemExit(EXIT_RESUME)  # nothing has been started yet


def _status_of(failures: Mapping[int, Any], count: int, tell: Callable[[str], None]) -> int:
    """Return the exit status that says most about processes that failed, by their numbers."""
    codes = {failure.exitcode for failure in failures.values()}
    # The seconds are whole ones: who was killed comes before who noticed. SIGTERM is the launcher's
    # own, for those that are left.
    ours = -signal.SIGTERM
    index, first = min(
        failures.items(),
        key=lambda item: (item[1].timestamp, item[1].exitcode >= 0 or item[1].exitcode == ours),
    )
    if first.exitcode < 0 and first.exitcode != ours:
        tell(f"Process {index} of {count} {ended_by(-first.exitcode)}.")
        return 1
    return next((code for code in (EXIT_RESUME, EXIT_USER_ERROR) if code in codes), 1)
