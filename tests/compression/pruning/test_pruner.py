"""Laws of what is pruned: exact counts, masks that only shrink, saliencies against derivatives, schedules."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers import coupled_nets
from torch import Tensor, nn

from project.compression import (
    Gradual,
    Iterative,
    OneShot,
    Pruner,
    QualityFactors,
    Sparsities,
    apply_masks_,
    plan_thinning,
    removed_units,
    sparsity,
)
from project.compression.pruning.masks import units_left
from project.compression.pruning.saliency import saliency_of_units, saliency_of_weights
from project.compression.pruning.schedules import share_to_take
from project.compression.thinning import units as thinning
from project.compression.thinning.units import Units, units_of
from project.models import SmallInception

SHAPE = (1, 8, 8)
POOL_BRANCH = "blocks.1.branches.pool.1.conv"


def mlp(seed: int = 0) -> nn.Sequential:
    """Three linear layers: 1.weight [20, 64], 3.weight [15, 20], 5.weight [10, 15]."""
    torch.manual_seed(seed)
    layers = [nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 15), nn.ReLU(), nn.Linear(15, 10)]
    return nn.Sequential(*layers)


def inception(seed: int = 0) -> SmallInception:
    torch.manual_seed(seed)
    return SmallInception(10, SHAPE, width=0.25, stages=((32,),))


def digits(count: int = 12, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(count, *SHAPE, generator=generator, dtype=torch.float64).to(dtype)
    return {"images": images, "labels": torch.randint(0, 10, (count,), generator=generator)}


def num_gone(masks: dict[str, Tensor]) -> dict[str, int]:
    return {name: int((mask == 0).sum()) for name, mask in masks.items()}


def prune(net: nn.Module, pruner: Pruner, amount: float, masks: dict[str, Tensor] | None = None, **options):
    return pruner.prune(net, pruner.groups(net, SHAPE), masks or {}, amount, **{**digits(), **options})


# -- how many go ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["magnitude", "obd", "gradient", "random"])
@pytest.mark.parametrize("amount", [0.0, 0.1, 0.5, 0.77, 0.9])
def test_global_takes_exactly_the_share_of_all_layers_together(criterion, amount):
    gone = num_gone(prune(mlp(), Pruner(criterion=criterion), amount))
    assert sum(gone.values()) == round(amount * (64 * 20 + 20 * 15))


@pytest.mark.parametrize("amount", [0.1, 0.5])
def test_global_takes_exactly_the_share_of_all_units(amount):
    net, pruner = inception(), Pruner("units")
    groups = pruner.groups(net, SHAPE)
    removed = removed_units(groups, prune(net, pruner, amount))
    num_units = sum(group.units.num for group in groups)
    assert sum(map(len, removed.values())) == round(amount * num_units)


def test_layer_takes_the_share_of_each_layer_times_its_rate():
    pruner = Pruner(scope="layer", rates={r"^3$": 0.5, r"^5$": 2.0}, exclude=[])
    for amount in (0.2, 0.35):
        gone = num_gone(prune(mlp(), pruner, amount))
        assert gone == {
            "1.weight": round(amount * 1280),
            "3.weight": round(amount / 2 * 300),
            "5.weight": round(amount * 2 * 150),
        }


@pytest.mark.parametrize("structure", ["weights", "units"])
def test_the_first_rate_that_finds_a_layer_counts_and_0_spares_it(structure):
    net, pruner = inception(), Pruner(structure, scope="layer", rates={"pool": 0, ".*": 0.5})
    groups = pruner.groups(net, SHAPE)
    masks = prune(net, pruner, 0.5)
    gone = num_gone(masks) if structure == "weights" else removed_units(groups, masks)
    for group in groups:
        weight = net.get_parameter(group.parameters[0])
        size = weight.numel() if structure == "weights" else len(weight)
        count = gone[group.parameters[0]] if structure == "weights" else len(gone[group.layer])
        assert count == (0 if "pool" in group.layer else round(0.25 * size)), group.layer


def test_deviation_takes_what_is_below_the_factor_times_numpys_standard_deviation():
    net, pruner = mlp().double(), Pruner(scope="deviation", rates={r"^3$": 0.5}, exclude=[])
    masks: dict[str, Tensor] = {}
    left = {name: np.ones(net.get_parameter(f"{name}.weight").shape, bool) for name in ("1", "3", "5")}
    for factor in (0.6, 1.0):  # the second round's deviation is that of what the first has left
        masks = prune(net, pruner, factor, masks)
        for name, keep in left.items():
            weight = net.get_parameter(f"{name}.weight").detach().numpy()
            threshold = factor * (0.5 if name == "3" else 1.0) * weight[keep].std(ddof=1)
            left[name] = keep & (np.abs(weight) >= threshold)
            np.testing.assert_array_equal(masks[f"{name}.weight"].numpy(), left[name], err_msg=name)
    assert all(0 < keep.mean() < 1 for keep in left.values())


def test_magnitude_ranks_all_weights_together():
    net = mlp()
    weights = np.concatenate([net.get_parameter(f"{n}.weight").detach().abs().flatten().numpy() for n in (1, 3)])
    expected = np.ones(weights.size, bool)
    expected[np.argsort(weights, kind="stable")[: round(0.6 * weights.size)]] = False
    masks = prune(net, Pruner(), 0.6)
    np.testing.assert_array_equal(torch.cat([mask.flatten() for mask in masks.values()]).numpy(), expected)


def test_magnitude_ranks_all_units_by_the_mean_weight_that_makes_or_reads_them_over_that_of_their_layer():
    net, pruner = inception(), Pruner("units", round_to=1)
    groups = pruner.groups(net, SHAPE)
    scores = []
    for number, group in enumerate(groups):
        made = net.get_parameter(f"{group.layer}.weight").detach().abs().double().numpy()
        total, count = made.reshape(len(made), -1).sum(1), made[0].size
        for name, dim in group.units.read:
            first = int(group.units.slices[name, dim][0])  # behind other channels of a concatenation
            read = net.get_parameter(name).detach().abs().double().numpy().swapaxes(0, dim)[first : first + len(made)]
            total, count = total + read.reshape(len(made), -1).sum(1), count + read[0].size
        norms = total / count
        scores += [(norm / norms.mean(), number, unit) for unit, norm in enumerate(norms)]
    expected = sorted((number, unit) for _, number, unit in sorted(scores)[: round(0.4 * len(scores))])
    removed = removed_units(groups, prune(net, pruner, 0.4))
    assert [(number, unit) for number, units in enumerate(removed.values()) for unit in units] == expected
    assert any(first for group in groups for first in [int(i[0]) for i in group.units.slices.values()])


# -- masks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["magnitude", "obd", "gradient", "random"])
@pytest.mark.parametrize(("structure", "scope"), [("weights", "global"), ("weights", "layer"), ("units", "layer")])
def test_masks_only_ever_shrink(structure, scope, criterion):
    net, pruner = inception() if structure == "units" else mlp(), Pruner(structure, criterion, scope)
    masks: dict[str, Tensor] = {}
    for round_ in range(3):
        before = masks
        masks = prune(net, pruner, 0.3, before, seed=round_)
        for name, mask in masks.items():
            assert ((mask == 0) | (mask == 1)).all()
            assert not before or (mask <= before[name]).all(), name
        if before and scope == "global":
            left = sum(int(mask.sum()) for mask in before.values())
            assert sum(int(mask.sum()) for mask in masks.values()) == left - round(0.3 * left)
        with torch.no_grad():  # what is gone stays gone, however large it would have become
            for name in masks:
                net.get_parameter(name).copy_(torch.randn_like(net.get_parameter(name)) + 3 * (1 - masks[name]))


def test_random_is_seeded_draws_nothing_from_the_global_generator_and_is_even_over_layers():
    net = inception()
    state = torch.get_rng_state()
    first, again, other = (prune(net, Pruner(criterion="random"), 0.5, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    for name, mask in first.items():
        share, deviation = 1 - float(mask.mean()), (0.25 / mask.numel()) ** 0.5  # of a binomial distribution
        assert abs(share - 0.5) < 5 * deviation, name
        agree = float((mask == other[name]).float().mean())
        assert abs(agree - 0.5) < 5 * deviation, name


def test_random_takes_other_weights_of_each_layer():
    net = nn.Sequential(*[nn.Sequential(*[nn.Linear(64, 64) for _ in range(3)]) for _ in range(3)])
    scores = saliency_of_weights(net, [f"{i}.{j}.weight" for i in range(3) for j in range(3)], "random", None, None, 0)
    distinct = {tuple(score.flatten()[:5].tolist()) for score in scores.values()}
    assert len(distinct) == len(scores)


def test_applied_masks_zero_what_they_take_in_place_and_leave_the_rest():
    net, pruner = inception(), Pruner("units")
    before = {name: value.clone() for name, value in net.state_dict().items()}
    addresses = [parameter.data_ptr() for parameter in net.parameters()]
    masks = prune(net, pruner, 0.4)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items()), "prune changed the net"
    apply_masks_(net, masks)
    apply_masks_(net, {})
    assert [parameter.data_ptr() for parameter in net.parameters()] == addresses
    for name, value in net.state_dict().items():
        expected = before[name] * masks[name] if name in masks else before[name]
        assert torch.equal(value, expected), name
    total = sum(mask.expand_as(net.get_parameter(name)).numel() for name, mask in masks.items() if mask.dim() > 1)
    zeros = sum(int((net.get_parameter(name) == 0).sum()) for name, mask in masks.items() if mask.dim() > 1)
    assert sparsity(masks, net) == pytest.approx(zeros / total) and 0.4 < zeros / total < 0.7
    assert sparsity({}, net) == 0


def test_removed_units_are_those_whose_weights_norms_and_biases_are_zero():
    net, pruner = inception(), Pruner("units")
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(10)  # no zero of its own
    groups = pruner.groups(net, SHAPE)
    masks = prune(net, pruner, 0.4)
    apply_masks_(net, masks)
    removed = removed_units(groups, masks)
    assert sum(map(len, removed.values())) > 10
    for group in groups:
        assert len(group.parameters) > 3  # weight, scale and shift of the norm, and weights that read the units
        for (name, dim), indices in group.units.slices.items():
            if name in group.parameters:
                values = net.get_parameter(name).detach().movedim(dim, 0)
                zero = (values.reshape(len(values), -1) == 0).all(1)
                assert zero[indices].all(1).nonzero().flatten().tolist() == removed[group.layer], name
                assert zero[indices].any(1).equal(zero[indices].all(1))
    assert not any(removed_units(groups, {}).values())


def test_layers_that_a_residual_connection_couples_lose_the_same_units_and_can_be_thinned():
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
            self.fc = nn.Linear(8, 10)

        def forward(self, images: Tensor) -> Tensor:
            x = self.stem(images)
            return self.fc((x + self.block(x.relu())).mean((2, 3)))

    torch.manual_seed(0)
    net, pruner = Residual(), Pruner("units", round_to=1)
    groups = pruner.groups(net, SHAPE)
    masks = prune(net, pruner, 0.5)
    (group,) = groups
    assert group.layer == "stem" and group.coupled == ("block",) and group.readers == {"block": 1, "fc": 1}
    assert set(masks) == {"stem.weight", "stem.bias", "block.weight", "block.bias", "fc.weight"}
    removed = removed_units(groups, masks)
    assert removed.keys() == {"stem"} and len(removed["stem"]) == 4
    apply_masks_(net, masks)
    images = digits()["images"]
    before = net(images)
    plan_thinning(net, removed, SHAPE).apply_(net)
    assert net.stem.out_channels == net.block.in_channels == net.block.out_channels == 4
    torch.testing.assert_close(net(images), before)


def test_units_of_a_layer_that_is_defined_after_its_reader_are_counted_from_its_own():
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read, self.fc = nn.Conv2d(12, 6, 1), nn.Linear(6, 10)
            self.a, self.b = nn.Conv2d(1, 4, 1), nn.Conv2d(1, 8, 1)

        def forward(self, images: Tensor) -> Tensor:
            return self.fc(self.read(torch.cat([self.a(images), self.b(images)], 1).relu()).mean((2, 3)))

    net, pruner = Backwards(), Pruner("units", scope="layer", include=["^b$"], exclude=["fc"])
    groups = pruner.groups(net, SHAPE)
    assert [(group.layer, group.parameters) for group in groups] == [("b", ("b.weight", "read.weight", "b.bias"))]
    with torch.no_grad():
        net.b.weight[5:] /= 100
        net.read.weight[:, 9:] /= 100
    removed = removed_units(groups, prune(net, pruner, 0.375))
    assert removed == {"b": [5, 6, 7]}
    plan_thinning(net, removed, SHAPE).apply_(net)
    assert (net.b.out_channels, net.read.in_channels) == (5, 9)


# -- which layers --------------------------------------------------------------------------------------------------


def layers_of(net: nn.Module, **options) -> list[str]:
    return [group.layer for group in Pruner(**options).groups(net, SHAPE)]


def test_by_default_biases_norms_and_the_head_are_spared():
    net = inception()
    layers = [name for name, module in net.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert layers[0] == "stem.0.conv" and layers[-1] == "fc"
    assert layers_of(net) == layers[:-1]
    assert set(prune(net, Pruner(), 0.5)) == {f"{layer}.weight" for layer in layers[:-1]}
    assert layers_of(net, structure="units") == layers[:-1]
    masks = prune(net, Pruner("units"), 0.3)
    assert "fc.bias" not in masks and masks["fc.weight"].shape == (1, net.fc.in_features)


def test_include_and_exclude_are_searched_for():
    net = inception()
    assert layers_of(net, include=["^stem"]) == ["stem.0.conv", "stem.1.conv"]
    assert layers_of(net, include=["^stem", "pool"]) == ["stem.0.conv", "stem.1.conv", POOL_BRANCH]
    assert layers_of(net, exclude=["blocks"]) == ["stem.0.conv", "stem.1.conv", "fc"]  # in the place of the default
    assert layers_of(net, exclude=[])[-1] == "fc"
    assert layers_of(net, structure="units", include=["^stem"], exclude=["1"]) == ["stem.0.conv"]


@pytest.mark.parametrize("include", [["block.a"], ["block.b"]])
@pytest.mark.parametrize("criterion", ["magnitude", "obd", "taylor", "gradient"])
def test_a_shared_weight_has_its_first_name_whichever_layer_is_included(include, criterion):
    net, data = coupled_nets.make("tied weights"), torch.Generator().manual_seed(0)
    pruner = Pruner(criterion=criterion, include=include)
    images, labels = torch.randn(8, *coupled_nets.SHAPE, generator=data), torch.arange(8) % 5
    masks: dict[str, Tensor] = {}
    for level in (0.5, 0.75):  # a pruning sees what the one before has left
        masks = pruner.prune(net, pruner.groups(net, coupled_nets.SHAPE), masks, 0.5, images=images, labels=labels)
        assert list(masks) == ["block.a.weight"] and sparsity(masks, net) == level


@pytest.mark.parametrize("options", [{"include": ["conv9"]}, {"exclude": ["conv9"]}])
def test_an_expression_that_finds_nothing_is_refused(options):
    with pytest.raises(ValueError, match=rf"{next(iter(options))} has 'conv9', which finds no layer: .*stem\.0\.conv"):
        layers_of(inception(), **options)
    with pytest.raises(ValueError, match="rates has 'conv9'"):
        layers_of(inception(), scope="layer", rates={"conv9": 1.0})


@pytest.mark.parametrize(
    "options", [{"exclude": [".*"]}, {"include": ["fc"]}, {"include": ["fc"], "structure": "units"}]
)
def test_no_layer_left_is_refused(options):
    with pytest.raises(ValueError, match="no layer is left to prune"):
        layers_of(inception(), **options)


def test_units_that_cannot_be_removed_are_refused_by_name():
    with pytest.raises(ValueError, match="units of fc, which include names, cannot be removed: it gives the net's out"):
        layers_of(inception(), structure="units", include=["fc", "stem"], exclude=[])


@pytest.mark.parametrize(
    "options",
    [
        {"keep": 1.0},
        {"keep": -0.1},
        {"rates": {"fc": 0.5}},
        {"rates": {"fc": -1.0}, "scope": "layer"},
        {"scope": "deviation", "criterion": "obd"},
        {"scope": "deviation", "structure": "units"},
        {"num_images": 0},
    ],
)
def test_arguments_that_make_no_sense_are_refused(options):
    with pytest.raises(ValueError, match=rf"{next(iter(options))} (is|are) ") as error:
        Pruner(**options)
    assert "\n" not in str(error.value)


# -- layers that would die -----------------------------------------------------------------------------------------


def test_a_branch_that_would_lose_all_units_is_named_and_nothing_has_changed():
    net, pruner = inception(), Pruner("units", scope="layer", rates={"pool": 9.0})
    with torch.no_grad():
        net.get_parameter(f"{POOL_BRANCH}.weight").mul_(1e-4)
        net.blocks[1].branches["pool"][1].norm.weight.mul_(1e-6)
        net.blocks[1].branches["pool"][1].norm.bias.mul_(1e-6)
    masks = prune(net, pruner, 0.0)
    weights = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(
        ValueError, match=rf"would take all units of {POOL_BRANCH.replace('.', '[.]')}, .*give it a lower rate[.]$"
    ):
        prune(net, pruner, 0.4, masks)
    assert all((mask == 1).all() for mask in masks.values())
    assert all(torch.equal(value, weights[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("amounts", [(0.9, 0.9, 0.667), (0.99,), (0.75, 0.9999)])
def test_rounding_never_takes_the_last_unit_of_a_layer(amounts):
    net, pruner, masks = inception(), Pruner("units", scope="layer"), None
    for amount in amounts:
        masks = prune(net, pruner, amount, masks)
    assert {int(units_left(group, masks).sum()) for group in pruner.groups(net, SHAPE)} == {1}


def test_a_ranking_of_all_units_leaves_one_of_each_layer():
    net, pruner = inception(), Pruner("units", "gradient", round_to=1)
    with torch.no_grad():
        net.get_parameter(f"{POOL_BRANCH}.weight").mul_(1e-4)
        net.blocks[1].branches["pool"][1].norm.weight.mul_(1e-6)
        net.blocks[1].branches["pool"][1].norm.bias.mul_(1e-6)
    groups = pruner.groups(net, SHAPE)
    removed = removed_units(groups, prune(net, pruner, 0.4))
    widths = {group.layer: group.units.num for group in groups}
    assert len(removed[POOL_BRANCH]) == widths[POOL_BRANCH] - 1
    assert sum(map(len, removed.values())) == round(0.4 * sum(widths.values()))


def test_the_net_is_traced_once(monkeypatch):
    traces = []
    monkeypatch.setattr(thinning, "trace", lambda *args, trace=thinning.trace: traces.append(1) or trace(*args))
    assert Pruner("units").groups(inception(), SHAPE) and len(traces) == 1


def test_keep_leaves_the_best_of_each_layer_and_the_count_is_still_exact():
    net, keep = inception(), 0.25
    with torch.no_grad():
        net.get_parameter(f"{POOL_BRANCH}.weight").mul_(1e-4)
    pruner = Pruner(keep=keep)
    masks: dict[str, Tensor] = {}
    for amount in (0.3, 0.3, 0.3):
        left = sum(int(mask.sum()) for mask in masks.values()) or sum(m.numel() for m in prune(net, pruner, 0).values())
        masks = prune(net, pruner, amount, masks)
        assert sum(int(mask.sum()) for mask in masks.values()) == left - round(amount * left)
        for name, mask in masks.items():
            assert mask.sum() >= round(keep * mask.numel()), name
    tiny = f"{POOL_BRANCH}.weight"
    magnitudes, mask = net.get_parameter(tiny).detach().abs().flatten(), masks[tiny].flatten() != 0
    assert mask.sum() == round(keep * mask.numel())
    assert magnitudes[mask].min() > magnitudes[~mask].max()


def test_keep_is_never_broken_even_if_more_should_go():
    pruner = Pruner(keep=0.25)
    with pytest.raises(ValueError, match=r"keep is 0[.]25 of each layer"):
        prune(inception(), pruner, 0.8)
    masks = prune(inception(), pruner, 0.7)
    with pytest.raises(ValueError, match=r"keep is 0[.]25 of each layer"):
        prune(inception(), pruner, 0.5, masks)


# -- saliency ------------------------------------------------------------------------------------------------------


def linear_softmax() -> tuple[nn.Sequential, Tensor]:
    """Images of 3 pixels, 4 classes, in double precision; the loss is far from its minimum."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3, 4)).double()
    return net, torch.randn(6, 1, 1, 3, dtype=torch.float64)


