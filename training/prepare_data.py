"""Preparation: decode every image once into square uint8 arrays that training maps into memory."""

from data.downloaded_source import Scratch
from data.patience import Patience
from data.prepare import prepare
from data.sources import open_source
from training import runner
from training.hardware import available_processors
from training.runner import StageContext, StageOutcome
from training.store import data_source


def compute(context: StageContext) -> StageOutcome:
    """Prepare the images of a source; finished shards of an earlier attempt are kept."""
    settings = context.settings
    source, test_source = data_source(context.request.stage, settings)
    downloads = context.input("download") if "download" in context.request.inputs else None
    scratch = Scratch(
        directory=context.directory / "fetched",
        patience=Patience(),
        stop=lambda: bool(context.stop),
    )

    def report(done: int, total: int) -> None:
        context.progress(done, total, "images")
        if context.stop:
            raise InterruptedError(
                f"Stopped after {done:,} of {total:,} images; finished parts are kept, the same "
                "command goes on after them."
            )

    manifest = prepare(
        open_source(source, test_source, downloads=downloads, scratch=scratch),
        context.directory,
        side=settings.prepared_size,
        report=report,
        workers=settings.hardware.threads or available_processors(),
        max_skipped=settings.data.max_skipped,
    )
    scratch.remove()
    return StageOutcome(
        scores={
            "source": source,
            "counts": dict(manifest.counts),
            "classes": list(manifest.class_names or ()),
            "side": settings.prepared_size,
            "skipped": len(manifest.skipped),
            "skipped_examples": [
                [item.name, item.reason]
                for item in manifest.skipped[:10]  # all of them are in the manifest
            ],
            "fingerprint": manifest.fingerprint,
        },
        made=["manifest.json"],
        digest=manifest.fingerprint,
    )


if __name__ == "__main__":
    raise SystemExit(runner.main(compute))
