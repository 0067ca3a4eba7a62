"""Nets with thin layers: what is chosen, what it computes, that plain values rebuild it, and what is refused."""

from copy import deepcopy

import pytest
import torch
from helpers.nets import NETS, build, enliven_, images_for
from helpers.subclasses import Mixed
from torch import Tensor, nn

from project.compression import Factorize, Factorizer, from_plain, plan_thinning, replay_, to_plain, units_of
from project.compression.low_rank.factorizer import load_
from project.compression.low_rank.factors import largest_ranks, matrix_of
from project.compression.low_rank.layer_responses import positions_of, second_moments
from project.metrics.complexity import complexity_by_layer, count_macs

LARGE = [pytest.param(name, marks=pytest.mark.slow) for name in ("GoogLeNet-32", "InceptionV3-75")]
NAMES = ["SmallInception-8", "LeNet5-28x19", "LeNet300100-9x5", *LARGE]


def lively(name: str) -> tuple[nn.Module, tuple[int, int, int], Tensor]:
    net, images = build(name), images_for(name)
    with torch.no_grad():
        enliven_(net, images)
    return net.eval(), NETS[name][1], images


@torch.no_grad()
def change(net: nn.Module, other: nn.Module, images: Tensor) -> float:
    return float((net(images) - other(images)).square().mean() / net(images).var())


@pytest.mark.parametrize("name", NAMES)
def test_what_is_counted_is_what_runs_and_full_rank_is_the_layer(name):
    net, image_shape, images = lively(name)
    positions = positions_of(net, image_shape)
    macs = {row.name: row.macs for row in complexity_by_layer(net, image_shape)}
    layers = {key: layer for key, layer in net.named_modules() if key in positions}
    for key, layer in layers.items():
        assert positions[key].macs(layer.weight, None) == macs[key]
    for kind in ("svd", "spatial", "tucker"):
        names = [key for key, layer in layers.items() if kind == "svd" or min((*layer.weight.shape[2:], 1)[:2]) > 1]
        if not names:
            continue
        ranks = {key: list(largest_ranks(layers[key].weight, kind)) for key in names}
        whole = deepcopy(net)
        Factorize(dict.fromkeys(names, kind), ranks).apply_(whole)
        with torch.no_grad():
            assert torch.allclose(whole(images), net(images), atol=1e-3 * float(net(images).abs().max()))
        counted = sum(positions[key].macs(layers[key].weight, kind, tuple(ranks[key])) for key in names)
        counted += sum(positions[key].macs(layer.weight, None) for key, layer in layers.items() if key not in names)
        assert counted == count_macs(whole, image_shape)


@pytest.mark.parametrize("num_images", [0, 8])
@pytest.mark.parametrize("name", ["SmallInception-8", "LeNet5-28x19", *LARGE])
def test_the_budget_is_met_and_a_fresh_net_follows(name, num_images):
    net, image_shape, images = lively(name)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    factorizer = Factorizer(["svd", "spatial", "tucker"], macs_left=0.6, round_to=2, num_images=num_images)
    surgery, weights = factorizer.plan(net, image_shape, images if num_images else None)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items()), "the net stays as it is"
    thin = deepcopy(net)
    surgery.apply_(thin)
    load_(thin, weights)
    left = count_macs(thin, image_shape) / count_macs(net, image_shape)
    assert 0.57 < left <= 0.6
    assert all(rank % 2 == 0 for ranks in surgery.ranks.values() for rank in ranks)
    first, *_, head = (key for key, layer in net.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear))
    assert not {first, head} & set(surgery.kinds)
    fresh = build(name, seed=1).eval()
    replay_(fresh, [to_plain(from_plain(to_plain(surgery)))])
    fresh.load_state_dict(thin.state_dict())
    assert change(thin, fresh, images) == 0 < change(net, thin, images)


