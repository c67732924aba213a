import dataclasses
import functools
import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from training.probes import Heads, knn_accuracies, train_heads, wilson_interval
from training.recipes import LinearProbeSettings

RECIPE: dict[str, Any] = {
    "lrs": (0.01, 0.1),
    "weight_decays": (0.0, 1e-3, 1e-2),
    "epochs": 7,
    "batch_size": 11,
    "seed": 3,
}


def blobs(
    num_images: int,
    *,
    width: int,
    num_classes: int,
    num_layers: int = 1,
    distance: float = 1.0,
    draw: int = 0,
) -> tuple[Tensor, Tensor]:
    """Gaussian blobs with correlated directions of very different scale, far from the origin.

    `draw` selects other images of the same blobs.
    """
    places = torch.Generator().manual_seed(0)
    centres = distance * torch.randn(num_layers, num_classes, width, generator=places)
    mixing = torch.randn(num_layers, width, width, generator=places) / width**0.5
    scales = torch.logspace(-1, 1, width)
    images = torch.Generator().manual_seed(1 + draw)
    labels = torch.randint(num_classes, (num_images,), generator=images)
    noise = torch.randn(num_layers, num_images, width, generator=images)
    return (centres[:, labels] + noise) @ mixing * scales + 3, labels


def sgd_by_torch(
    features: Tensor, labels: Tensor, *, lr: float, weight_decay: float, steps: int
) -> nn.Linear:
    """Full-batch softmax regression with PyTorch's own norm, loss, optimiser and schedule."""
    head = nn.Linear(features.shape[1], int(labels.max()) + 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    norm = nn.BatchNorm1d(features.shape[1], affine=False, eps=1e-12)
    groups = [
        {"params": [head.weight], "weight_decay": weight_decay},
        {"params": [head.bias], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(norm(features)), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return head


def test_heads_are_what_torch_trains_one_by_one() -> None:
    features, labels = blobs(37, width=5, num_classes=3, num_layers=2)
    heads = train_heads(features, labels, 3, **{**RECIPE, "batch_size": 37, "epochs": 13})
    # The floor under the variance makes up a relative difference of about 1e-5.
    assert_close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)
    for layer in range(2):
        for g, (lr, weight_decay) in enumerate(heads.grid):
            alone = sgd_by_torch(
                features[layer], labels, lr=lr, weight_decay=weight_decay, steps=13
            )
            assert_close(heads.weight[layer, g], alone.weight.detach())
            assert_close(heads.bias[layer, g], alone.bias.detach())


def test_a_head_trained_alone_is_the_one_trained_among_others() -> None:
    features, labels = blobs(37, width=5, num_classes=3, num_layers=2)
    together = train_heads(features, labels, 3, **RECIPE)
    assert together.weight.shape == (2, 6, 3, 5)
    assert together.bias.shape == (2, 6, 3)
    assert together.grid[4] == (0.1, 1e-3)
    for layer in range(2):
        for g, (lr, weight_decay) in enumerate(together.grid):
            recipe = {**RECIPE, "lrs": [lr], "weight_decays": [weight_decay]}
            alone = train_heads(features[layer : layer + 1], labels, 3, **recipe)
            torch.testing.assert_close(together.weight[layer, g], alone.weight[0, 0])
            torch.testing.assert_close(together.bias[layer, g], alone.bias[0, 0])


def test_features_are_standardised_with_all_training_images() -> None:
    features, labels = blobs(37, width=5, num_classes=3)
    heads = train_heads(features, labels, 3, **RECIPE)
    witness = StandardScaler().fit(features[0].numpy().astype(np.float64))
    np.testing.assert_allclose(heads.mean[0].numpy(), witness.mean_, rtol=1e-5)
    np.testing.assert_allclose(1 / heads.scale[0].numpy(), witness.scale_, rtol=1e-3)


def test_the_scale_of_the_features_does_not_matter() -> None:
    features, labels = blobs(37, width=5, num_classes=3)
    heads = train_heads(features, labels, 3, **RECIPE)
    small = train_heads(features * 0.1, labels, 3, **RECIPE)
    torch.testing.assert_close(heads.weight, small.weight, rtol=1e-3, atol=1e-4)


def test_a_folded_head_gives_the_same_logits() -> None:
    features, labels = blobs(37, width=5, num_classes=3, num_layers=2)
    heads = train_heads(features, labels, 3, **RECIPE)
    logits = heads.logits(features)
    assert logits.shape == (2, 6, 37, 3)
    for layer in range(2):
        for g in range(6):
            weight, bias = heads.folded(layer, g)
            assert (weight.shape, bias.shape) == ((3, 5), (3,))
            torch.testing.assert_close(
                features[layer] @ weight.T + bias, logits[layer, g], rtol=1e-4, atol=1e-4
            )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_images", "width"), [(100, 128), (500, 512), (2500, 128)], ids=["few", "wide", "many"]
)
def test_the_default_grid_does_as_well_as_logistic_regression(num_images: int, width: int) -> None:
    recipe = LinearProbeSettings()
    data = {"width": width, "num_classes": 5, "distance": 0.3}
    features, labels = blobs(num_images, **data)  # type: ignore[arg-type]
    val_features, val_labels = blobs(400, **data, draw=1)  # type: ignore[arg-type]
    test_features, test_labels = blobs(2000, **data, draw=2)  # type: ignore[arg-type]

    heads = train_heads(
        features,
        labels,
        5,
        lrs=recipe.lrs,
        weight_decays=recipe.weight_decays,
        epochs=recipe.epochs,
        batch_size=recipe.batch_size,
        seed=0,
    )
    top1, loss = heads.scores(test_features, test_labels)
    ours = top1[0, heads.choose(val_features, val_labels)[0]].item()

    scaler = StandardScaler().fit(features[0].numpy())
    x, x_val, x_test = (
        scaler.transform(part[0].numpy()) for part in (features, val_features, test_features)
    )
    theirs = max(
        (fitted.score(x_val, val_labels.numpy()), fitted.score(x_test, test_labels.numpy()))
        for c in (1e-3, 1e-2)
        for fitted in [LogisticRegression(C=c, max_iter=500).fit(x, labels.numpy())]
    )[1]
    assert torch.isfinite(loss).all(), "a learning rate of the grid diverges"
    assert 0.3 < theirs < 0.999, "too easy or too hard to compare"
    # Two standard errors of the difference on 2000 images, at most.
    assert ours > theirs - 0.03


def test_separable_blobs_are_separated() -> None:
    features, labels = blobs(60, width=7, num_classes=3, distance=9.0)
    test_features, test_labels = blobs(300, width=7, num_classes=3, distance=9.0, draw=1)
    top1, _ = train_heads(features, labels, 3, **{**RECIPE, "epochs": 50}).scores(
        test_features, test_labels
    )
    witness = LogisticRegression(max_iter=1000).fit(features[0].numpy(), labels.numpy())
    assert witness.score(test_features[0].numpy(), test_labels.numpy()) == 1.0
    assert torch.equal(top1, torch.ones(1, 6, dtype=torch.float64))


def test_the_same_seed_gives_the_same_bytes_and_another_other_batches() -> None:
    features, labels = blobs(37, width=5, num_classes=3)
    first, again = (train_heads(features, labels, 3, **RECIPE) for _ in range(2))
    other = train_heads(features, labels, 3, **{**RECIPE, "seed": 4})
    assert torch.equal(first.weight, again.weight)
    assert not torch.equal(first.weight, other.weight)


@pytest.mark.parametrize(
    ("num_images", "expected"), [(37, 4 * [9]), (11, [11]), (3, [3]), (23, 3 * [7])], ids=str
)
def test_an_epoch_is_cut_into_equal_batches(
    monkeypatch: pytest.MonkeyPatch, num_images: int, expected: list[int]
) -> None:
    sizes = []
    product = torch.bmm

    def spy(heads: Tensor, x: Tensor, *, out: Tensor) -> Tensor:
        sizes.append(int(x[0, -1].sum()))  # the entries that are always 1
        assert x.shape[2] % 16 == 0
        return product(heads, x, out=out)

    monkeypatch.setattr(torch, "bmm", spy)
    features, labels = blobs(num_images, width=5, num_classes=3)
    train_heads(features, labels, 3, **{**RECIPE, "epochs": 2})
    assert sizes == 2 * expected


def test_a_layer_that_is_the_same_for_every_image_guesses() -> None:
    features, labels = blobs(50, width=5, num_classes=2, num_layers=2)
    features[0] = torch.linspace(-0.7, 0.3, 5) * (1 + 1e-7 * torch.randn(50, 1))  # as rounding does
    heads = train_heads(features, labels, 2, **RECIPE)
    majority = max(labels.bincount().tolist()) / 50
    top1, loss = heads.scores(features, labels)
    assert top1[0].max() <= majority < top1[1].max()
    assert loss[0].max() < math.log(2) + 0.01
    assert not heads.weight[0].any()
    torch.testing.assert_close(
        heads.bias[0].softmax(dim=-1).mean(dim=0), labels.bincount() / 50, rtol=0.02, atol=0
    )
    weight, bias = heads.folded(0, 0)
    assert torch.isfinite(weight).all()
    assert torch.isfinite(bias).all()


def one_feature_heads(biases: list[list[float]]) -> Heads:
    """Heads of one layer that ignore the image and answer by their bias."""
    bias = torch.tensor([biases])
    return Heads(
        weight=torch.zeros(1, *bias.shape[1:], 1),
        bias=bias,
        mean=torch.zeros(1, 1),
        scale=torch.ones(1, 1),
        grid=tuple((0.1, 0.0) for _ in biases),
    )


def test_scores_by_hand() -> None:
    heads = one_feature_heads([[0.0, math.log(3)], [math.log(4), 0.0]])
    top1, loss = heads.scores(torch.zeros(1, 3, 1), torch.tensor([1, 1, 0]))
    assert top1.tolist() == [pytest.approx([2 / 3, 1 / 3])]
    expected = [
        -(2 * math.log(3 / 4) + math.log(1 / 4)) / 3,
        -(2 * math.log(1 / 5) + math.log(4 / 5)) / 3,
    ]
    assert loss.tolist() == [pytest.approx(expected, rel=1e-6)]


def test_only_the_chosen_heads_are_scored() -> None:
    features, labels = blobs(37, width=5, num_classes=3, num_layers=2)
    heads = train_heads(features, labels, 3, **RECIPE)
    for found, of_all in zip(
        heads.scores(features, labels, [4, 1]), heads.scores(features, labels), strict=True
    ):
        torch.testing.assert_close(found, of_all[range(2), [4, 1]][:, None])


def test_scores_do_not_depend_on_how_many_images_are_scored_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    features, labels = blobs(37, width=5, num_classes=3, num_layers=2)
    heads = train_heads(features, labels, 3, **RECIPE)
    whole = heads.scores(features, labels)
    witness = (heads.logits(features).argmax(dim=-1) == labels).double().mean(dim=-1)
    monkeypatch.setattr("training.probes.LOGITS_PER_CHUNK", 5 * heads.bias.numel())
    pieces = heads.scores(features, labels)
    torch.testing.assert_close(whole[0], witness)
    torch.testing.assert_close(whole, pieces)


def test_the_choice_is_the_best_on_val_then_the_most_certain_of_the_right() -> None:
    wrong, right, sure, diverged = [2.0, 0.0], [0.0, 1.0], [0.0, 2.0], [math.nan, math.inf]
    labels = torch.tensor([1, 1, 1, 0])
    features = torch.zeros(1, 4, 1)
    assert one_feature_heads([wrong, right]).choose(features, labels) == [1]
    # Right more often, though its loss (2.25) is the larger one (0.72).
    assert one_feature_heads([[0.1, 0.0], [0.0, 9.0]]).choose(features, labels) == [1]
    # Right three times out of four, the loss of `right` (0.56) is smaller than that of `sure`.
    assert one_feature_heads([sure, right, right]).choose(features, labels) == [1]
    assert one_feature_heads([diverged, wrong]).choose(features, 0 * labels) == [1]


def test_each_layer_has_a_choice_of_its_own() -> None:
    heads = one_feature_heads([[0.0, 1.0], [1.0, 0.0]])
    doubled = dataclasses.replace(
        heads,
        weight=heads.weight.repeat(2, 1, 1, 1),
        bias=torch.stack([heads.bias[0], heads.bias[0].flip(0)]),
        mean=heads.mean.repeat(2, 1),
        scale=heads.scale.repeat(2, 1),
    )
    assert doubled.choose(torch.zeros(2, 1, 1), torch.tensor([1])) == [0, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": torch.zeros(37, 5)}, r"shape \(layers, images, width\).* got .* \(37, 5\)"),
        ({"features": torch.zeros(1, 37, 5, dtype=torch.float16)}, "got torch.float16"),
        ({"features": torch.zeros(1, 0, 5), "labels": torch.zeros(0).long()}, "none of them 0"),
        ({"labels": torch.zeros(36).long()}, r"one for each of the 37 images, .* \(36,\)"),
        ({"labels": torch.zeros(37)}, "must be int64, .* got torch.float32"),
        ({"labels": torch.full((37,), 3)}, r"in \[0, 3\), .* got 3 to 3"),
        ({"lrs": []}, r"at least one learning rate, .* got \[\]"),
        ({"epochs": 0}, "0 and 11"),
    ],
    ids=range(8),
)
def test_what_cannot_be_trained_on_is_explained(changes: dict[str, Any], message: str) -> None:
    features, labels = blobs(37, width=5, num_classes=3)
    arguments = {"features": features, "labels": labels, "num_classes": 3, **RECIPE, **changes}
    with pytest.raises(ValueError, match=message):
        train_heads(**arguments)


