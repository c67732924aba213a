"""A run that somebody waits for at a terminal: progress, closing table, how it ended."""

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from flows.local_run import log_path, server_is_configured, start_flow
from training.stages import plan, refreshed

if TYPE_CHECKING:
    from training.settings import Settings


class RunFailedError(RuntimeError):
    """A stage failed, and not by a user's mistake."""


class KilledError(BaseException):
    """A signal asked this process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def run_and_show(
    settings: "Settings", outputs: Path, *, until: str | None = None, refresh: Sequence[str] = ()
) -> None:
    """Run the flow, unless all is cached, and print what there is then.

    Args:
        settings: Of the run.
        outputs: Where everything is written.
        until: The last stage; all of them without.
        refresh: Stages to compute again.

    Raises:
        RunFailedError: If a stage failed, and not by a user's mistake.
        StoreAwayError: If the store of the outputs is away.
        KilledError: If this process was told to end.
    """
    outputs = outputs.expanduser().resolve()
    again = refreshed(refresh, plan(settings, until))
    from training import preflight

    preflight.check(settings, outputs, until)
    results = None
    if not again and not server_is_configured():
        # Nobody would see that flow run, and starting a server takes longer than all the rest.
        from training.run_record import record_if_all_cached

        results = record_if_all_cached(settings, outputs, until)
    if results is None:
        results = _compute(settings, outputs, until=until, refresh=again)
    from rich.console import Console

    from flows import display

    console = Console()
    console.print(display.closing_table(results))
    for word, path in display.closing_paths(results, outputs):
        console.print(f"{word:<9}{path}", soft_wrap=True, markup=False, highlight=False)
    from training.remote_outputs import address_of

    if (address := address_of(outputs)) != str(outputs):
        stored = f"stored   {address}/runs/{results['run']}"
        console.print(stored, soft_wrap=True, markup=False, highlight=False)


def _compute(
    settings: "Settings", outputs: Path, *, until: str | None, refresh: Sequence[str]
) -> dict[str, Any]:
    from rich.console import Console

    from flows import display

    with display.shown(Console(stderr=True)), _signals_raised():
        try:
            return start_flow(settings, outputs, until, refresh)
        except Exception as error:  # whatever ended the run, the log and the way on are named
            if is_user_error(error):
                raise
            raise RunFailedError(
                f"The run failed: {type(error).__name__}: {sentence(str(error))} "
                f"Log: {log_path(settings, outputs)}. The same command resumes."
            ) from error


@contextmanager
def _signals_raised() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into an exception for the `with` block.

    Without it they end this process where it stands, and Prefect's temporary server outlives it.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        raise KilledError(number)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # nohup
            signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def is_user_error(error: Exception) -> bool:
    """Return whether an error is a mistake that its message explains, not a defect."""
    from training.errors import USER_ERRORS

    return isinstance(error, USER_ERRORS)


def sentence(text: str) -> str:
    """Return words as one line that ends like a sentence."""
    words = " ".join(text.split()) or "no reason given"
    return words if words.endswith((".", "!", "?")) else f"{words}."
