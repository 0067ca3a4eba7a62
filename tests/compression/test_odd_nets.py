"""Unusual nets in each technique: it works as it should, or one sentence before the first step says what to do."""

import copy
import resource

import pytest
import torch
from helpers import odd_nets
from helpers.nets import choose
from torch import nn
from torch.nn.utils import parametrize
from torchvision.models import SwinTransformer
from torchvision.models.shufflenetv2 import ShuffleNetV2

from project.callbacks import TernaryWeights, XNORNet
from project.compression import Factorizer, Pruner, Sharer, WinogradChooser
from project.compression.low_bit.ternary import LowBitWeights
from project.compression.plain_layers import check_plain, computes_as_plain, is_plain
from project.compression.qat.fake_quantization import FakeQuantization
from project.compression.thinning.units import look_at_units, plan_thinning
from project.metrics.complexity import count_macs

SHAPE = (3, 16, 16)
COMPUTED = ["WeightNorm", "SpectralNorm", "HookedNorm"]
NEEDS_A_PARAMETER = {
    "TernaryWeights": lambda net, exclude: TernaryWeights(exclude=exclude)._layers(net),
    "pruning": lambda net, exclude: Pruner(exclude=exclude).groups(net, SHAPE),
    "weight sharing": lambda net, exclude: Sharer(exclude=exclude).layers(net),
}
NEEDS_A_PLAIN_LAYER = {
    "XNORNet": lambda net, exclude: XNORNet(exclude=exclude)._layers(net),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return getattr(odd_nets, name)().eval()


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("name", COMPUTED)
@pytest.mark.parametrize("technique", [*NEEDS_A_PARAMETER, *NEEDS_A_PLAIN_LAYER])
def test_a_computed_weight_is_refused_by_name(technique, name):
    find = (NEEDS_A_PARAMETER | NEEDS_A_PLAIN_LAYER)[technique]
    with pytest.raises(ValueError, match=f"the weight of odd is computed.*{technique} cannot.*exclude"):
        find(build(name), ["^fc$"])
    assert find(build(name), ["^odd$", "^stem$"])


@pytest.mark.parametrize("technique", NEEDS_A_PLAIN_LAYER)
def test_a_subclass_is_refused_by_name(technique):
    with pytest.raises(ValueError, match=f"odd is a StandardisedConv2d, and {technique} knows only.*exclude"):
        NEEDS_A_PLAIN_LAYER[technique](build("Standardised"), ["^fc$"])
    assert NEEDS_A_PLAIN_LAYER[technique](build("Standardised"), ["^odd$"]) == ["stem", "last", "fc"]


def test_layers_that_torch_reads_are_not_replaced():
    """Torch's encoder reads the weights of its layers in evaluation; a wrapped layer has none."""
    net = nn.Sequential()
    net.encoder, net.head = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 10)
    with pytest.raises(ValueError, match=r"XNORNet cannot replace encoder\.linear1 \(torch's Trans.*exclude"):
        XNORNet(exclude=["head", "out_proj"])._layers(net)
    assert XNORNet(exclude=["encoder"])._layers(net) == ["head"]


def test_many_layers_are_one_sentence():
    net = nn.Sequential(*(odd_nets.StandardisedConv2d(3, 3, 1) for _ in range(5)))
    with pytest.raises(ValueError, match=r"^0 \(and 4 more\) is a StandardisedConv2d"):
        check_plain(net, [str(number) for number in range(5)], "It")


def test_attention_reads_its_weight_itself():
    """The output layer of attention is a subclass that never runs."""
    attention = nn.MultiheadAttention(4, 2)
    assert not is_plain(attention.out_proj) and not computes_as_plain(attention.out_proj)
    assert is_plain(nn.Linear(2, 2)) and is_plain(nn.LazyLinear(2)) is False


STAYS = {
    "WeightNorm": {"stem": "a convolution with another weight reads it", "odd": "it meets a tensor that is not sliced"},
    "SpectralNorm": {"odd": "it passes through vdot in odd.parametrizations.weight.0, which has no rule"},
    "Standardised": {},
    "FirstChannelsTwice": {"odd": "it meets a tensor in the net that is not sliced with it"},
    "TrainingHead": {"odd": "it no longer runs in training", "auxiliary": "the net does not call it in evaluation"},
    "ScalePerChannel": {},
    "Shuffled": {},
    "HiddenBuffer": {},
    "PlainTensor": {},
}
"""The layers of each net whose units stay, beside the head, and why."""


@pytest.mark.parametrize("name", STAYS)
def test_units_that_stay_are_named_and_the_rest_goes(name):
    net = build(name)
    state = torch.random.get_rng_state()
    units, reasons = look_at_units(net, SHAPE)
    assert torch.equal(torch.random.get_rng_state(), state) and not net.training
    assert reasons.keys() == {"fc", *STAYS[name]} and set(units) == {"stem", "odd", "last"} - {*reasons}
    assert all(why in reasons[layer] for layer, why in STAYS[name].items())
    if "odd" in reasons:
        with pytest.raises(
            ValueError, match=r"units of odd, which include names, cannot be removed: .*Take this layer"
        ):
            Pruner(structure="units", include=["odd", "last"]).groups(net, SHAPE)
    plan_thinning(net, choose(units, 0.5), SHAPE).apply_(net)
    net.train()(torch.randn(2, *SHAPE)).sum().backward()
    assert net.last.out_channels == 4


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_units_of_a_net_that_cannot_be_copied_are_refused():
    with pytest.raises(ValueError, match="cannot be copied, because a layer's weight is computed by a hook"):
        look_at_units(build("HookedNorm"), SHAPE)