def test_nearest_neighbours_vote_by_angle_not_by_distance() -> None:
    train = torch.tensor([[1.0, 0.0], [9.0, 1.0], [0.0, 1.0], [1.0, 9.0], [0.1, 0.2]])
    train_labels = torch.tensor([0, 0, 1, 1, 1])
    # Near the last training image in distance, along the first two in angle.
    found = torch.tensor([[0.2, 0.01], [0.0, 7.0], [5.0, 4.9]])
    assert knn_accuracies(train, train_labels, found, torch.tensor([0, 1, 1]), [3]) == [1.0]
    assert knn_accuracies(train, train_labels, found, torch.tensor([1, 1, 1]), [3]) == [2 / 3]


def test_nearest_neighbours_agree_with_a_sort_by_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = blobs(61, width=5, num_classes=3)
    queries, truth = blobs(23, width=5, num_classes=3, draw=1)
    a, b = features[0].double().numpy(), queries[0].double().numpy()
    cosine = (b @ a.T) / np.linalg.norm(b, axis=1)[:, None] / np.linalg.norm(a, axis=1)
    nearest = labels.numpy()[np.argsort(-cosine, axis=1)]
    ks, expected = [1, 2, 7, 7, 40], []
    for k in ks:
        votes = np.array([np.bincount(row[:k], minlength=3).argmax() for row in nearest])
        expected.append((votes == truth.numpy()).mean())
    assert len(set(expected)) >= 3, "draw others, or this test shows little"
    assert all(0.4 < share < 1 for share in expected)
    found = knn_accuracies(features[0], labels, queries[0], truth, ks)
    assert found == pytest.approx(expected)
    monkeypatch.setattr("training.probes.SIMILARITIES_PER_CHUNK", 4 * 61)
    assert knn_accuracies(features[0], labels, queries[0], truth, ks) == found


