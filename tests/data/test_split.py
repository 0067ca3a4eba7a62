"""The split is stratified, disjoint, complete, exact in size and the same for a seed."""

import pytest
import torch

from project.data import stratified_split


@pytest.mark.parametrize("fraction", [0.0, 1 / 12, 0.25, 0.9])
def test_laws(fraction: float) -> None:
    labels = torch.randint(0, 7, (1000,), generator=torch.Generator().manual_seed(3))
    train, val = stratified_split(labels, fraction, seed=1)
    assert torch.equal(torch.cat([train, val]).sort().values, torch.arange(1000))
    assert len(val) == round(1000 * fraction)
    quota = labels.bincount() * fraction
    assert (labels[val].bincount(minlength=7) - quota).abs().max() < 1
    assert torch.equal(train, train.sort().values) and torch.equal(val, val.sort().values)
    again = stratified_split(labels, fraction, seed=1)
    assert torch.equal(train, again[0]) and torch.equal(val, again[1])
    if fraction:
        assert not torch.equal(val, stratified_split(labels, fraction, seed=2)[1])


def test_remainders_go_to_the_largest() -> None:
    labels = torch.tensor([0] * 13 + [1] * 16 + [2] * 11)
    assert labels[stratified_split(labels, 0.1)[1]].bincount().tolist() == [1, 2, 1]


def test_every_class_keeps_a_training_image() -> None:
    labels = torch.tensor([0, 1, 1, 2, 2, 2])
    assert labels[stratified_split(labels, 0.9)[0]].bincount().tolist() == [1, 1, 1]


def test_labels_need_not_be_dense() -> None:
    train, val = stratified_split(torch.tensor([5, 5, -1, -1]), 0.5)
    assert len(train) == len(val) == 2


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 2.0])
def test_bad_fraction_is_named(fraction: float) -> None:
    with pytest.raises(ValueError, match=f"val_fraction is {fraction}"):
        stratified_split(torch.zeros(4), fraction)