def diagonal_of_hessian(net: nn.Sequential, images: Tensor, labels: Tensor) -> Tensor:
    def loss(weight: Tensor) -> Tensor:
        return nn.functional.cross_entropy(images.flatten(1) @ weight.T + net[1].bias, labels)

    weight = net[1].weight.detach()
    hessian = torch.autograd.functional.hessian(loss, weight).reshape(weight.numel(), -1)
    return hessian.diagonal().view_as(weight)


def test_obd_is_the_second_derivative_where_gauss_newton_is_exact():
    """Of softmax regression the Gauss-Newton matrix is the Hessian, whatever the labels. A drawn label gives the square
    of ``(p - 1[y]) x``: its mean over labels is ``p (1 - p) x^2``, its variance is known, so the mean of R draws for
    each of N images lies within 5 of its standard errors of the Hessian, but for 1 in 140,000 of tries at 12 entries.
    """
    net, images = linear_softmax()
    labels = torch.zeros(len(images), dtype=torch.long)  # wrong on purpose: OBD draws its own
    exact = diagonal_of_hessian(net, images, labels)
    p, x = net(images).softmax(1).detach()[:, :, None], images.flatten(1)[:, None, :]
    torch.testing.assert_close((p * (1 - p) * x.square()).mean(0), exact)
    variance = (p * (1 - p) ** 4 + (1 - p) * p**4 - (p * (1 - p)) ** 2) * x**4

    repeats = 400
    many = images.repeat(repeats, 1, 1, 1)
    weight = net[1].weight.detach()
    scores = saliency_of_weights(net, ["1.weight"], "obd", many, labels.repeat(repeats), seed=0)["1.weight"]
    error = (variance.mean(0) / len(many)).sqrt() * weight.square() / 2
    expected = exact * weight.square() / 2
    assert ((scores - expected).abs() < 5 * error).all()
    assert (error < 0.15 * expected).all()  # the bound tells a factor of 2 from none


