"""The run's network: fresh, or as the stage left it that this one starts from."""

from collections.abc import Sequence

from transformers import ViTForImageClassification

from models.export import load_model
from models.resolution import at_image_size
from models.vit import Weights, build_vit
from training.runner import StageContext


def build_model(
    context: StageContext,
    label_names: Sequence[str] = ("0", "1"),
    weights: Weights = "normal",
    *,
    image_size: int | None = None,
) -> ViTForImageClassification:
    """Build the network on the CPU; its backbone depends on the sizes and the seed alone.

    Args:
        context: Of the stage.
        label_names: Classes of the head, for who uses it.
        weights: How they are drawn; see `build_vit`.
        image_size: Side of its input, in pixels; none for that of the settings.
    """
    sizes = context.settings.model.model_dump()
    if image_size is not None:
        sizes["image_size"] = image_size
    return build_vit(
        **sizes,
        num_labels=len(label_names),
        label_names=label_names,
        seed=context.settings.seed,
        weights=weights,
    )


def load_start(context: StageContext) -> ViTForImageClassification:
    """Load the model, on the CPU, of the stage that fills the role `start`.

    One that was pretrained on smaller images is returned for those of `model.image_size`.

    Raises:
        ModelError: If it is damaged or has other sizes than the settings say.
    """
    settings = context.settings
    expected = settings.model.model_dump()
    if context.request.inputs["start"].stage == "pretrain":
        expected["image_size"] = settings.pretrain_size
    model = load_model(context.input("start") / "model", expect=expected)
    return at_image_size(model, settings.model.image_size)
