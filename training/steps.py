"""The steps of a run: its stages, then its variants', then the report of all of them.

Whoever goes through a run goes through these: the flow, `rotvit status`, the report of what there
is, and the look whether everything is cached. Each says what came of a step before it asks for the
next one, as what a stage builds on is part of its key.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from training import remote_outputs, store
from training.settings import Settings
from training.stages import Stage, plan
from training.store import StageRequest, StageResult
from training.variants import Variant, variants


@dataclass
class Found:
    """Results of a run so far.

    Attributes:
        stages: Of its own stages, by name.
        variants: Of its variants' stages, by the variant's name and theirs.
    """

    stages: dict[str, StageResult] = field(default_factory=dict)
    variants: dict[str, dict[str, StageResult]] = field(default_factory=dict)

    def add(self, result: StageResult, variant: str = "") -> None:
        """Take a result in, of a variant or of the run's own stage."""
        of = self.variants.setdefault(variant, {}) if variant else self.stages
        of[result.stage] = result

    def known_to(self, *chain: Variant) -> dict[str, StageResult]:
        """Return what the stages of a variant, or of the run itself, may build on.

        Of a stage that a variant computes itself nothing else will do, even before it has done so.

        Args:
            chain: The variant, after that on which it builds; nothing for the run itself.
        """
        known = dict(self.stages)
        for variant in chain:
            for stage in variant.stages:
                known.pop(stage.name, None)
            known |= self.variants.get(variant.name, {})
        return known

    @property
    def by_role(self) -> dict[str, StageResult]:
        """The variants' results by `<variant>/<stage>`: the roles that they have for the report."""
        return {
            f"{variant}/{stage}": result
            for variant, results in self.variants.items()
            for stage, result in results.items()
        }


@dataclass(frozen=True)
class Step:
    """A stage of a run or of a variant of it.

    Attributes:
        stage: The stage.
        variant: Whose it is; none for the run's own.
        request: For it; none where something that it needs is not there.
        lacking: Title of what is not there.
    """

    stage: Stage
    variant: Variant | None
    request: StageRequest | None
    lacking: str = ""

    @property
    def title(self) -> str:
        """The stage's name, and the variant's."""
        return store.stage_of_variant(self.stage.name, self.variant.name if self.variant else "")


def steps(
    settings: Settings, outputs: Path, found: Found, until: str | None = None, run: str = ""
) -> Iterator[Step]:
    """Yield the steps of a run, in order.

    Args:
        settings: Of the run.
        outputs: Folder of everything that is written.
        found: What there is; the caller adds the result of a step before it takes the next.
        until: Last stage to run, with what it needs; none for all of them.
        run: Name of the run that asks.

    Raises:
        ConfigError: If `until` names no stage.
        DatasetError: If a source of images cannot be read.
        OutputsError: If the outputs have an address, and its store fails.
    """
    planned = plan(settings, until)
    report = [stage for stage in planned if stage.name == "report"]
    for stage in planned:
        if stage not in report:
            yield _step(stage, (), settings, outputs, found, run)
    beside = variants(settings, found.stages, until)
    by_name = {variant.name: variant for variant in beside}
    for variant in beside:
        below = by_name.get(variant.builds_on or "")
        chain = (below, variant) if below else (variant,)
        for stage in variant.stages:
            yield _step(stage, chain, variant.settings, outputs, found, run)
    for stage in report:
        missing = (
            store.stage_of_variant(needed.name, variant.name)
            for variant in beside
            for needed in variant.stages
            if needed.name not in found.variants.get(variant.name, {})
        )
        lacking = next(missing, "")
        if lacking:
            yield Step(stage, None, None, lacking)
        else:
            yield _step(stage, (), settings, outputs, found, run, more=found.by_role)


def _step(
    stage: Stage,
    chain: Sequence[Variant],
    settings: Settings,
    outputs: Path,
    found: Found,
    run: str,
    more: Mapping[str, StageResult] | None = None,
) -> Step:
    results = found.known_to(*chain)
    variant = chain[-1] if chain else None
    for needed in stage.needs(settings).values():
        if needed not in results:
            return Step(stage, variant, None, needed)
    name = variant.name if variant else ""
    request = store.make_request(stage, settings, outputs, results, run, variant=name, more=more)
    remote_outputs.look(request)
    return Step(stage, variant, request)
