"""A flow of its own for pretraining: what people schedule alone."""

from collections.abc import Sequence
from typing import Any

from prefect import flow

from flows.parameters import Outputs, RunParameters, StageName, run_name
from flows.rotation_vit import ENDS_BADLY, run_stages
from training.settings import Settings


@flow(name="pretrain", flow_run_name=run_name, **ENDS_BADLY)
def pretrain_only(
    settings: Settings = Settings(),  # noqa: B008 (frozen, so sharing it is safe)
    outputs: Outputs = "outputs",
    overrides: Sequence[str] = (),
    refresh: Sequence[StageName] = (),
) -> dict[str, Any]:
    """Prepare the images and pretrain on them; labels are not needed.

    Args:
        settings: Everything that the run depends on; given as a whole, or not at all.
        outputs: Folder of everything that is written, or its address: s3://bucket/prefix.
        overrides: Single settings laid over the others, as path.to.setting=value.
        refresh: Stages to compute again from the beginning.

    Returns:
        The content of the run's `results.json`.
    """
    given = RunParameters(settings=settings, overrides=overrides, outputs=outputs)
    return run_stages(*given.resolved(), until="pretrain", refresh=refresh)
