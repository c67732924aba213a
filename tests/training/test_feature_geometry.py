import numpy as np
import pytest
import torch
from torch import Tensor

from training.feature_geometry import effective_rank, linear_cka


def cloud(images: int, width: int, rng: torch.Generator) -> Tensor:
    """Features with directions of very different size, far from the origin."""
    mixing = torch.randn(width, width, generator=rng)
    scales = torch.logspace(-2, 1, width)
    return (torch.randn(images, width, generator=rng) * scales) @ mixing + 30


def rotation(width: int, rng: torch.Generator) -> Tensor:
    found: Tensor = torch.linalg.qr(torch.randn(width, width, generator=rng))[0]
    return found


@pytest.mark.parametrize("images", [41, 5], ids=["more than the width", "fewer"])
def test_the_rank_is_that_of_numpys_singular_values(images: int, rng: torch.Generator) -> None:
    features = cloud(images, 7, rng)
    exact = features.double().numpy()
    singular = np.linalg.svd(exact - exact.mean(axis=0), compute_uv=False)
    shares = singular[singular > 1e-9] / singular.sum()
    assert len(shares) == min(images - 1, 7)
    expected = np.exp(-(shares * np.log(shares)).sum())
    assert 1.5 < expected < len(shares) - 0.5, "too easy"
    assert effective_rank(features) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("directions", [1, 3, 6])
def test_equal_directions_count_one_each(directions: int, rng: torch.Generator) -> None:
    """The corners of a cross have the same spread along each of its axes, and no mean."""
    axes = torch.eye(6)[:directions]
    features = torch.cat([axes, -axes]) @ rotation(6, rng) + 4
    assert effective_rank(features) == pytest.approx(directions, rel=1e-5)


def test_the_mean_of_the_features_is_no_direction(rng: torch.Generator) -> None:
    features = cloud(41, 7, rng)
    assert effective_rank(features + 100) == pytest.approx(effective_rank(features), rel=1e-4)


def test_cka_is_the_formula_of_kernels_between_images(rng: torch.Generator) -> None:
    """As first defined: by the N x N kernels, centred by a matrix."""
    layers = torch.stack([cloud(23, 7, rng) for _ in range(3)])
    layers[1:] += 0.4 * layers[0]
    centring = np.eye(23) - 1 / 23
    kernels = [centring @ x @ x.T @ centring for x in layers.double().numpy()]
    expected = [
        [(k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum()) for m in kernels] for k in kernels
    ]
    between = (expected[0][1], expected[0][2], expected[1][2])
    assert len({round(share, 2) for share in between}) == 3
    assert all(0.01 < share < 0.95 for share in between), "too easy"
    assert np.array(linear_cka(layers)) == pytest.approx(np.array(expected), rel=1e-6)


def test_layers_that_are_turned_scaled_and_moved_are_the_same(rng: torch.Generator) -> None:
    features = cloud(41, 7, rng)
    turned = 0.03 * features @ rotation(7, rng) - 8
    (one, alike), (same, other) = linear_cka(torch.stack([features, turned]))
    assert one == other == 1.0
    assert alike == same == pytest.approx(1, abs=1e-4)
    even = torch.randn(41, 7, generator=rng)
    stretched = even @ torch.diag(torch.logspace(0, 2, 7))
    assert linear_cka(torch.stack([even, stretched]))[0][1] < 0.9


def test_layers_of_independent_directions_share_nothing() -> None:
    signs = torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, -1.0], [-1.0, 1.0, -1.0], [-1.0, -1.0, 1.0]])
    layers = signs.T[:, :, None]  # orthogonal columns, one per layer
    assert linear_cka(layers) == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]


def test_a_layer_that_says_the_same_of_every_image_has_no_direction_and_no_likeness(
    rng: torch.Generator,
) -> None:
    constant = torch.linspace(-0.7, 30.3, 7).expand(41, 7)
    rounding = 1 + 1e-7 * torch.randn(41, 7, generator=rng)
    for same in (constant, constant * rounding, torch.zeros(41, 7)):
        assert effective_rank(same) == 0
        layers = torch.stack([cloud(41, 7, rng), same, same])
        assert linear_cka(layers) == [[1, 0, 0], [0, 0, 0], [0, 0, 0]]
    small = 1 + 1e-4 * torch.randn(41, 7, generator=rng)
    assert effective_rank(small) > 4, "small is not constant"