def test_obd_of_all_labels_by_hand():
    """What it sums up for one image is the square of that image's gradient, and the draws follow the seed."""
    net, images = linear_softmax()
    weight = net[1].weight.detach()
    p, x = net(images[:1]).softmax(1).detach()[0], images[0].flatten()
    possible = [((p - torch.eye(4, dtype=p.dtype)[y])[:, None] * x * weight).square() / 2 for y in range(4)]
    seen = set()
    for seed in range(30):
        options = ("obd", images[:1], torch.tensor([0]), seed)
        score = saliency_of_weights(net, ["1.weight"], *options)["1.weight"]
        matches = [y for y, value in enumerate(possible) if torch.allclose(score, value)]
        assert len(matches) == 1
        assert torch.equal(score, saliency_of_weights(net, ["1.weight"], *options)["1.weight"])
        seen.add(matches[0])
    assert len(seen) > 1


def trained_net() -> nn.Sequential:
    """With all that makes training and evaluation differ, after a while of training, in double precision."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.Tanh()]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.5), nn.Linear(5, 10)).double()
    for _ in range(5):
        net(torch.randn(16, *SHAPE, dtype=torch.float64))
    with torch.no_grad():
        net[1].weight.add_(0.3 * torch.randn_like(net[1].weight))
        net[1].bias.add_(0.3 * torch.randn_like(net[1].bias))
    return net


def units_of_trained() -> dict[str, Units]:
    """The units of both convolutions of :func:`trained_net`."""
    return units_of(trained_net().float(), SHAPE)


GATED = {"0": "3.weight", "3": "7.weight"}
"""What a unit's gate multiplies: the weights that read it."""


