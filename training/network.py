"""The run's network: fresh, or as the stage left it that this one starts from."""

from collections.abc import Sequence

from transformers import ViTForImageClassification

from models.export import load_model
from models.vit import Weights, build_vit
from training.runner import StageContext


def build_model(
    context: StageContext, label_names: Sequence[str] = ("0", "1"), weights: Weights = "normal"
) -> ViTForImageClassification:
    """Build the network on the CPU; its backbone depends on the sizes and the seed alone.

    Args:
        context: Of the stage.
        label_names: Classes of the head, for who uses it.
        weights: How they are drawn; see `build_vit`.
    """
    return build_vit(
        **context.settings.model.model_dump(),
        num_labels=len(label_names),
        label_names=label_names,
        seed=context.settings.seed,
        weights=weights,
    )


def load_start(context: StageContext) -> ViTForImageClassification:
    """Load the model, on the CPU, of the stage that fills the role `start`.

    Raises:
        ModelError: If it is damaged or has other sizes than the settings say.
    """
    return load_model(context.input("start") / "model", expect=context.settings.model.model_dump())
