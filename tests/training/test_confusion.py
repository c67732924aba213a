import torch

from training.confusion import count_confusions


def test_answers_are_counted_by_true_class() -> None:
    true = torch.tensor([0, 0, 0, 1, 1, 2])
    said = torch.tensor([0, 2, 2, 1, 0, 2])
    found = count_confusions("Probe", ["ant", "bee", "cat", "dog"], true, said)
    assert found.counts == [[1, 0, 2, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert (found.right, found.total) == (3, 6)
    assert found.frequent == [("ant", "cat", 2), ("bee", "ant", 1)]
    assert found.fits


def test_of_many_classes_the_most_frequent_mistakes_are_listed() -> None:
    names = [f"c{label}" for label in range(21)]
    said = torch.arange(21).roll(1)
    found = count_confusions("Probe", names, torch.arange(21), said)
    assert not found.fits
    assert found.frequent[:2] == [("c0", "c20", 1), ("c1", "c0", 1)]
    assert len(found.frequent) == 12
