"""The geometry of features: in how many directions they spread, and how alike two layers are.

Neither needs a label. All is computed in float64 from products of size `D x D`, so that memory does
not grow with the square of the number of images.

Dimension key: L = layers, N = images, D = width of a feature.
"""

import torch
from torch import Tensor

CONSTANT = 1e-12
"""Share of a layer's mean square that its variance must exceed: below it the layer says the same of
every image, up to the rounding of float32."""


def effective_rank(features: Tensor) -> float:
    """Return in how many directions features spread, counting faint directions for less.

    `exp(-sum_i p_i ln p_i)` with `p_i = s_i / sum_j s_j`, where `s` are the singular values of the
    features less their mean. It is the measure of Roy and Vetterli. RankMe is the same of the
    features as they are: their mean is then one direction more, often the largest one, which
    tells no image from another.

    Args:
        features: `(N, D)`, on any device.

    Returns:
        Between 1 and `min(N - 1, D)`; 0 where the features are the same for every image.

    References:
        Roy and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007.
        Garrido et al., "RankMe: Assessing the downstream performance of pretrained self-supervised
        representations by their rank", ICML 2023, https://arxiv.org/abs/2210.02885
    """
    centred = _centre(features)
    # Eigenvalues of the D x D product are squares of the singular values. What rounding makes of
    # those below 1e-8 of the largest one does not show in the sum.
    values = torch.linalg.eigvalsh(centred.T @ centred).clamp(min=0).sqrt()
    if not values.any():
        return 0.0
    shares = values / values.sum()
    return float(torch.special.entr(shares).sum().exp())


def linear_cka(layers: Tensor) -> list[list[float]]:
    """Return how alike each layer's features are to each other layer's: linear CKA.

    `|Y'X|^2 / (|X'X| |Y'Y|)` in Frobenius norms, where X and Y are `(N, D)` and centred. It is 1
    where one is the other rotated, mirrored and scaled. It is not 0 for unrelated features of few
    images, but about `D / (N + D)` where they spread in all directions.

    Args:
        layers: `(L, N, D)`, of the same images, on any device.

    Returns:
        L rows of L numbers in [0, 1], symmetric, with 1 on the diagonal; 0 in row and column of a
        layer that is the same for every image.

    References:
        Kornblith et al., "Similarity of Neural Network Representations Revisited", ICML 2019,
        https://arxiv.org/abs/1905.00414
    """
    centred = [_centre(layer) for layer in layers]
    products = torch.zeros(len(centred), len(centred), dtype=torch.float64)
    for row, x in enumerate(centred):
        for column, y in enumerate(centred[: row + 1]):
            products[row, column] = products[column, row] = (y.T @ x).square().sum()
    squares = products.diagonal()
    # Where a square is 0, so are the products.
    sizes = (squares[:, None] * squares).sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    alike = products / sizes
    found: list[list[float]] = alike.clamp(max=1).tolist()
    return found


def _centre(features: Tensor) -> Tensor:
    """Return features less their mean, `(N, D)`, float64; zeros where all images have the same."""
    exact = features.double()
    centred = exact - exact.mean(dim=0)
    if centred.square().sum() <= CONSTANT * exact.square().sum():
        return torch.zeros_like(centred)
    return centred
