"""Readers of frozen features: linear heads on every layer at once, and nearest neighbours.

Dimension key: L = layers, N = images, D = width of a feature, G = settings tried per layer,
C = classes.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from data.loaders import epoch_order
from training.feature_geometry import CONSTANT
from training.optim import learning_rate

MOMENTUM = 0.9
"""As in the linear evaluation of DINOv2 (Oquab et al. 2023)."""

VARIANCE_FLOOR = 1e-8
"""Added to every variance, relative to the layer's mean variance: nearly constant features are not
blown up, and a layer of small features is treated like one of large features."""

ROWS = 16
"""Matrix products get a multiple of as many rows: others take up to a quarter longer."""

LOGITS_PER_CHUNK = 2**24
"""Logits held at a time while scoring, so that memory does not grow with the dataset."""

SIMILARITIES_PER_CHUNK = 2**26
"""The same for the similarities between images: 256 MiB."""

Z_95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Trained linear heads, G per layer; they normalise the features that they are given.

    Attributes:
        weight: `(L, G, C, D)`, for standardised features.
        bias: `(L, G, C)`.
        mean: `(L, D)`, of the training features.
        scale: `(L, D)`, one over their standard deviation; 1 in a layer that is the same for all.
        grid: G pairs of learning rate and weight decay, in the order of the second axis.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    scale: Tensor
    grid: tuple[tuple[float, float], ...]

    def logits(self, features: Tensor) -> Tensor:
        """Return the logits of every head, `(L, G, N, C)`.

        Args:
            features: `(L, N, D)`, float32, not normalised, on the device of the heads.
        """
        standardised = (features - self.mean[:, None]) * self.scale[:, None]
        return torch.einsum("lnd,lgcd->lgnc", standardised, self.weight) + self.bias[:, :, None]

    def scores(
        self, features: Tensor, labels: Tensor, places: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return top-1 accuracy and mean loss of every head on these images.

        Args:
            features: `(L, N, D)`, float32, not normalised.
            labels: `(N,)`, int64.
            places: The one head of each of the L layers that is scored, as `choose` returns them,
                so that G is 1; None for all.

        Returns:
            top1: `(L, G)`, float64, fractions in [0, 1].
            loss: `(L, G)`, float64, cross-entropy in nats.
        """
        if places is not None:
            at = (range(len(self.weight)), list(places))
            one = replace(self, weight=self.weight[at][:, None], bias=self.bias[at][:, None])
            return one.scores(features, labels)
        _check_features(features, labels, num_classes=self.bias.shape[-1])
        top1 = torch.zeros(self.bias.shape[:2], dtype=torch.float64, device=self.bias.device)
        loss = torch.zeros_like(top1)
        chunk = max(1, LOGITS_PER_CHUNK // self.bias.numel())
        for start in range(0, len(labels), chunk):
            some = slice(start, start + chunk)
            logits = self.logits(features[:, some])
            wanted = labels[some].expand(logits.shape[:-1])
            top1 += (logits.argmax(dim=-1) == wanted).sum(dim=-1)
            log_shares = logits.log_softmax(dim=-1).gather(-1, wanted[..., None])[..., 0]
            loss -= log_shares.sum(dim=-1, dtype=torch.float64)
        return top1 / len(labels), loss / len(labels)

    def choose(self, val_features: Tensor, val_labels: Tensor) -> list[int]:
        """Return for each layer the head with the best top-1, of those the one of lowest loss.

        Args:
            val_features: `(L, N, D)`, of images that the heads were not trained on and that no
                quoted number comes from.
            val_labels: `(N,)`, int64.
        """
        top1, loss = self.scores(val_features, val_labels)
        best = []
        for layer_top1, layer_loss in zip(top1.tolist(), loss.tolist(), strict=True):
            # A head that diverged has no loss to compare.
            ranks = [
                (-share, nats) if math.isfinite(nats) else (math.inf, math.inf)
                for share, nats in zip(layer_top1, layer_loss, strict=True)
            ]
            best.append(ranks.index(min(ranks)))
        return best

    def folded(self, layer: int, g: int) -> tuple[Tensor, Tensor]:
        """Return one head as a plain linear map of features that are not normalised.

        Returns:
            weight: `(C, D)` and
            bias: `(C,)`, float32, such that `features @ weight.T + bias` are the head's logits.
        """
        weight = self.weight[layer, g].double() * self.scale[layer].double()
        bias = self.bias[layer, g].double() - weight @ self.mean[layer].double()
        return weight.float(), bias.float()


@torch.no_grad()
def train_heads(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    lrs: Sequence[float],
    weight_decays: Sequence[float],
    epochs: int,
    batch_size: int,
    seed: int,
) -> Heads:
    """Train a linear head for every layer, learning rate and weight decay, all in one pass.

    A layer that is the same for every image (the class token before it has seen any patch) is not
    trained on: its heads give each class the share that it has of one image more per class.

    Each head sees the same batches and learns what it would learn alone: softmax regression from
    zero by SGD with momentum and a cosine schedule. Features are standardised with the statistics
    of the whole training set, as by a batch norm without parameters (He et al. 2022, appendix A),
    so that one set of learning rates serves layers and networks of any scale.

    Args:
        features: `(L, N, D)`, float32, on any device; the computation stays there.
        labels: `(N,)`, int64 in `[0, C)`, on the same device.
        num_classes: C; a class may have no image.
        lrs: Learning rates to try.
        weight_decays: Weight decays to try with each of them; biases are exempt.
        epochs: Passes over the images.
        batch_size: Most images per step. An epoch is cut into as few equal batches as that allows;
            the images that remain, fewer than there are batches, are left out of that epoch.
        seed: Of the order of the images.

    Returns:
        Heads whose `grid` runs through `weight_decays` for each of `lrs`.

    Raises:
        ValueError: If shapes, dtypes or labels are not as above, or a sequence is empty.
    """
    _check_features(features, labels, num_classes=num_classes)
    grid = tuple(itertools.product(lrs, weight_decays))
    if not grid or epochs < 1 or batch_size < 1:
        raise ValueError(
            "train_heads needs at least one learning rate, weight decay, epoch and image per "
            f"batch, got {list(lrs)}, {list(weight_decays)}, {epochs} and {batch_size}."
        )
    mean, scale, varying = _statistics(features)
    # Nor would training tell what such a layer knows: it may blow rounding up to information.
    counts = labels.bincount(minlength=num_classes) + 1
    bias = (counts / counts.sum()).log().expand(len(features), len(grid), -1).clone()
    weight = features.new_zeros(*bias.shape, features.shape[2])
    if varying:
        weight[varying], bias[varying] = _descend(
            [features[layer] for layer in varying],
            mean[varying, None],
            scale[varying, None],
            functional.one_hot(labels, num_classes).to(features.dtype).T,
            grid,
            epochs=epochs,
            batch_size=batch_size,
            seed=seed,
        )
    return Heads(weight=weight, bias=bias, mean=mean, scale=scale, grid=grid)


def knn_accuracies(
    train_features: Tensor,
    train_labels: Tensor,
    features: Tensor,
    labels: Tensor,
    ks: Sequence[int],
) -> list[float]:
    """Return the top-1 of votes among the nearest training images by cosine similarity.

    Args:
        train_features: `(N, D)`, on any device.
        train_labels: `(N,)`, int64.
        features: `(M, D)`, of the images to be classified.
        labels: `(M,)`, their true classes.
        ks: How many neighbours vote, each with the same weight, in ascending order. They are
            looked for once.

    Returns:
        A fraction in [0, 1] for each of `ks`.

    Raises:
        ValueError: If `ks` is empty, not ascending, or not between 1 and N.
    """
    if not ks or list(ks) != sorted(ks) or not 1 <= ks[0] <= ks[-1] <= len(train_features):
        raise ValueError(
            f"feature_analysis.knn_ks must ascend between 1 and the number of training images, "
            f"{len(train_features)}, got {list(ks)}. Lower them, or raise transfer.labels."
        )
    known = functional.normalize(train_features.float(), dim=1)
    classes = int(train_labels.max()) + 1
    chunk = max(1, SIMILARITIES_PER_CHUNK // len(known))
    correct = [0] * len(ks)
    for some, wanted in zip(torch.split(features, chunk), torch.split(labels, chunk), strict=True):
        similar = functional.normalize(some.float(), dim=1) @ known.T
        nearest = train_labels[similar.topk(ks[-1], dim=1).indices]  # the nearest one first
        votes = nearest.new_zeros(len(some), classes)
        for place, (before, k) in enumerate(itertools.pairwise((0, *ks))):
            voters = nearest[:, before:k]
            votes.scatter_add_(1, voters, torch.ones_like(voters))
            # Of classes with as many votes, argmax takes the first.
            correct[place] += int((votes.argmax(dim=1) == wanted).sum())
    return [count / len(labels) for count in correct]


def wilson_interval(correct: int, total: int, z: float = Z_95) -> tuple[float, float]:
    """Return the 95 % confidence interval of a share of `correct` out of `total` images.

    It says how far chance in the choice of test images may carry the share; the spread between
    seeds comes on top.

    Args:
        correct: In [0, total].
        total: At least 1.
        z: Quantile of the normal distribution, for another confidence than 95 %.

    Returns:
        Lower and upper end, fractions in [0, 1].

    Raises:
        ValueError: If `total` is not positive, or `correct` is not between 0 and `total`.

    References:
        Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    if not 0 <= correct <= total or total < 1:
        raise ValueError(
            f"wilson_interval needs 0 <= correct <= total and a positive total, got {correct} "
            f"and {total}."
        )
    share = correct / total
    shrink = 1 + z**2 / total
    centre = (share + z**2 / (2 * total)) / shrink
    half = z / shrink * math.sqrt(share * (1 - share) / total + (z / (2 * total)) ** 2)
    return max(0.0, centre - half), min(1.0, centre + half)


def _statistics(features: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """Return mean and scale as in `Heads`, and which layers vary."""
    variance, mean = torch.var_mean(features, dim=1, correction=0)
    total = variance.sum(dim=1)
    constant = total <= CONSTANT * (total + mean.square().sum(dim=1))
    floor = VARIANCE_FLOOR * variance.mean(dim=1, keepdim=True)
    scale = (variance + floor).rsqrt().masked_fill(constant[:, None], 1.0)
    return mean, scale, (~constant).nonzero()[:, 0].tolist()


def _descend(
    layers: Sequence[Tensor],
    mean: Tensor,
    scale: Tensor,
    one_hot: Tensor,
    grid: Sequence[tuple[float, float]],
    *,
    epochs: int,
    batch_size: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Train the heads of layers that vary; see `train_heads`.

    Args:
        layers: L times `(N, D)`.
        mean: `(L, 1, D)`.
        scale: `(L, 1, D)`.
        one_hot: Wanted shares, `(C, N)`.
        grid: G pairs of learning rate and weight decay.
        epochs: As there.
        batch_size: As there.
        seed: As there.

    Returns:
        weight: `(L, G, C, D)`, for standardised features.
        bias: `(L, G, C)`.
    """
    num_classes, num_images = one_hot.shape
    by_head = (len(layers), num_classes, len(grid))
    steps_per_epoch = math.ceil(num_images / batch_size)
    batch_size = num_images // steps_per_epoch
    num_rows = math.ceil(batch_size / ROWS) * ROWS

    # Heads side by side, (L, C*G, D+1), so that one matrix product per layer serves all of them;
    # class by class, because a softmax over ten neighbours in memory takes ten times as long. The
    # last weight is the bias: that of a feature that is always 1.
    heads = mean.new_zeros(len(layers), num_classes * len(grid), mean.shape[2] + 1)
    velocity = torch.zeros_like(heads)
    lr, decay = (
        heads.new_tensor(values).repeat(num_classes)[:, None].repeat(1, heads.shape[2])
        for values in zip(*grid, strict=True)
    )
    decay[:, -1] = 0

    # Every step uses the same memory. Rows beyond the batch are zeros: nothing is learned of them.
    taken = heads.new_empty(len(layers), batch_size, mean.shape[2])
    x = heads.new_zeros(len(layers), num_rows, heads.shape[2])
    x[:, :batch_size, -1] = 1
    wanted = heads.new_zeros(num_classes, 1, num_rows)
    logits = heads.new_empty(len(layers), num_classes * len(grid), num_rows)
    errors = torch.empty_like(logits)
    logits_by_class, errors_by_class = (
        each.view(len(layers), num_classes, -1) for each in (logits, errors)
    )
    errors_by_head = errors.view(*by_head, num_rows)

    orders = _batches(num_images, steps_per_epoch, epochs=epochs, seed=seed)
    for step, rows in enumerate(orders):
        rows = rows.to(heads.device)
        for layer, out in zip(layers, taken, strict=True):
            torch.index_select(layer, 0, rows, out=out)
        torch.sub(taken, mean, out=x[:, :batch_size, :-1]).mul_(scale)
        wanted[:, 0, :batch_size] = one_hot[:, rows]
        torch.bmm(heads, x.mT, out=logits)
        torch.softmax(logits_by_class, dim=1, out=errors_by_class)
        # The gradient of the cross-entropy of each head with respect to its logits.
        errors_by_head.sub_(wanted)
        velocity.baddbmm_(errors, x, beta=MOMENTUM, alpha=1 / batch_size).addcmul_(heads, decay)
        share = learning_rate(
            step, total_steps=epochs * steps_per_epoch, warmup_steps=0, peak_lr=1.0
        )
        heads.addcmul_(velocity, lr, value=-share)

    trained = heads.view(*by_head, -1).transpose(1, 2)
    return trained[..., :-1], trained[..., -1]


def _batches(num_images: int, steps_per_epoch: int, *, epochs: int, seed: int) -> Iterator[Tensor]:
    batch_size = num_images // steps_per_epoch
    for epoch in range(epochs):
        order = torch.from_numpy(epoch_order(num_images, seed, epoch))
        yield from order[: batch_size * steps_per_epoch].view(steps_per_epoch, batch_size)


def _check_features(features: Tensor, labels: Tensor, *, num_classes: int) -> None:
    if features.ndim != 3 or features.dtype != torch.float32 or not features.numel():
        raise ValueError(
            f"Features must be float32 of shape (layers, images, width), none of them 0, "
            f"got {features.dtype} {tuple(features.shape)}."
        )
    if labels.shape != features.shape[1:2] or labels.dtype != torch.int64:
        raise ValueError(
            f"Labels must be int64, one for each of the {features.shape[1]} images, "
            f"got {labels.dtype} {tuple(labels.shape)}."
        )
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"Labels must be in [0, {num_classes}), the classes of the head, got "
            f"{int(labels.min())} to {int(labels.max())}."
        )