@torch.no_grad()
@pytest.mark.parametrize("name", ["WeightNorm", "SpectralNorm", "Standardised"])
def test_low_rank_and_winograd_leave_odd_layers_alone(name):
    net = build(name)
    factorizer = Factorizer(ranks="energy", energy=0.5, round_to=1, num_images=0, exclude=["^stem$", "^fc$"])
    assert list(factorizer.plan(net, SHAPE)[0].kinds) == ["last"]
    assert list(WinogradChooser().layers(net)) == ["stem", "last"]
    with pytest.raises(ValueError, match=r"no layer can be factorised: odd \(its"):
        Factorizer(num_images=0, include=["^odd$"]).check(net, SHAPE)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_low_rank_refuses_a_net_that_cannot_be_copied():
    for use in (Factorizer(num_images=0).check, Factorizer(num_images=0).plan):
        with pytest.raises(ValueError, match="HookedNorm cannot be copied, because a layer's weight is computed"):
            use(build("HookedNorm"), SHAPE)


def test_a_computed_bias_is_not_plain():
    layer = nn.Linear(2, 2)
    parametrize.register_parametrization(layer, "bias", nn.Tanh())
    assert computes_as_plain(layer) and not is_plain(layer)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("name", [*COMPUTED, "Standardised", "Plain"])
def test_fake_quantization_keeps_what_a_layer_computes(name):
    """Eight bits change the logits a little; a plain convolution in place of a subclass would change them by 100 %."""
    net, images = build(name), torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(1))
    expected = net(images)
    fake = FakeQuantization()
    assert list(fake.left_out(net, SHAPE)) == (["odd"] if name == "Standardised" else [])
    for layer in ("stem", "odd", "last", "fc"):
        fake.ranges = {**fake.ranges, layer: (-8.0, 8.0)}
    fake.attach_(net)
    rounded = net(images)
    assert 0 < (rounded - expected).abs().max() < 0.15 * expected.abs().max()
    fake.detach_()
    assert torch.equal(net(images), expected)


def test_nothing_to_round_is_refused():
    with pytest.raises(ValueError, match=r"no layer can be rounded: 0 \(its class StandardisedConv2d.*Leave"):
        FakeQuantization.left_out(nn.Sequential(odd_nets.StandardisedConv2d(3, 3, 1)), SHAPE)
    with pytest.raises(ValueError, match="no layer can be rounded: Sequential has no convolution"):
        FakeQuantization.left_out(nn.Sequential(nn.Flatten()), SHAPE)
    with pytest.raises(ValueError, match="has no convolution and no linear layer"):
        TernaryWeights()._layers(nn.Sequential(nn.Flatten()))


@torch.no_grad()
@pytest.mark.parametrize("exclude", [["^odd$", "^fc$"], ["^fc$"]])
def test_ternary_weights_round_what_is_written(exclude):
    """A subclass computes with the rounded weight as it does with any other."""
    net, images = build("Standardised"), torch.randn(2, *SHAPE)
    low_bit = LowBitWeights("twn", TernaryWeights(exclude=exclude)._layers(net))
    low_bit.attach_(net)
    attached = net(images)
    low_bit.detach_()
    written = net.state_dict()
    low_bit.write_(written)
    net.load_state_dict(written)
    assert torch.allclose(net(images), attached, atol=1e-6) and not parametrize.is_parametrized(net.last)


def test_half_of_a_shuffle_net_goes():
    net = ShuffleNetV2([2, 1, 1], [8, 16, 16, 16, 32], num_classes=10).eval()
    units, reasons = look_at_units(net, (3, 32, 32))
    layers = {name for name, layer in net.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
    assert {layer for each in units.values() for layer in each.layers} == layers - {"fc"} and reasons.keys() == {"fc"}
    whole = count_macs(net, (3, 32, 32))
    plan_thinning(net, choose(units, 0.5), (3, 32, 32)).apply_(net)
    assert count_macs(net, (3, 32, 32)) < 0.5 * whole


def test_half_of_a_swin_transformer_goes():
    """Its attention computes the width of a head from that of the tokens, so that heads go with their features."""
    net = SwinTransformer([2, 2], 8, [1, 1], [1, 2], [4, 4], num_classes=10).eval()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    units, reasons = look_at_units(net, SHAPE)
    assert reasons.keys() == {"head"}
    whole = count_macs(net, SHAPE)
    plan_thinning(net, choose(units, 0.5), SHAPE).apply_(net)  # raises if it is not the masked net
    assert count_macs(net, SHAPE) < 0.5 * whole
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kilobytes


def test_a_net_that_is_mostly_its_head_says_what_is_left():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 8, 1), nn.Flatten(), nn.Linear(8 * 256, 200))
    for check in (Factorizer(num_images=0).check, Factorizer(num_images=0).plan):
        words = r"macs_left is 0\.5, but at least 1 of the net's.*0\.982 are in 2 layers .*the largest is 3"
        with pytest.raises(ValueError, match=words):
            check(net, SHAPE)
    with pytest.raises(ValueError, match="has no layer that can be factorised"):
        Factorizer(num_images=0).check(copy.deepcopy(net[:1]), SHAPE)
    Factorizer(num_images=0, exclude=["^0$"], macs_left=0.5).check(net, SHAPE)