def gradients_of(net: nn.Module, image: Tensor, label: int) -> dict[str, Tensor]:
    """``w g`` of one image, by a plain backward pass in eval mode."""
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    loss = nn.functional.cross_entropy(net(image[None]), torch.tensor([label]))
    gradients = torch.autograd.grad(loss, list(net.parameters()))
    for module, mode in modes:
        module.training = mode
    named = zip(net.named_parameters(), gradients, strict=True)
    return {name: (parameter * gradient).detach() for (name, parameter), gradient in named}


def of_units(products: dict[str, Tensor], layer: str) -> Tensor:
    """Their sum over what each unit's gate multiplies, ``[num_units]``."""
    product = products[GATED[layer]].movedim(1, 0)
    return product.reshape(len(product), -1).sum(1)


def test_gradient_magnitude_is_that_of_a_loop_over_images():
    net = trained_net()
    images, labels = digits(40, torch.float64).values()  # more than one chunk
    products = [gradients_of(net, image, int(label)) for image, label in zip(images, labels, strict=True)]
    scores = saliency_of_weights(net, ["0.weight", "3.weight", "7.weight"], "gradient", images, labels, 0)
    assert list(scores) == ["0.weight", "3.weight", "7.weight"]
    for name, score in scores.items():
        torch.testing.assert_close(score, sum(each[name] for each in products).abs() / len(images))
    for layer, score in saliency_of_units(net, units_of_trained(), "gradient", images, labels, 0).items():
        torch.testing.assert_close(score, sum(of_units(each, layer) for each in products).abs() / len(images))