def test_responses_kept_change_the_net_less_than_weights_kept():
    net, image_shape, images = lively("SmallInception-8")
    changes = []
    for num_images in (0, 8):
        surgery, weights = Factorizer(macs_left=0.5, round_to=4, num_images=num_images).plan(net, image_shape, images)
        thin = deepcopy(net)
        surgery.apply_(thin)
        load_(thin, weights)
        changes.append(change(net, thin, images))
    assert changes[1] < 0.7 * changes[0]


def test_moments_are_those_of_the_layers_own_responses():
    torch.manual_seed(0)
    conv, images = nn.Conv2d(3, 4, 3, stride=2, padding=1).double(), torch.randn(70, 3, 9, 8, dtype=torch.float64)
    sums = second_moments(nn.Sequential(conv), {"0": {"svd", "spatial"}}, images)
    outputs = conv(images) - conv.bias[:, None, None]
    rows = outputs.movedim(1, -1).flatten(0, -2)
    assert torch.allclose(sums["0", "svd"], rows.T @ rows)
    # every column of pixels, as high as the kernel, by hand
    padded = nn.functional.pad(images, (0, 0, 1, 1))
    patches = padded.unfold(2, 3, 2).permute(0, 2, 3, 1, 4).flatten(3).flatten(0, 2)
    answers = patches @ matrix_of(conv.weight, "spatial").T
    assert torch.allclose(sums["0", "spatial"], answers.T @ answers)


@pytest.mark.parametrize("ranks", ["energy", "vbmf"])
@pytest.mark.parametrize("kinds", [["svd"], ["tucker", "svd"], ["spatial", "svd"]], ids="+".join)
def test_each_layer_on_its_own(ranks, kinds):
    net, image_shape, _ = lively("SmallInception-8")
    name = "blocks.1.branches.conv3x3.1.conv"
    layer = net.get_submodule(name)
    with torch.no_grad():  # of low rank, so that VBMF has something to find
        noise = 0.01 * torch.randn_like(layer.weight)
        layer.weight.copy_(torch.einsum("or,rijk->oijk", torch.randn(layer.out_channels, 3), layer.weight[:3]) + noise)
    surgery, _ = Factorizer(kinds, ranks, energy=0.99, round_to=1, num_images=0, include=[name]).plan(net, image_shape)
    assert list(surgery.kinds) == [name] and surgery.kinds[name] in kinds
    if "spatial" not in kinds:
        assert surgery.ranks[name][-1] == 3
    before = count_macs(net, image_shape)
    surgery.apply_(net)
    assert count_macs(net, image_shape) < before


def test_what_can_not_be_thin_stays():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(1, 16, 3, padding=1)
            self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
            self.tied = nn.Conv2d(16, 16, 3, padding=1)
            self.again = nn.Conv2d(16, 16, 3, padding=1)
            self.again.weight = self.tied.weight
            self.unused = nn.Conv2d(16, 16, 3)
            self.twice = nn.Conv2d(16, 16, 3, padding=1)
            self.fc = nn.Linear(16, 3)

        def forward(self, images: Tensor) -> Tensor:
            return self.fc(self.twice(self.twice(self.again(self.tied(self.grouped(self.stem(images)))))).mean((2, 3)))

    net = Net()
    surgery, _ = Factorizer(macs_left=0.8, round_to=4, num_images=0).plan(net, (1, 8, 8))
    assert list(surgery.kinds) == ["twice"]
    total = count_macs(net, (1, 8, 8))
    surgery.apply_(net)
    assert count_macs(net, (1, 8, 8)) <= 0.8 * total


def test_a_net_that_reads_its_weights_is_refused_with_the_layer():
    class Net(nn.Sequential):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images) * self[1].weight.mean()

    net = Net(nn.Conv2d(1, 16, 3), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(16 * 16, 2))
    with pytest.raises(ValueError, match=r"thin layers for 1 Net no longer runs.*exclude"):
        Factorizer(macs_left=0.6, round_to=1, num_images=0).plan(net, (1, 8, 8))


