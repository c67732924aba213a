"""Download: what remote sources hold, and their files, unless those are too large to be kept."""

from collections import Counter

from data.catalogue import FILE_NAME
from data.downloads import digest, download
from data.patience import Patience
from training import runner
from training.runner import StageContext, StageOutcome
from training.store import remote_sources

PATIENCE = Patience()
"""How often and how long servers are asked."""


def compute(context: StageContext) -> StageOutcome:
    """Download the sources of a stage; what an earlier attempt brought is kept."""
    specs = remote_sources(context.request.stage, context.settings)

    def report(done: int, total: int) -> None:
        # Whole kilobytes of small downloads, whole megabytes of the others: for people to read.
        size, unit = (10**6, "MB") if total >= 10**8 else (10**3, "kB")
        context.progress(done // size, total // size, unit)

    found = download(
        specs,
        context.directory,
        report=report,
        patience=PATIENCE,
        stop=lambda: bool(context.stop),
        stage=context.request.stage.replace("_", "-"),  # as the command line names it
    )
    counts: Counter[str] = Counter()
    for each in found:
        counts.update(each.counts)
    return StageOutcome(
        scores={
            "sources": {each.spec: each.origin for each in found},
            "counts": dict(counts),
            "bytes": sum(each.size for each in found),
            "kept": all(each.kept for each in found),
        },
        made=[FILE_NAME],
        digest=digest(found),
    )


if __name__ == "__main__":
    raise SystemExit(runner.main(compute))
