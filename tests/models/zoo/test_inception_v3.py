from functools import partial

import pytest
import torch
from torch import nn

from project.metrics.complexity import count_macs, count_parameters
from project.models import BatchNorm, InceptionV3


@pytest.fixture(scope="module")
def reference() -> nn.Module:
    from torchvision.models import inception_v3

    return inception_v3(weights=None, aux_logits=False, init_weights=False).eval()


@pytest.mark.parametrize("side", [75, 107])
def test_torchvision_s_weights_give_torchvision_s_logits(reference: nn.Module, side: int) -> None:
    torch.manual_seed(0)
    net = InceptionV3(
        1000, (3, side, side), norm=partial(BatchNorm, eps=1e-3), weight_init=lambda weight: weight.detach()
    )
    theirs, ours = reference.state_dict(), net.state_dict()
    assert [tuple(tensor.shape) for tensor in ours.values()] == [tuple(tensor.shape) for tensor in theirs.values()]
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the statistics of one batch as they are, so that signals keep their scale
    # Both list their layers in the paper's order, so that the names need no table.
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        reference.train()(images)
        expected = reference.eval()(images)
        net.load_state_dict(dict(zip(ours, reference.state_dict().values(), strict=True)))
        logits = net.eval()(images)
    assert expected.std() > 0.1 * expected.abs().max(), "the comparison sees more than the last bias"
    torch.testing.assert_close(logits, expected, atol=1e-4 * expected.abs().max().item(), rtol=1e-4)


def test_costs_are_those_of_the_published_net() -> None:
    with torch.device("meta"):
        net = InceptionV3(1000, (3, 299, 299), weight_init=lambda weight: weight)
    assert count_parameters(net) == 23_834_568
    # 5.713 G in torchvision's table of models; the paper says "5 billion multiply-adds".
    assert count_macs(net, (3, 299, 299)) == 5_713_216_096


def test_maps_have_the_table_s_sizes() -> None:
    with torch.device("meta"):
        net = InceptionV3(1000, (3, 299, 299), weight_init=lambda weight: weight)
        x = net.stem(torch.zeros(2, 3, 299, 299))
        sizes = {"stem": tuple(x.shape[1:])}
        for name, block in net.blocks.named_children():
            x = block(x)
            sizes[name] = tuple(x.shape[1:])
    assert sizes["stem"] == (192, 35, 35)
    assert sizes["inception_5d"] == (288, 35, 35)
    assert sizes["inception_6a"] == sizes["inception_6e"] == (768, 17, 17)
    assert sizes["inception_7a"] == (1280, 8, 8)
    assert sizes["inception_7c"] == (2048, 8, 8)


def test_state_dict_keys_are_stable() -> None:
    with torch.device("meta"):
        keys = list(InceptionV3(10, (3, 75, 75), width=0.125, weight_init=lambda weight: weight).state_dict())
    assert len(keys) == 94 * 6 + 2
    assert keys[0] == "stem.conv1.conv.weight"
    assert "blocks.inception_5b.branches.middle.1.conv.weight" in keys
    assert "blocks.inception_7c.branches.long.2.1.norm.running_var" in keys
    assert keys[-2:] == ["fc.weight", "fc.bias"]
