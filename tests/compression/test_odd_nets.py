"""Unusual nets in each technique: it works as it should, or one sentence before the first step says what to do."""

import copy
import resource

import pytest
import torch
from helpers import odd_nets
from torch import nn
from torch.nn.utils import parametrize
from torchvision.models import SwinTransformer
from torchvision.models.shufflenetv2 import ShuffleNetV2

from project.callbacks import TernaryWeights, XNORNet
from project.compression import Factorizer, Pruner, Sharer, WinogradChooser
from project.compression.low_bit.ternary import LowBitWeights
from project.compression.plain_layers import check_plain, computes_as_plain, is_plain
from project.compression.qat.fake_quantization import FakeQuantization
from project.compression.thinning.thin import look_at_units, plan_thinning

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


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("name", [*COMPUTED, "Standardised"])
def test_units_around_an_odd_layer_are_refused(name):
    net = build(name)
    if name == "HookedNorm":
        with pytest.raises(ValueError, match="cannot be copied, because a layer's weight is computed by a hook"):
            look_at_units(net, SHAPE)
        return
    units, reasons = look_at_units(net, SHAPE)
    assert "last" in units and "odd" in reasons["stem"] and "odd" in reasons["odd"]


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


@pytest.mark.parametrize("name", ["ScalePerChannel", "FirstChannelsTwice"])
def test_constants_of_a_channel_are_found_before_training(name):
    net = build(name)
    units, reasons = look_at_units(net, SHAPE)
    assert set(units) == {"stem", "last"} and "it no longer runs" in reasons["odd"]
    with pytest.raises(ValueError, match=r"units of odd can not be removed: without some of them.*exclude"):
        Pruner(structure="units", exclude=["^fc$"]).groups(net, SHAPE)
    plan_thinning(net, {"stem": [0, 3], "last": [1]}, SHAPE).apply_(net)
    assert net(torch.randn(2, *SHAPE)).shape == (2, 10)


def test_channel_shuffles_are_refused_and_the_rest_is_pruned():
    units, reasons = look_at_units(build("Shuffled"), SHAPE)
    assert {"stem", "last"} <= set(units) and "odd" in reasons
    net = ShuffleNetV2([2, 1, 1], [8, 16, 16, 16, 32], num_classes=10)
    units, reasons = look_at_units(net, (3, 32, 32))
    assert list(units) == ["conv5.0"] and "fc" in reasons


def test_the_trace_of_a_swin_transformer_ends():
    net = SwinTransformer([2, 2], 8, [1, 1], [1, 2], [4, 4], num_classes=10)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    units, reasons = look_at_units(net, SHAPE)
    assert set(units) == {"features.1.0.mlp.0", "features.3.0.mlp.0"}
    assert any("a loop in which the trace finds no end" in reason for reason in reasons.values())
    plan_thinning(net, {"features.1.0.mlp.0": [0, 3]}, SHAPE).apply_(net)  # raises if it is not the masked net
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kilobytes


def test_a_net_that_is_mostly_its_head_says_what_is_left():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 8, 1), nn.Flatten(), nn.Linear(8 * 256, 200))
    for check in (Factorizer(num_images=0).check, Factorizer(num_images=0).plan):
        with pytest.raises(
            ValueError, match=r"macs_left is 0\.5, but at least 1 of .*0\.982 are in 2 layers .*the largest is 3"
        ):
            check(net, SHAPE)
    with pytest.raises(ValueError, match="has no layer that can be factorised"):
        Factorizer(num_images=0).check(copy.deepcopy(net[:1]), SHAPE)
    Factorizer(num_images=0, exclude=["^0$"], macs_left=0.5).check(net, SHAPE)
