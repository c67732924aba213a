"""Fine-tuning: the head and the last one (`finetune_1`) or two (`finetune_2`) blocks, or all.

All start from the probed backbone, so that they compare; `finetune.start_from=previous` chains the
first two instead. The last norm, which stands between the last block and the head, is trained too.
Where the stage `frozen_tokens` has kept what the other blocks make of the images, only what is
trained is computed.
"""

from typing import Literal

from models.freezing import train_head_and_last_blocks
from training import runner
from training.frozen_tokens import open_tokens
from training.images import open_labelled
from training.network import load_start
from training.runner import StageContext, StageOutcome
from training.stages import TRAINED_BLOCKS
from training.supervised import train_classifier


def compute(context: StageContext) -> StageOutcome:
    """Fine-tune the model that the stage starts from."""
    model = load_start(context)
    blocks = TRAINED_BLOCKS.get(context.request.stage)
    train_head_and_last_blocks(model, blocks)
    images = open_labelled(context.input("data"), context.settings, context.is_stopped)
    tokens = None
    if blocks is not None and "tokens" in context.request.inputs:
        tokens = open_tokens(context.input("tokens"), images, blocks)
    whole = context.request.stage == "finetune_all"
    section: Literal["finetune", "finetune_all"] = "finetune_all" if whole else "finetune"
    return train_classifier(context, model, images, section=section, tokens=tokens)


if __name__ == "__main__":
    raise SystemExit(runner.main(compute))
