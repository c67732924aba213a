import pytest
import torch
from torch import Tensor
from torch.nn import functional

from training.configure import validate
from training.features import Features, SplitFeatures
from training.linear_probe import train_probe
from training.readings import readings
from training.settings import Settings

WIDTH = 6


def features_of(depth: int, images: int, *, seed: int = 0, classes: int = 2) -> Features:
    """Features without content: the rows of each part are told apart by a mean of their own."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(2 * depth + 3, images, WIDTH, generator=generator)
    rows += torch.arange(2 * depth + 3)[:, None, None]
    return Features(rows, torch.arange(images) % classes)


def standardised(tokens: Tensor) -> Tensor:
    return (tokens - tokens.mean(dim=-2, keepdim=True)) / tokens.std(dim=-2, keepdim=True)


def test_each_reading_reads_what_its_name_says() -> None:
    features = features_of(depth=5, images=9)
    final, mean = features.final_cls[0], features.mean[5]
    normed = functional.layer_norm(features.cls, (WIDTH,), eps=1e-6)
    blocks = torch.cat([normed[2], normed[3], normed[4], normed[5]], dim=1)
    expected = {
        "class token": final,
        "mean of patch tokens": mean,
        "class token, mean of patch tokens": torch.cat([final, mean], dim=1),
        "class tokens of the last 4 blocks": blocks,
        "class tokens of the last 4 blocks, mean of patch tokens": torch.cat([blocks, mean], dim=1),
    }
    found = {reading.name: reading.read(features) for reading in readings(5)}
    assert list(found) == list(expected)
    for name, tokens in found.items():
        assert torch.equal(tokens, expected[name][None]), name


def test_a_head_sees_the_last_class_token_as_after_the_backbones_own_norm() -> None:
    """The scale and shift of that norm, left out here, are undone by a head's standardising."""
    features = features_of(depth=3, images=9)
    scale, shift = torch.linspace(0.2, 3, WIDTH), torch.linspace(-5, 2, WIDTH)
    normed = functional.layer_norm(features.cls[-1], (WIDTH,), scale, shift, eps=1e-6)
    together = {reading.name: reading.read for reading in readings(3)}[
        "class tokens of the last 3 blocks"
    ](features)
    torch.testing.assert_close(standardised(together[0, :, -WIDTH:]), standardised(normed))


@pytest.mark.parametrize(
    ("depth", "widths"), [(1, [1, 1, 2]), (2, [1, 1, 2, 2, 3]), (4, [1, 1, 2, 4, 5])], ids=str
)
def test_a_shallow_backbone_gives_the_blocks_that_it_has(depth: int, widths: list[int]) -> None:
    features = features_of(depth, images=3)
    found = [reading.read(features) for reading in readings(depth)]
    assert [tokens.shape for tokens in found] == [(1, 3, WIDTH * width) for width in widths]


@pytest.fixture
def settings() -> Settings:
    # The first rate diverges; val must choose the other.
    lrs = [3e38, 0.3]
    return validate({"linear_probe": {"epochs": 40, "lrs": lrs, "weight_decays": [0.0, 0.1]}})


@pytest.mark.parametrize(
    ("row", "right"),
    [
        (-1, {0, 2}),  # the class token after the last norm
        (4, {1, 2, 4}),  # the mean of the patch tokens after block 4
        (6, {3, 4}),  # the class token after block 1
        (9, {3, 4}),  # after block 4, before the norm
        (5, set()),  # after the embedding
        (3, set()),  # the mean after block 3
    ],
    ids=str,
)
def test_a_reading_knows_what_is_told_to_its_part_only(
    settings: Settings, row: int, right: set[int]
) -> None:
    parts = []
    for seed, images in enumerate((120, 60, 60)):
        part = features_of(depth=4, images=images, seed=seed)
        # In the first two of the width, so that a norm over it leaves the difference.
        part.rows[row, :, 0] += 20 * part.labels - 10
        part.rows[row, :, 1] -= 20 * part.labels - 10
        parts.append(part)
    for place, reading in enumerate(readings(4)):
        probe = train_probe(SplitFeatures(*parts), settings, num_classes=2, read=reading.read)
        share = probe.correct / probe.total
        assert (share > 0.95) if place in right else (share < 0.8), reading.name


def test_a_probe_is_the_linear_map_that_it_says(settings: Settings) -> None:
    parts = [features_of(depth=2, images=n, seed=n, classes=3) for n in (50, 31, 29)]
    for part in parts:
        part.rows[-1, :, :3] += functional.one_hot(part.labels, 3)
    probe = train_probe(SplitFeatures(*parts), settings, num_classes=3)
    for part, right in ((parts[1], probe.val_top1 * 31), (parts[2], probe.correct)):
        said = (part.final_cls[0] @ probe.weight.T + probe.bias).argmax(dim=1)
        assert int((said == part.labels).sum()) == pytest.approx(right)
    assert (probe.lr, probe.total) == (0.3, 29)
    assert probe.weight_decay in (0.0, 0.1)