@pytest.mark.parametrize("layer", GATED)
def test_obd_of_units_is_half_the_squared_gradient_of_their_gates(layer):
    net, image = trained_net(), digits(1, torch.float64)["images"]
    possible = [of_units(gradients_of(net, image[0], label), layer).square() / 2 for label in range(10)]
    found = [
        saliency_of_units(net, units_of_trained(), "obd", image, torch.tensor([0]), seed)[layer] for seed in range(10)
    ]
    assert all(sum(torch.allclose(score, value) for value in possible) == 1 for score in found)


@pytest.mark.parametrize("criterion", ["gradient", "obd"])
def test_scoring_leaves_the_net_as_it_was(criterion):
    net = trained_net()
    net[1].eval()
    modes = [module.training for module in net.modules()]
    before = {name: value.clone() for name, value in net.state_dict().items()}
    saliency_of_units(net, units_of_trained(), criterion, *digits(4, torch.float64).values(), 0)
    assert [module.training for module in net.modules()] == modes
    assert all(parameter.grad is None for parameter in net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_the_gradient_of_a_gate_is_what_a_small_move_of_it_does_to_the_loss():
    net = trained_net().eval()
    images, labels = digits(16, torch.float64).values()
    scores = saliency_of_units(net, units_of_trained(), "gradient", images, labels, 0)

    @torch.no_grad()
    def loss_with(gate: float, layer: str, unit: int) -> float:
        """Of what the unit's gate multiplies, times ``gate``."""
        weight = net.get_parameter(GATED[layer])
        kept = weight.clone()
        weight[:, unit] *= gate
        loss = float(nn.functional.cross_entropy(net(images), labels))
        weight.copy_(kept)
        return loss

    for layer, score in scores.items():
        for unit, expected in enumerate(score.tolist()):
            slope = (loss_with(1 + 1e-4, layer, unit) - loss_with(1 - 1e-4, layer, unit)) / 2e-4
            assert abs(slope) == pytest.approx(expected, rel=1e-5, abs=1e-9), (layer, unit)


def test_taking_a_unit_that_hardly_matters_changes_the_loss_by_its_score():
    """First order is all there is of a small unit without a norm: here one a thousandth as large as the others."""
    net = trained_net().eval()
    images, labels = digits(16, torch.float64).values()
    with torch.no_grad():
        net[7].weight[:, 2] *= 1e-3
        before = nn.functional.cross_entropy(net(images), labels)
        score = saliency_of_units(net, units_of_trained(), "gradient", images, labels, 0)["3"]
        net[7].weight[:, 2] = 0
        after = nn.functional.cross_entropy(net(images), labels)
    assert score.argmin() == 2
    assert abs(float(after - before)) == pytest.approx(float(score[2]), rel=0.01)


@pytest.mark.parametrize("criterion", ["obd", "gradient"])
def test_gradients_without_images_are_refused(criterion):
    with pytest.raises(ValueError, match="no images"):
        prune(mlp(), Pruner(criterion=criterion), 0.5, images=None, labels=None)


# -- schedules -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "levels"),
    [
        (OneShot(0.8), [0.8]),
        (Iterative(0.2, 3), [0.2, 0.36, 0.488]),
        (Sparsities([0.5, 0.75, 0.9]), [0.5, 0.75, 0.9]),
    ],
)
def test_shares_of_what_is_left_compound_to_the_levels(schedule, levels):
    left, found = 1.0, []
    for amount in schedule.amounts():
        left *= 1 - amount
        found.append(1 - left)
    assert found == pytest.approx(levels)