@pytest.mark.parametrize("ks", [[], [0, 3], [5, 6], [3, 1, 4]], ids=str)
def test_more_neighbours_than_images_are_refused(ks: list[int]) -> None:
    features, labels = torch.eye(5), torch.arange(5)
    with pytest.raises(ValueError, match=r"between 1 and .* 5, got \[.*\]. Lower them"):
        knn_accuracies(features, labels, features, labels, ks)


@pytest.mark.parametrize(
    ("correct", "total", "expected"),
    [
        # Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
    ],
)
def test_wilson_intervals_are_the_published_ones(
    correct: int, total: int, expected: tuple[float, float]
) -> None:
    assert wilson_interval(correct, total) == pytest.approx(expected, abs=5e-5)


def test_wilson_intervals_are_symmetric_and_stay_within_bounds() -> None:
    lower, upper = wilson_interval(3, 11)
    assert wilson_interval(8, 11) == pytest.approx((1 - upper, 1 - lower))
    assert wilson_interval(5, 5)[1] == 1.0


@pytest.mark.parametrize(("correct", "total"), [(3, 2), (-1, 2), (0, 0)])
def test_impossible_counts_are_refused(correct: int, total: int) -> None:
    with pytest.raises(ValueError, match=f"got {correct} and {total}"):
        wilson_interval(correct, total)
