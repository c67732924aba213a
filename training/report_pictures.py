"""The report's pictures: what the networks say about single test images, and where they look.

Computed for the page from the models of finished stages, on a bounded number of test images. They
illustrate: no number that is quoted, and no choice, comes from here.

Dimension key: N = images, S = side in pixels, C = classes, P = patches per side.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import ViTForImageClassification

from data.loaders import eval_batches
from data.randomness import order_by, uniform
from data.records import DatasetError
from data.rotation import NUM_ROTATIONS, make_rotation_batch
from data.splits import Subset
from data.transforms import normalise
from models.attention import class_attention
from models.errors import ModelError
from models.export import load_model
from models.resolution import at_image_size
from training.confusion import Confusion, count_confusions
from training.feature_map import FeatureMap, draw_feature_map
from training.features import Backbone, open_features
from training.hardware import Hardware
from training.images import as_pretrained_on, open_labelled, open_splits
from training.report_scores import TITLES
from training.settings import Settings
from training.stage_files import MODEL, OutputsError
from training.stages import transfer_data
from training.store import StageResult
from training.thumbnails import Picture, lit, picture_uri

logger = logging.getLogger(__name__)

MOST_IMAGES = 1000
"""Test images looked at; of more, that many are drawn by lot."""

MISTAKES, RIGHT = 12, 6
"""Pictures of wrong and of right answers to the pretext task."""

EXAMPLES = 8
"""Images whose attention is shown."""

_BATCH_SIZE = 64


@dataclass(frozen=True, kw_only=True)
class Turns:
    """Answers to the pretext task.

    Attributes:
        mistakes: The most confident wrong ones, at most one of an image.
        right: Some right ones, drawn by lot.
        confusion: All of them.
        images: Test images that were turned four ways.
        of: Test images that there are.
    """

    mistakes: Sequence[Picture]
    right: Sequence[Picture]
    confusion: Confusion
    images: int
    of: int


@dataclass(frozen=True, kw_only=True)
class Look:
    """An image, and where the class token looks in it."""

    image: Picture
    last: Picture
    rollout: Picture


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """All pictures of a page; what could not be made is not there."""

    turns: Turns | None
    looks: Sequence[Look]
    features: FeatureMap | None
    confusions: Sequence[Confusion]
    labelled: int = 0
    """Labelled test images behind `features` and `confusions`."""
    labelled_of: int = 0
    """Those that there are."""


NOTHING = Pictures(turns=None, looks=(), features=None, confusions=())
"""Where there is no model yet, or it, or its images, are not there any more."""


def draw(results: Mapping[str, StageResult], settings: Settings, hardware: Hardware) -> Pictures:
    """Return the pictures of the stages that are there.

    Args:
        results: By stage name, any of them; models and prepared images are read from their
            directories.
        settings: Of the run.
        hardware: Where to compute; the precision is the one that each stage computed in.
    """
    try:
        pretrained = _Pretrained(results, settings, hardware)
    except (KeyError, DatasetError, ModelError, OutputsError) as missing:
        logger.info("The report has no pictures: %s", missing)
        return NOTHING
    classes = _Classes(results, settings, hardware)
    return Pictures(
        turns=pretrained.turns(),
        looks=pretrained.looks(),
        features=classes.features(),
        confusions=list(classes.confusions()),
        labelled=len(classes.test) if classes.test else 0,
        labelled_of=classes.of,
    )


class _Pretrained:
    """What the pretrained network says about turned images."""

    def __init__(
        self, results: Mapping[str, StageResult], settings: Settings, hardware: Hardware
    ) -> None:
        self.settings, self.side = settings, settings.model.image_size
        self.model, self.hardware = _load(results["pretrain"], hardware)
        test = open_splits(results["prepare_data"].directory, settings).test
        self.test, self.of = _sample(test, MOST_IMAGES), len(test)

    def turns(self) -> Turns:
        shares = self._shares()  # (N, true turn, turn said)
        said = shares.argmax(dim=2)
        true = torch.arange(NUM_ROTATIONS).expand_as(said)
        confidence = shares.amax(dim=2)
        wrong = torch.where(said == true, -1.0, confidence.double())
        surest, turn_of = wrong.max(dim=1)  # one mistake of an image is enough
        order = torch.argsort(surest, descending=True, stable=True)
        mistaken = [int(image) for image in order[:MISTAKES] if surest[image] > 0]
        right = torch.nonzero((said == true).flatten()).flatten().tolist()
        chosen = [right[at] for at in _places(len(right), RIGHT)]

        def picture(image: int, turn: int) -> Picture:
            return self._turned(image, turn, int(said[image, turn]), float(confidence[image, turn]))

        names = [f"{90 * turn}°" for turn in range(NUM_ROTATIONS)]
        return Turns(
            mistakes=[picture(image, int(turn_of[image])) for image in mistaken],
            right=[picture(*divmod(at, NUM_ROTATIONS)) for at in chosen],
            confusion=count_confusions("Rotation", names, true.flatten(), said.flatten()),
            images=len(self.test),
            of=self.of,
        )

    def looks(self) -> list[Look]:
        places = self._of_different_classes(EXAMPLES)
        pixels = _crops(self.test, places, self.side)
        batch = normalise(torch.from_numpy(pixels).permute(0, 3, 1, 2))
        # It may have been pretrained on smaller images; these are for people to look at.
        model = at_image_size(self.model, self.side)
        found = class_attention(model, batch.to(self.hardware.torch_device))
        return [
            Look(
                image=Picture(uri=picture_uri(image), alt=f"Test image {self._name(place)}."),
                last=lit(image, last, "in the last block"),
                rollout=lit(image, rollout, "through all blocks"),
            )
            for place, image, last, rollout in zip(
                places, pixels, found.last.cpu().numpy(), found.rollout.cpu().numpy(), strict=True
            )
        ]

    def _of_different_classes(self, most: int) -> list[int]:
        if self.test.labels is None:
            return _places(len(self.test), most)
        _, firsts = np.unique(self.test.labels, return_index=True)
        return sorted(int(firsts[at]) for at in _places(len(firsts), most))

    @torch.no_grad()
    def _shares(self) -> Tensor:
        parts = []
        for batch in _batches(self.test, self.side, self.hardware):
            seen = as_pretrained_on(batch, self.settings)
            with self.hardware.autocast():
                logits = self.model(make_rotation_batch(seen)[0]).logits.float()
            parts.append(logits.softmax(dim=1).unflatten(0, (NUM_ROTATIONS, -1)).cpu())
        return torch.cat(parts, dim=1).transpose(0, 1)

    def _turned(self, image: int, turn: int, said: int, confidence: float) -> Picture:
        pixels = np.rot90(_crops(self.test, [image], self.side)[0], turn)
        # What sounds sure and is not quite must not read as certainty.
        sure = f"{min(confidence, 0.999):.1%}" if confidence > 0.99 else f"{confidence:.0%}"
        verdict = "rightly" if said == turn else "wrongly"
        return Picture(
            uri=picture_uri(pixels),
            alt=f"Test image {self._name(image)}, turned by {90 * turn}°; the network {verdict} "
            f"says {90 * said}°, with {sure}.",
            title=f"says {90 * said}° ({sure})",
            note="rightly" if said == turn else f"is {90 * turn}°",
        )

    def _name(self, place: int) -> str:
        return str(int(self.test.indices[place]))


class _Classes:
    """What the networks that were trained on labels say, and the features they build on."""

    def __init__(
        self, results: Mapping[str, StageResult], settings: Settings, hardware: Hardware
    ) -> None:
        self.results, self.settings, self.hardware = results, settings, hardware
        self.test: Subset | None = None
        self.names: Sequence[str] = ()
        self.of = 0
        try:
            images = open_labelled(results[transfer_data(settings)].directory, settings)
        except (KeyError, DatasetError):  # no labels, or not there
            return
        self.images, self.of = images, len(images.test)
        self.test, self.names = _sample(images.test, MOST_IMAGES), images.class_names

    def features(self) -> FeatureMap | None:
        labels = None if self.test is None else self.test.labels
        if labels is None or len(labels) < 3 or "features" not in self.results:
            return None
        titles: dict[Backbone, str] = {"random": "Before pretraining", "pretrained": "After"}
        try:
            tokens = {title: self._class_tokens(backbone) for backbone, title in titles.items()}
        except OSError as gone:
            logger.info("The report has no map of features: %s", gone)
            return None
        return draw_feature_map(
            {title: found.numpy() for title, found in tokens.items()},
            labels=labels,
            names=self.names,
        )

    def confusions(self) -> Iterator[Confusion]:
        if self.test is None or self.test.labels is None:
            return
        true = torch.from_numpy(self.test.labels)
        for stage in ("linear_probe", "finetune_1", "finetune_2", "finetune_all", "from_scratch"):
            if stage not in self.results:
                continue
            try:
                if stage == "linear_probe":
                    answers = self._answers_of_probe(self.results[stage])
                else:
                    answers = self._answers(*_load(self.results[stage], self.hardware))
            except (KeyError, OSError, ModelError, OutputsError) as missing:
                logger.info("The report has no confusions of %s: %s", stage, missing)
                continue
            yield count_confusions(TITLES[stage], self.names, true, answers)

    @torch.no_grad()
    def _answers_of_probe(self, result: StageResult) -> Tensor:
        """As it was scored: not from a pass of its own, which may round otherwise."""
        model = load_model(result.directory / MODEL)
        logits: Tensor = model.classifier(self._class_tokens("pretrained"))
        return logits.argmax(dim=1)

    def _class_tokens(self, backbone: Backbone) -> Tensor:
        found = open_features(self.results["features"].directory, backbone, self.images)
        return found.test.final_cls[0, _places(self.of, MOST_IMAGES)]

    @torch.no_grad()
    def _answers(self, model: ViTForImageClassification, hardware: Hardware) -> Tensor:
        assert self.test is not None
        parts = []
        for batch in _batches(self.test, self.settings.model.image_size, hardware):
            with hardware.autocast():
                parts.append(model(batch).logits.float().argmax(dim=1).cpu())
        return torch.cat(parts)


def _load(result: StageResult, hardware: Hardware) -> tuple[ViTForImageClassification, Hardware]:
    """Return a model and what it computes on, in the precision that its stage had.

    In another one, or with the attention in another form, some of its answers would be others.
    """
    own = hardware.as_decided_in(result.directory)
    return own.place(load_model(result.directory / MODEL)), own


def _batches(subset: Subset, side: int, hardware: Hardware) -> Iterator[Tensor]:
    device = hardware.torch_device
    for batch in eval_batches(subset, batch_size=_BATCH_SIZE, side=side, device=device):
        yield batch.images


def _places(count: int, most: int) -> list[int]:
    """Return up to `most` of `count` places, ascending, the same ones every time.

    Drawn by lot: at equal distances they would keep in step with a source whose classes take turns.
    """
    chance = uniform(0, 0, np.arange(count, dtype=np.int64), "report")
    return sorted(order_by(chance)[:most].tolist())


def _sample(subset: Subset, most: int) -> Subset:
    return Subset(subset.split, subset.indices[_places(len(subset), most)])


def _crops(subset: Subset, places: Sequence[int], side: int) -> NDArray[np.uint8]:
    """Return the centre crops that evaluation reads, `(N, S, S, 3)`."""
    first = (subset.split.side - side) // 2
    pixels = subset.gather(np.asarray(places, dtype=np.int64))
    return pixels[:, first : first + side, first : first + side]