@pytest.mark.parametrize(("before", "after"), [(0.0, 0.3), (0.3, 0.9), (0.5, 0.5), (0.9, 0.99)])
def test_share_to_take(before, after):
    share = share_to_take(before, after)
    assert (1 - before) * (1 - share) == pytest.approx(1 - after)
    assert 0 <= share < 1
    assert share_to_take(0.6, 0.4) == 0  # nothing comes back


def test_levels_are_reached_though_a_round_took_too_much():
    schedule = Sparsities([0.4, 0.6])
    for gone in (0.4, 0.45, 0.6, 0.7):
        assert 1 - (1 - gone) * (1 - schedule.amount(1, gone)) == pytest.approx(max(gone, 0.6))
    assert Iterative(0.2, 3).amount(1, 0.2) == pytest.approx(0.2)
    assert [s.level(-1) for s in (schedule, Iterative(0.2, 3), OneShot(0.9))] == pytest.approx([0.6, 1 - 0.8**3, 0.9])


@pytest.mark.parametrize("initial", [0.0, 0.25])
@pytest.mark.parametrize(("begin_epoch", "end_epoch", "every"), [(1, 4, 7), (0.5, 2.5, 10), (0, 3, 1)])
def test_gradual_follows_zhu_and_gupta(initial, begin_epoch, end_epoch, every):
    """``s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n dt))^3`` at ``t_0, t_0 + dt, …, t_0 + n dt`` (eq. 1)."""
    steps, final = 20, 0.8
    schedule = Gradual(final, begin_epoch, end_epoch, every, initial)
    begin, end = round(begin_epoch * steps), round(end_epoch * steps)
    found = {step: value for step in range(6 * steps) if (value := schedule.sparsity_at(step, steps)) is not None}
    assert list(found) == sorted({*range(begin, end + 1, every), end})
    for step, value in found.items():
        assert value == pytest.approx(final + (initial - final) * (1 - (step - begin) / (end - begin)) ** 3)
    assert found[begin] == pytest.approx(initial) and found[end] == final
    assert all(before < after for before, after in pairwise(found.values()))


