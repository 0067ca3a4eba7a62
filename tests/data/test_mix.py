"""MixUp and CutMix: targets sum to one and match the pixels, Beta is Beta, partners are others."""

from collections.abc import Callable

import pytest
import torch

from project.data import BatchMix, BatchRandom, CutMix, MixUp
from project.data.mix import ring_partners, symmetric_beta

N, K = 500, 10


def random(num: int = N, epoch: int = 0) -> BatchRandom:
    return BatchRandom(0, epoch, torch.arange(num))


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.5, 1.0, 2.0, 30.0])
def test_symmetric_beta_follows_the_beta_distribution(alpha: float) -> None:
    """Kolmogorov-Smirnov against SciPy (a part of scikit-learn's needs)."""
    stats = pytest.importorskip("scipy.stats")
    x = symmetric_beta(alpha, random(20000)).double()
    assert x.min() >= 0 and x.max() <= 1
    # float32 cannot resolve the last 6e-8 next to 1, where a small alpha has much mass: compare away from the ends.
    for point in (1e-4, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1 - 1e-4):
        assert float((x <= point).double().mean()) == pytest.approx(stats.beta.cdf(point, alpha, alpha), abs=0.015)
    assert float(x.var()) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.05)


@pytest.mark.parametrize("mix", [MixUp(0.4), MixUp(0.2, 0.5), CutMix(1.0), CutMix(0.3, 0.7)], ids=repr)
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 9, 14)], ids=str)
def test_targets_are_the_shares_of_the_pixels(mix: BatchMix, shape: tuple[int, int, int]) -> None:
    """Constant images whose brightness is their label: the mean brightness must be the targets' mean label."""
    labels = torch.arange(N) % K
    x = (labels / K).view(-1, 1, 1, 1).expand(N, *shape)
    y, targets = mix(x, labels, random(), K)
    assert y.shape == x.shape and targets.shape == (N, K) and targets.dtype == torch.float32
    assert torch.allclose(targets.sum(1), torch.ones(N), atol=1e-6) and targets.min() >= 0
    assert torch.allclose(y.mean((1, 2, 3)), targets @ (torch.arange(K) / K), atol=1e-5)
    assert len(targets.max(1).values.unique()) > 10, "every image has its own weight"


@pytest.mark.parametrize("mix", [MixUp(0.4, 0.0), CutMix(1.0, 0.0)], ids=repr)
def test_identity_at_probability_zero(mix: BatchMix) -> None:
    x, labels = torch.rand(N, 1, 8, 8), torch.arange(N) % K
    y, targets = mix(x, labels, random(), K)
    assert torch.equal(y, x) and torch.equal(targets, torch.nn.functional.one_hot(labels, K).float())


@pytest.mark.parametrize("cls", [MixUp, CutMix])
def test_probability_is_the_share_of_mixed_images(cls: type[BatchMix]) -> None:
    x, labels = torch.rand(2000, 1, 28, 28), torch.arange(2000) % K
    y, targets = cls(1.0, 0.3)(x, labels, random(2000), K)  # type: ignore[call-arg]
    kept = (y == x).flatten(1).all(1)
    assert 0.65 < kept.float().mean() < 0.75
    assert torch.equal(targets[kept], torch.nn.functional.one_hot(labels[kept], K).float())


def test_cutmix_pastes_one_rectangle_of_the_partner() -> None:
    num = 60
    x = torch.rand(num, 1, 20, 20)
    y, targets = CutMix(1.0)(x, torch.arange(num), random(num), num)
    partner = ring_partners(random(num))
    for k in range(num):
        pasted = (y[k, 0] != x[k, 0]).nonzero()
        if len(pasted):
            (top, left), (bottom, right) = pasted.min(0).values.tolist(), pasted.max(0).values.tolist()
            assert len(pasted) == (bottom - top + 1) * (right - left + 1)
            assert torch.equal(
                y[k, 0, top : bottom + 1, left : right + 1], x[partner[k], 0, top : bottom + 1, left : right + 1]
            )
            assert float(targets[k, partner[k]]) == pytest.approx(len(pasted) / 400, abs=1e-6)


@pytest.mark.parametrize("num", [2, 3, 64])
def test_partners_are_a_permutation_without_fixed_point(num: int) -> None:
    partner = ring_partners(random(num))
    assert torch.equal(partner.sort().values, torch.arange(num)) and (partner != torch.arange(num)).all()


def test_does_not_depend_on_the_order_in_the_batch() -> None:
    x, labels = torch.rand(64, 1, 8, 8), torch.arange(64) % K
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    for mix in (MixUp(), CutMix()):
        y, targets = mix(x, labels, random(64), K)
        shuffled = mix(x[order], labels[order], BatchRandom(0, 0, order), K)
        assert torch.equal(shuffled[0], y[order]) and torch.equal(shuffled[1], targets[order])
        assert not torch.equal(mix(x, labels, random(64, epoch=1), K)[0], y)


def test_one_image_has_no_partner() -> None:
    x = torch.rand(1, 1, 4, 4)
    y, targets = MixUp()(x, torch.tensor([2]), random(1), 3)
    assert torch.equal(y, x) and targets.tolist() == [[0, 0, 1]]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: MixUp(0.0), "alpha is 0.0"),
        (lambda: CutMix(-1.0), "alpha is -1.0"),
        (lambda: MixUp(float("nan")), "alpha is nan"),
        (lambda: MixUp(0.2, 1.1), "p is 1.1"),
    ],
)
def test_bad_arguments_are_named(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()
