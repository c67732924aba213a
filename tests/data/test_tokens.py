from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from data.loaders import Batches, TokenBatches, eval_batches, token_eval_batches
from data.prepared import PreparedData
from data.records import DatasetError
from data.splits import Subset
from data.tokens import Tokens, writing

MakePrepared = Callable[..., PreparedData]
CPU = torch.device("cpu")


@pytest.fixture
def subset(make_prepared: MakePrepared) -> Subset:
    """17 of 23 images, 7 px, three classes."""
    return Subset(make_prepared(23, side=7).train, np.arange(2, 19))


@pytest.fixture
def values(rng: torch.Generator) -> torch.Tensor:
    return torch.randn(17, 3, 5, generator=rng)


@pytest.fixture
def tokens(subset: Subset, values: torch.Tensor, tmp_path: Path) -> Tokens:
    path = tmp_path / "tokens.npy"
    with writing(path, (17, 3, 5)) as append:
        append(values[:11])
        append(values[11:].bfloat16())
    return Tokens(path, subset)


def test_what_was_written_is_read_in_any_order_rounded_to_bfloat16(
    tokens: Tokens, values: torch.Tensor
) -> None:
    positions = np.array([16, 0, 10, 11])
    found = tokens.gather(positions)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, values[positions].bfloat16())
    # 8 significant bits: half a unit of the last one.
    assert torch.allclose(found.float(), values[positions], rtol=2**-8, atol=0)


def test_batches_of_tokens_are_those_of_the_images(
    subset: Subset, tokens: Tokens, values: torch.Tensor
) -> None:
    of_images = Batches(subset, batch_size=5, side=7, flip=False, seed=3, device=CPU)
    of_tokens = TokenBatches(tokens, batch_size=5, seed=3, device=CPU)
    assert of_tokens.steps_per_epoch == of_images.steps_per_epoch == 3
    for epoch, first in ((0, 0), (1, 0), (1, 2)):
        pairs = list(zip(of_images.epoch(epoch, first), of_tokens.epoch(epoch, first), strict=True))
        assert len(pairs) == 3 - first
        for images, found in pairs:
            assert found.ids.tolist() == images.ids.tolist()
            assert found.epoch == images.epoch
            assert found.labels is not None
            assert images.labels is not None
            assert found.labels.tolist() == images.labels.tolist()
            assert found.images.dtype == torch.float32
            assert torch.equal(found.images, values[found.ids - 2].bfloat16().float())


def test_every_image_is_evaluated_once_in_order(subset: Subset, tokens: Tokens) -> None:
    of_images = list(eval_batches(subset, 4, 7, CPU))
    of_tokens = list(token_eval_batches(tokens, 4, CPU))
    assert [batch.ids.tolist() for batch in of_tokens] == [
        batch.ids.tolist() for batch in of_images
    ]
    assert torch.equal(
        torch.cat([batch.images for batch in of_tokens]),
        tokens.gather(np.arange(17)).float(),
    )


def test_a_batch_that_the_images_do_not_fill_is_refused(tokens: Tokens) -> None:
    with pytest.raises(DatasetError, match="batch_size is 18, and there are 17"):
        TokenBatches(tokens, batch_size=18, seed=0, device=CPU)
