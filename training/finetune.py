"""Fine-tuning: the head and the last one (`finetune_1`) or two (`finetune_2`) blocks, or all.

All start from the probed backbone, so that they compare; `finetune.start_from=previous` chains the
first two instead. The last norm, which stands between the last block and the head, is trained too.
"""

from typing import Literal

from models.freezing import train_head_and_last_blocks
from training import runner
from training.images import open_labelled
from training.network import load_start
from training.runner import StageContext, StageOutcome
from training.supervised import train_classifier

BLOCKS = {"finetune_1": 1, "finetune_2": 2, "finetune_all": None}
"""Last blocks that are trained, by stage; none trains everything."""


def compute(context: StageContext) -> StageOutcome:
    """Fine-tune the model that the stage starts from."""
    model = load_start(context)
    train_head_and_last_blocks(model, BLOCKS[context.request.stage])
    images = open_labelled(context.input("data"), context.settings)
    whole = context.request.stage == "finetune_all"
    section: Literal["finetune", "finetune_all"] = "finetune_all" if whole else "finetune"
    return train_classifier(context, model, images, section=section)


if __name__ == "__main__":
    raise SystemExit(runner.main(compute))
