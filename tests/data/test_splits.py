from collections.abc import Callable

import numpy as np
import pytest
from sklearn.model_selection import train_test_split

from data.prepared import PreparedData, PreparedSplit
from data.randomness import uniform
from data.records import DatasetError
from data.splits import Subset, label_counts, split, take_labelled, train_size

MakePrepared = Callable[..., PreparedData]


def make_subset(labels: list[int] | None, count: int = 0) -> Subset:
    array = None if labels is None else np.asarray(labels, dtype=np.int64)
    images = np.zeros((count if array is None else len(array), 1, 1, 3), dtype=np.uint8)
    return Subset(PreparedSplit([images], array), np.arange(len(images), dtype=np.int64))


def test_parts_are_disjoint_and_complete(make_prepared: MakePrepared) -> None:
    parts = split(make_prepared(103), val_fraction=0.1, test_fraction=0.2, seed=0)
    assert (len(parts.test), len(parts.val), len(parts.train)) == (21, 9, 73)
    together = np.concatenate([parts.train.indices, parts.val.indices, parts.test.indices])
    assert sorted(together.tolist()) == list(range(103))


def test_the_sources_own_test_images_are_the_test_split(make_prepared: MakePrepared) -> None:
    prepared = make_prepared(50, 7)
    parts = split(prepared, val_fraction=0.1, test_fraction=0.5, seed=0)
    assert parts.test.split is prepared.test
    assert parts.test.indices.tolist() == list(range(7))
    assert len(parts.train) + len(parts.val) == 50


def test_parts_are_stratified_like_scikit_learns(make_prepared: MakePrepared) -> None:
    labels = np.repeat([0, 1, 2], [150, 40, 11])
    prepared = PreparedData(
        train=PreparedSplit([np.zeros((201, 1, 1, 3), dtype=np.uint8)], labels),
        test=None,
        fingerprint="",
        class_names=["a", "b", "c"],
    )
    parts = split(prepared, val_fraction=0.2, test_fraction=0.1, seed=4)
    rest, test = train_test_split(labels, test_size=0.1, stratify=labels, random_state=0)
    _, val = train_test_split(rest, test_size=0.2, stratify=rest, random_state=0)
    for ours, theirs in ((parts.test.labels, test), (parts.val.labels, val)):
        assert ours is not None
        assert len(ours) == len(theirs)
        assert np.abs(np.bincount(ours) - np.bincount(theirs)).max() <= 1


def test_a_class_with_one_image_stays_in_training() -> None:
    prepared = PreparedData(
        train=make_subset([0] * 30 + [1]).split, test=None, fingerprint="", class_names=["a", "b"]
    )
    parts = split(prepared, val_fraction=0.1, test_fraction=0.1, seed=0)
    assert parts.train.labels is not None
    assert parts.train.labels.tolist().count(1) == 1


def test_the_division_depends_on_the_seed_alone(make_prepared: MakePrepared) -> None:
    prepared = make_prepared(60)
    first = split(prepared, val_fraction=0.1, test_fraction=0.1, seed=1)
    again = split(prepared, val_fraction=0.1, test_fraction=0.1, seed=1)
    other = split(prepared, val_fraction=0.1, test_fraction=0.1, seed=2)
    assert first.val.indices.tolist() == again.val.indices.tolist()
    assert first.val.indices.tolist() != other.val.indices.tolist()


def test_the_division_is_the_same_on_every_machine(make_prepared: MakePrepared) -> None:
    parts = split(make_prepared(40), val_fraction=0.1, test_fraction=0.1, seed=0)
    assert parts.test.indices.tolist() == [0, 19, 20, 31]
    assert parts.val.indices.tolist() == [6, 13, 21, 32]


def test_images_without_labels_are_divided_too(make_prepared: MakePrepared) -> None:
    parts = split(make_prepared(40, classes=None), val_fraction=0.1, test_fraction=0.1, seed=0)
    assert (len(parts.test), len(parts.val), len(parts.train)) == (4, 4, 32)
    assert parts.train.labels is None


def test_a_subset_gathers_by_position(make_prepared: MakePrepared) -> None:
    prepared = make_prepared(9)
    subset = Subset(prepared.train, np.array([2, 5, 7]))
    assert subset.labels is not None
    assert subset.labels.tolist() == [2, 2, 1]
    expected = prepared.train.gather(np.array([7, 2]))
    assert np.array_equal(subset.gather(np.array([2, 0])), expected)


