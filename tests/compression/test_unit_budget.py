"""Units chosen by what they cost: the budget is the thinned net's, widths are round, the least worth goes."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from project.compression.pruning import Group, Masks, Pruner, apply_masks_, removed_units
from project.compression.thinning import plan_thinning
from project.compression.unit_budget import Macs, take_cheapest
from project.metrics.complexity import count_macs
from project.models import BNGoogLeNet, InceptionV3, LeNet5, SmallInception

SHAPE = (1, 16, 16)
NETS = {
    "SmallInception": (lambda: SmallInception(10, SHAPE, width=0.5), SHAPE),
    "LeNet5": (lambda: LeNet5(10, (1, 28, 28)), (1, 28, 28)),
    "BNGoogLeNet": (lambda: BNGoogLeNet(10, (3, 64, 64), width=0.25), (3, 64, 64)),
    "InceptionV3": (lambda: InceptionV3(10, (3, 75, 75), width=0.125), (3, 75, 75)),
}


def pruned(net: nn.Module, shape: tuple[int, int, int], pruner: Pruner, *amounts: float) -> tuple[list[Group], Masks]:
    groups, masks = pruner.groups(net, shape), {}
    for amount in amounts:
        masks = pruner.prune(net, groups, masks, amount, image_shape=shape)
    return groups, masks


def thinned(net: nn.Module, shape: tuple[int, int, int], groups: list[Group], masks: Masks) -> nn.Module:
    small = deepcopy(net)
    apply_masks_(small, masks)
    plan_thinning(small, removed_units(groups, masks), shape).apply_(small)
    return small


@pytest.mark.parametrize("name", NETS)
def test_the_budget_is_that_of_the_thinned_net(name: str) -> None:
    """Counted by running it, not by the formula that chose the units."""
    torch.manual_seed(0)
    build, shape = NETS[name]
    net = build()
    dense = count_macs(net, shape)
    pruner = Pruner("units", "random", budget="macs", keep=0.05)
    groups, masks = pruned(net, shape, pruner, 0.4, 0.5)
    left = count_macs(thinned(net, shape, groups, masks), shape) / dense
    assert left <= 0.3 + 1e-9
    assert left > 0.3 - 0.02, "no more than a unit too much"


def test_the_count_of_a_model_of_costs_is_exact() -> None:
    net, shape = NETS["LeNet5"][0](), (1, 28, 28)
    pruner = Pruner("units", "random", budget="macs")
    groups, masks = pruned(net, shape, pruner, 0.5)
    macs = Macs(net, shape, {group.layer: ((group.layer, *group.coupled), group.readers) for group in groups})
    kept = {group.layer: int(masks[group.parameters[0]].sum()) for group in groups}
    assert macs(kept) == pytest.approx(count_macs(thinned(net, shape, groups, masks), shape), rel=1e-12)


@pytest.mark.parametrize("budget", ["macs", "count"])
def test_widths_are_multiples(budget: str) -> None:
    net = SmallInception(10, SHAPE)
    groups, masks = pruned(net, SHAPE, Pruner("units", budget=budget, round_to=8, keep=0.1), 0.3, 0.4)
    kept = {group.layer: int(masks[group.parameters[0]].flatten(1)[:, 0].sum()) for group in groups}
    assert any(kept[group.layer] < len(masks[group.parameters[0]]) for group in groups)
    assert all(count % 8 == 0 and count > 0 for count in kept.values())
    small = thinned(net, SHAPE, groups, masks)
    assert all(m.in_channels % 8 == 0 for m in small.modules() if isinstance(m, nn.Conv2d) and m.in_channels > 1)


def test_of_equal_saliency_the_most_expensive_go() -> None:
    """Two layers whose units are worth the same; one costs four times as much."""
    net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(8 * 36, 3))
    pruner = Pruner("units", budget="macs", exclude=["3"])
    groups = pruner.groups(net, (1, 6, 6))
    macs = Macs(net, (1, 6, 6), {group.layer: ((group.layer,), group.readers) for group in groups})
    scores = {"0": torch.ones(8), "1": torch.ones(8)}
    left = {name: torch.ones(8, dtype=torch.bool) for name in scores}
    saved = {name: macs({"0": 8, "1": 8}) - macs({"0": 8, "1": 8, name: 7}) for name in scores}
    first = take_cheapest(scores, left, 1e-6, macs=macs)
    assert {name: int(mask.sum()) for name, mask in first.items()} == (
        {"0": 7, "1": 8} if saved["0"] > saved["1"] else {"0": 8, "1": 7}
    )


def test_without_a_budget_it_is_the_ranking_of_all_units() -> None:
    torch.manual_seed(0)
    scores = {"a": torch.rand(7), "b": torch.rand(12)}
    left = {name: torch.ones_like(score, dtype=torch.bool) for name, score in scores.items()}
    left["b"][3] = False
    masks = take_cheapest(scores, left, 0.5)
    gone = torch.cat([scores[name][left[name] & ~masks[name]] for name in scores])
    stays = torch.cat([scores[name][masks[name]] for name in scores])
    assert len(gone) == 9 and gone.max() < stays.min()
    assert not masks["b"][3]


def test_more_than_can_go_is_refused() -> None:
    net = SmallInception(10, SHAPE)
    with pytest.raises(ValueError, match=r"90 % of the multiply-accumulates .* keep 0.5 and round_to 8"):
        pruned(net, SHAPE, Pruner("units", budget="macs", keep=0.5, round_to=8), 0.9)
    with pytest.raises(ValueError, match=r"would take all units of|can not lose so many"):
        pruned(net, SHAPE, Pruner("units", "random", budget="macs"), 0.999)


@pytest.mark.parametrize("criterion", ["obd", "gradient"])
def test_saliency_ranks_units_as_the_loss_does(criterion: str) -> None:
    """Spearman's correlation with what the loss does when each unit of a trained net is taken: 0.79 for OBD (0.75 with
    gates on weights and scale both), 0.74 for gradients, -0.03 for magnitude.
    """
    net, images, labels = trained_on_digits()
    pruner = Pruner("units", criterion, exclude=["fc"])
    groups = pruner.groups(net, (1, 8, 8))
    scores = pruner._scores(net, groups, images, labels, 0)
    with torch.no_grad():
        before = nn.functional.cross_entropy(net(images), labels)
        guessed, true = [], []
        for group in groups:
            for unit in range(len(scores[group.layer])):
                kept = {name: net.get_parameter(name)[unit].clone() for name in group.parameters}
                for name in kept:
                    net.get_parameter(name)[unit] = 0
                guessed.append(float(scores[group.layer][unit]))
                true.append(float((nn.functional.cross_entropy(net(images), labels) - before).abs()))
                for name, value in kept.items():
                    net.get_parameter(name)[unit] = value
    assert rank_correlation(torch.tensor(guessed), torch.tensor(true)) > {"obd": 0.77, "gradient": 0.7}[criterion]


def trained_on_digits() -> tuple[nn.Module, Tensor, Tensor]:
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16 - 0.3
    labels = torch.tensor(digits.target)
    net = SmallInception(10, (1, 8, 8), width=0.25)
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    for _ in range(6):
        for batch in torch.randperm(len(images)).split(128):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images[batch]), labels[batch]).backward()
            optimizer.step()
    return net.eval(), images[:256], labels[:256]


def rank_correlation(a: Tensor, b: Tensor) -> float:
    ranks = torch.stack([a.argsort().argsort().double(), b.argsort().argsort().double()])
    return float(torch.corrcoef(ranks)[0, 1])
