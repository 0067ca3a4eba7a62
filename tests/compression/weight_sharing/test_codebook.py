"""Codebooks: few values, zeros apart, gradients summed; and the layers that get them."""

from typing import get_args

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from project.compression import Codebook, Sharer
from project.compression.weight_sharing.kmeans import Start
from project.models import SmallInception


def make_net(channels_last: bool = False) -> nn.Module:
    torch.manual_seed(0)
    net = SmallInception(10, (1, 8, 8), width=0.25)
    return net.to(memory_format=torch.channels_last) if channels_last else net


def prune_(net: nn.Module, share: float = 0.7) -> None:
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() > 1:
                parameter.mul_(parameter.abs() > parameter.abs().flatten().quantile(share))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize(("bits", "start"), [(1, "optimal"), (8, "linear"), *((3, start) for start in get_args(Start))])
def test_few_values_of_float16_and_zeros_where_they_were(bits, start, pruned, channels_last):
    net = make_net(channels_last)
    if pruned:
        prune_(net)
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    names = Sharer(bits=bits, start=start).layers(net)
    Codebook.of(net, names, start).write_(net)
    assert len(names) == 17
    for name, parameter in net.named_parameters():
        if name not in names:
            assert torch.equal(parameter, before[name])
            continue
        assert torch.equal(parameter == 0, before[name] == 0)
        values = parameter[parameter != 0].unique()
        assert len(values) <= 2**bits and torch.equal(values.half().float(), values)
        assert parameter.stride() == before[name].stride()


def test_each_weight_has_the_nearest_value():
    net = make_net()
    before = net.fc.weight.detach().clone()
    codebook = Codebook.of(net, {"fc.weight": 4})
    codebook.write_(net)
    centers = codebook.centers["fc.weight"][1:]
    nearest = centers[(before.unsqueeze(-1) - centers).abs().argmin(-1)]
    assert torch.equal(net.fc.weight, nearest.half().float())


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_center_has_the_sum_of_its_weights_gradients(channels_last):
    """Against autograd through ``centers[index]``, which defines it."""
    net = make_net(channels_last)
    prune_(net)
    codebook = Codebook.of(net, Sharer(bits=3).layers(net))
    codebook.centers = {name: centers.half().float() for name, centers in codebook.centers.items()}
    codebook.write_(net)
    images, labels = torch.randn(16, 1, 8, 8), torch.arange(16) % 10
    cross_entropy(net(images), labels).backward()
    found = codebook.gradients(net)
    leaves = {name: centers.clone().requires_grad_() for name, centers in codebook.centers.items()}
    weights = {name: leaf[codebook.index[name].long()] for name, leaf in leaves.items()}
    cross_entropy(torch.func.functional_call(net, weights, images), labels).backward()
    for name, leaf in leaves.items():
        assert torch.allclose(found[name][1:], leaf.grad[1:], rtol=1e-3, atol=1e-4), name
        assert found[name][0] == 0 and leaf.grad[0] != 0 and found[name][1:].any()


def test_what_is_written_is_gathered():
    net = make_net()
    codebook = Codebook.of(net, Sharer(bits=4).layers(net))
    codebook.write_(net)
    exact = {name: centers.half().float() for name, centers in codebook.centers.items()}
    with torch.no_grad():
        net.fc.weight.mul_(2)
    codebook.gather_(net)
    exact["fc.weight"] *= 2
    assert all(torch.equal(centers, exact[name]) for name, centers in codebook.centers.items())


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_state_is_plain_and_enough(channels_last, tmp_path):
    net, other = make_net(channels_last), make_net()
    codebook = Codebook.of(net, Sharer(bits=8).layers(net), "linear")
    codebook.write_(net)
    torch.save(codebook.state_dict(), tmp_path / "state.pt")
    loaded = Codebook.from_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    loaded.write_(other)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


def test_layers_by_expressions():
    net = make_net()
    chosen = Sharer(bits=5, layer_bits={"stem": 8, "fc": 6}, exclude=["pool"]).layers(net)
    assert chosen["stem.0.conv.weight"] == 8 and chosen["fc.weight"] == 6
    assert set(chosen.values()) == {5, 6, 8} and not any("pool" in name for name in chosen)
    assert list(Sharer(include=["^fc$"]).layers(net)) == ["fc.weight"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 0}, "bits is 0"),
        ({"bits": 9}, "bits is 9"),
        ({"layer_bits": {"fc": 12}}, "layer_bits is 12"),
        ({"budget_bytes": 0}, "budget_bytes is 0"),
        ({"budget_bytes": 1000, "layer_bits": {"fc": 5}}, "drop one"),
        ({"num_images": 0}, "num_images is 0"),
    ],
)
def test_numbers_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Sharer(**options)


def test_expressions_that_find_nothing_are_refused():
    net = make_net()
    with pytest.raises(ValueError, match=r"exclude has 'head', which finds no layer: there are"):
        Sharer(exclude=["head"]).layers(net)
    with pytest.raises(ValueError, match="no layer is left"):
        Sharer(exclude=[".*"]).layers(net)


def test_weights_that_can_not_be_shared_are_refused():
    net = make_net()
    for value, message in ((0.0, "all weights of fc.weight are 0"), (1e6, "beyond float16"), (float("nan"), "NaN")):
        with torch.no_grad():
            net.fc.weight.fill_(value)
        with pytest.raises(ValueError, match=message):
            Codebook.of(net, {"fc.weight": 4})