def test_after_thinning_and_before_it():
    net, image_shape, images = lively("SmallInception-8")
    factorizer = Factorizer(macs_left=0.6, round_to=2, num_images=0)

    def thin_(net: nn.Module) -> object:
        units = {name: list(range(of.num // 4)) for name, of in units_of(net, image_shape).items()}
        for name, of in units_of(net, image_shape).items():
            for parameter in of.parameters:
                net.get_parameter(parameter).data[units[name]] = 0
        plan = plan_thinning(net, units, image_shape)
        plan.apply_(net)
        return plan

    def factorize_(net: nn.Module) -> object:
        plan = factorizer.plan(net, image_shape)[0]
        plan.apply_(net)
        return plan

    for steps in ((thin_, factorize_), (factorize_, thin_)):
        changed, fresh = deepcopy(net), build("SmallInception-8", seed=1)
        plans = [step(changed) for step in steps]
        replay_(fresh, [to_plain(plan) for plan in plans])
        fresh.load_state_dict(changed.state_dict())
        assert change(changed, fresh.eval(), images) == 0
        assert count_macs(changed, image_shape) < 0.5 * count_macs(net, image_shape)


def test_a_plan_for_another_net_is_refused_and_leaves_it_as_it_was():
    net = build("LeNet5-28x19")
    layers = [name for name, layer in net.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    for names, ranks, message in [
        ([layers[0], "block.conv"], [1], "LeNet5 has no convolution or linear layer block.conv"),
        (layers[:2], [1000], rf"{layers[0]} is to get the ranks \[1000\], but has \[20\] at most"),
    ]:
        with pytest.raises(ValueError, match=message):
            Factorize(dict.fromkeys(names, "svd"), dict.fromkeys(names, ranks)).apply_(net)
        assert layers == [name for name, layer in net.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kinds": []}, r"kinds is \[\]: choose some of svd"),
        ({"kinds": ["cp"]}, "kinds is .*cp.*choose some of"),
        ({"ranks": "best"}, "ranks is 'best': choose macs"),
        ({"macs_left": 1.0}, "macs_left is 1.0.*below 1"),
        ({"energy": 0.0}, "energy is 0.0.*above 0"),
        ({"round_to": 0}, "round_to is 0 and"),
        ({"include": ["conv9"]}, "include has 'conv9', which finds no layer"),
        ({"exclude": ["conv9"]}, "exclude has 'conv9', which finds no layer"),
        ({"num_images": 4}, "num_images is 4, but there are no images"),
        ({"macs_left": 0.05}, "Raise macs_left, lower round_to, or exclude fewer layers"),
        ({"ranks": "energy", "energy": 1.0}, "no layer multiplies less"),
    ],
)
def test_bad_input_is_answered_in_one_sentence(options, message):
    net = build("SmallInception-8")
    with pytest.raises(ValueError, match=message):
        Factorizer(**{"num_images": 0, **options}).plan(net, (1, 8, 8))


def test_subclasses_and_layers_that_are_read_stay_and_are_named(caplog) -> None:
    torch.manual_seed(0)
    net, images = Mixed().eval(), torch.randn(8, 3, 8, 8)
    factorizer = Factorizer(macs_left=0.9, round_to=4, num_images=8)
    surgery, factors = factorizer.plan(net, (3, 8, 8), images)
    assert surgery.kinds.keys() <= {"plain", "hidden"} and surgery.kinds
    assert "standard (its class StandardConv" in caplog.text
    surgery.apply_(net)
    load_(net, factors)
    with torch.no_grad():
        net(images)
    with pytest.raises(
        ValueError, match=r"no layer can be factorised: encoder.linear1 .*TransformerEncoderLayer reads"
    ):
        Factorizer(include=["linear[12]"]).plan(Mixed(), (3, 8, 8), images)
    with pytest.raises(ValueError, match=r"no layer can be factorised: scaled .its class ScaledLinear"):
        Factorizer(include=["scaled"]).plan(Mixed(), (3, 8, 8), images)