@pytest.mark.parametrize(("begin_epoch", "end_epoch"), [(0, 1.98), (1.976, 1.98), (0.29, 1.999)])
def test_gradual_reaches_its_last_sparsity_before_the_end(begin_epoch, end_epoch):
    """A moment within the last step of an epoch is that step, not the first of the next epoch."""
    schedule = Gradual(0.8, begin_epoch, end_epoch, every_n_steps=100)
    found = [schedule.sparsity_at(step, 20) for step in range(40)]
    assert found[-1] == pytest.approx(0.8) and Gradual(0.8, 0.29, 2).sparsity_at(29, 100) == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: OneShot(sparsity=1.0),
        lambda: Iterative(fraction=0.0),
        lambda: Iterative(fraction=20.0),
        lambda: Iterative(rounds=0),
        lambda: Sparsities(levels=[]),
        lambda: Sparsities(levels=[0.5, 0.4]),
        lambda: Sparsities(levels=[0.5, 1.2]),
        lambda: QualityFactors(factors=[]),
        lambda: QualityFactors(factors=[0.8, 0.0]),
        lambda: Gradual(final=1.5, begin_epoch=0, end_epoch=1),
        lambda: Gradual(final=0.5, begin_epoch=2, end_epoch=2),
        lambda: Gradual(final=0.5, begin_epoch=-1, end_epoch=2),
        lambda: Gradual(final=0.5, begin_epoch=0, end_epoch=2, every_n_steps=0),
        lambda: Gradual(final=0.5, begin_epoch=0, end_epoch=2, initial=0.6),
    ],
)
def test_schedules_refuse_what_makes_no_sense(make):
    with pytest.raises(ValueError, match=r"^\w+ (is|has) ") as error:
        make()
    assert "\n" not in str(error.value)


def test_the_layers_whose_units_stay_are_named_and_the_rest_is_pruned(caplog):
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.wide = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)
            self.deep, self.back, self.head = nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

        def forward(self, images):
            return self.head(self.back(self.deep(self.wide(self.stem(images)).roll(1, 1))).mean((2, 3)))

    caplog.set_level("INFO")
    groups = Pruner(structure="units").groups(Shifted(), (3, 8, 8))
    assert [group.layer for group in groups] == ["stem", "back"]
    assert "wide (the net changes its order)" in caplog.text and "deep (" in caplog.text
    with pytest.raises(ValueError, match=r"units of wide, which include names, cannot be removed: the net changes"):
        Pruner(structure="units", include=["wide", "stem"]).groups(Shifted(), (3, 8, 8))
    with pytest.raises(ValueError, match=r"Shifted has no layer left .*: deep \(the net changes.*structure: weights"):
        Pruner(structure="units", include=["deep"]).groups(Shifted(), (3, 8, 8))
