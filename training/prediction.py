"""What a finished model says about photos, on the data path that it was evaluated with.

Dimension key: B = images, S = side of the model's input in pixels, C = classes.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import ViTForImageClassification

from data.decode import UndecodableError, decode_square
from data.decoding_pool import pillow_warnings_ignored
from data.records import DatasetError, printable
from data.rotation import NUM_ROTATIONS, ROTATION_NAMES, make_rotation_batch
from data.transforms import normalise
from models.errors import ModelError
from models.export import input_side, label_names, load_model, read_prepared_size
from models.vit import to_device

BATCH_SIZE = 64


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """A model, ready for photos.

    Attributes:
        model: In eval mode, float32.
        label_names: In the order of the labels.
        prepared_size: Side in pixels of the square that the input is cropped from.
        device: Where the model is.
    """

    model: ViTForImageClassification
    label_names: tuple[str, ...]
    prepared_size: int
    device: torch.device

    @classmethod
    def load(cls, directory: Path) -> "Predictor":
        """Load a `model/` directory, onto a GPU where there is one.

        Raises:
            ModelError: If it is damaged, or none of this project's.
        """
        prepared_size = read_prepared_size(directory)
        model = load_model(directory)
        side = input_side(model.config)
        if prepared_size < side:
            raise ModelError(
                f"{directory} must crop its {side} px from at least as many, its preprocessing has "
                f"{prepared_size} px. Run its stage again."
            )
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return cls(
            model=to_device(model, device),
            label_names=label_names(model.config),
            prepared_size=prepared_size,
            device=device,
        )

    @property
    def tells_rotations(self) -> bool:
        """Whether the labels are turns, not classes."""
        return self.label_names == ROTATION_NAMES

    def read(self, photo: bytes | Path) -> Tensor:
        """Decode a photo as preparation and evaluation do: `(3, S, S)`, uint8.

        Raises:
            UndecodableError: If it cannot be decoded.
        """
        square = torch.from_numpy(decode_square(photo, self.prepared_size)).permute(2, 0, 1)
        side = input_side(self.model.config)
        first = (self.prepared_size - side) // 2
        return square[:, first : first + side, first : first + side]

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """Return the probability of each class, `(B, C)`, float32, on the CPU.

        Args:
            images: `(B, 3, S, S)`, uint8.
        """
        logits = self.model(normalise(images.to(self.device))).logits
        shares: Tensor = logits.float().softmax(dim=1)
        return shares.cpu()

    def turns(self, images: Tensor) -> Tensor:
        """Return the probability of each turn, `(B, 4)`: the mean over all four turns of an image.

        Turned further by k quarter turns, an image that lies at turn j lies at turn j + k, so each
        image is asked about four times; single answers err more often than their mean.

        Args:
            images: `(B, 3, S, S)`, uint8.
        """
        views, _ = make_rotation_batch(images)
        found = self.probabilities(views).view(NUM_ROTATIONS, len(images), NUM_ROTATIONS)
        return torch.stack([found[k].roll(-k, dims=1) for k in range(NUM_ROTATIONS)]).mean(dim=0)


def predict_photos(predictor: Predictor, photos: list[Path]) -> Tensor:
    """Return the probabilities of all photos, `(N, C)`, in their order.

    Raises:
        DatasetError: If one cannot be decoded; nothing is predicted then.
    """
    images = []
    with pillow_warnings_ignored():
        for photo in photos:
            try:
                images.append(predictor.read(photo))
            except UndecodableError as error:
                raise DatasetError(
                    f"{printable(str(photo))} must be a photo, but it cannot be decoded: {error}."
                ) from error
    parts = torch.split(torch.stack(images), BATCH_SIZE)
    return torch.cat([predictor.probabilities(part) for part in parts])