@pytest.mark.parametrize("classes", [1, 3, 300])
def test_the_parts_are_those_of_going_through_class_by_class(classes: int) -> None:
    """The plain form, which takes too long with a thousand classes and a million images."""
    labels = np.random.default_rng(0).integers(0, classes, 500)
    subset = make_subset(labels.tolist())
    chance = uniform(7, 0, subset.indices, "split val")
    share = np.empty(500)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        members = members[np.argsort(chance[members], kind="stable")]
        share[members] = (np.arange(len(members)) + chance[members]) / len(members)
    order = np.argsort(share, kind="stable")
    prepared = PreparedData(train=subset.split, test=subset.split, fingerprint="", class_names=None)
    parts = split(prepared, val_fraction=0.1, test_fraction=0.1, seed=7)
    assert parts.val.indices.tolist() == sorted(order[:50].tolist())
    assert parts.train.indices.tolist() == sorted(order[50:].tolist())


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1])
def test_a_fraction_that_leaves_nothing_is_refused(
    make_prepared: MakePrepared, fraction: float
) -> None:
    with pytest.raises(DatasetError, match=r"data\.val_fraction must leave images"):
        split(make_prepared(10, 3), val_fraction=fraction, test_fraction=0.1, seed=0)
    with pytest.raises(DatasetError, match=r"data\.test_fraction must leave images"):
        split(make_prepared(10), val_fraction=0.1, test_fraction=fraction, seed=0)


@pytest.mark.parametrize("seed", range(5))
def test_labelled_selections_are_nested_and_in_proportion(seed: int) -> None:
    subset = make_subset([0] * 60 + [1] * 30 + [2] * 10)
    previous: set[int] = set()
    for count in range(3, 101):
        chosen = take_labelled(subset, count, seed)
        assert len(chosen) == count
        assert chosen.labels is not None
        sizes = np.bincount(chosen.labels, minlength=3)
        assert sizes.min() >= 1, "every class is there"
        assert np.abs(sizes - count * np.array([0.6, 0.3, 0.1])).max() <= 1.5
        assert previous < set(chosen.indices.tolist())
        previous = set(chosen.indices.tolist())


def test_other_seeds_select_other_images() -> None:
    subset = make_subset([0, 1] * 50)
    chosen = {tuple(take_labelled(subset, 10, seed).indices.tolist()) for seed in range(8)}
    assert len(chosen) == 8


def test_no_count_means_all_labels() -> None:
    subset = make_subset([0, 1, 1])
    assert take_labelled(subset, None, seed=0).indices.tolist() == [0, 1, 2]


@pytest.mark.parametrize("count", [-1, 0, 2, 6])
def test_an_impossible_number_of_labels_is_refused(count: int) -> None:
    with pytest.raises(DatasetError, match=rf"transfer\.labels must be from 3 .* to 5 .*{count}\."):
        take_labelled(make_subset([0, 1, 2, 2, 2]), count, seed=0)


def test_missing_labels_are_refused() -> None:
    with pytest.raises(DatasetError, match=r"no labels\. Set transfer\.source"):
        take_labelled(make_subset(None, count=5), 3, seed=0)


@pytest.mark.parametrize("fractions", [(0.1, 0.2), (0.07, 0.07), (0.33, 0.01)])
@pytest.mark.parametrize("images", [40, 100, 103])
def test_what_is_left_to_train_on_is_known_from_the_counts(
    make_prepared: MakePrepared, fractions: tuple[float, float], images: int
) -> None:
    val, test = fractions
    for counts in ({"train": images}, {"train": images, "test": 7}):
        prepared = make_prepared(*counts.values())
        parts = split(prepared, val_fraction=val, test_fraction=test, seed=0)
        found = train_size(counts, val_fraction=val, test_fraction=test)
        assert found == len(parts.train)


def test_fractions_of_the_labels_are_counts_with_an_image_of_each_class() -> None:
    assert label_counts([0.01, 0.05, 0.1, 0.5, 1.0], 3000, 10) == {
        30: 0.01,
        150: 0.05,
        300: 0.1,
        1500: 0.5,
        3000: 1.0,
    }
    assert label_counts([0.001, 0.003, 0.01], 3000, 10) == {10: 0.001, 30: 0.01}, "once each"
    assert label_counts([0.5, 1.0], 7, 10) == {7: 0.5}, "never more than there are"


def test_the_subsets_of_a_curve_are_nested_and_hold_every_class() -> None:
    labels = np.repeat(np.arange(10), [30, 60, 90, 10, 10, 20, 200, 5, 70, 5])
    subset = make_subset(np.random.default_rng(3).permutation(labels).tolist())
    smaller: set[int] = set()
    for count in label_counts([0.01, 0.05, 0.1, 0.5, 1.0], len(subset), 10):
        taken = take_labelled(subset, count, seed=4)
        assert len(taken) == count
        assert taken.labels is not None
        assert set(taken.labels.tolist()) == set(range(10))
        assert smaller < set(taken.indices.tolist())
        smaller = set(taken.indices.tolist())
    assert len(smaller) == len(subset)
