"""Weights that lead nowhere: none is left, no other goes, and the net computes what it did."""

from itertools import pairwise

import pytest
import torch
from helpers.nets import build, images_for
from torch import Tensor, nn

from project.compression import Iterative, Pruner, apply_masks_, sparsity
from project.compression.pruning.dead_ends import without_dead_ends

NAMES = ["SmallInception-28", "BNGoogLeNet-48", "InceptionV3-75", "LeNet300100-9x5", "LeNet5-28x19", "normed vectors"]
CAUTIOUS = ["BNGoogLeNet-48", "InceptionV3-75", "residual"]
"""Where not all dead ends are found: a reader may have nothing left but taps that see no pixel of a tiny map, only
padding, and units that are added up count as read if any of them is.
"""


class Residual(nn.Module):
    """Two layers whose units are added up."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
        self.middle, self.fc = nn.Conv2d(8, 12, 1), nn.Linear(12, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images).relu()
        return self.fc(self.middle(x + self.block(x).relu()).relu().mean((2, 3)))


def net_of(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    if name == "residual":
        return Residual().eval(), torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return build(name).eval(), images_for(name)


def random_masks(net: nn.Module, pruner: Pruner, shape: tuple[int, int, int], share: float) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    names = [group.parameters[0] for group in pruner.groups(net, shape)]
    return {name: (torch.rand(net.get_parameter(name).shape, generator=generator) > share).float() for name in names}


def leads_somewhere(net: nn.Module, names: list[str], images: Tensor) -> dict[str, Tensor]:
    """Of each weight (of convolutions, each pair of channels: the outer taps see no pixel of a tiny map): with all that
    is left positive, and every unit at work, do the logits feel it? (The gradient of Tanaka et al. 2020,
    arXiv:2006.05467, sec. 4.)
    """
    net = net.double()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if parameter.dim() > 1:
                parameter.copy_((parameter.abs() if name not in names else parameter != 0) / parameter[0].numel())
            else:
                parameter.fill_(0.1)
    for module in net.modules():
        if isinstance(module, nn.MaxPool2d):  # passes to one pixel alone
            module.forward = lambda x, pool=module: nn.functional.avg_pool2d(  # type: ignore[method-assign]
                x, pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode
            )
    net(torch.ones_like(images[:1]).double()).sum().backward()
    gradients = {name: net.get_parameter(name).grad for name in names}
    return {
        name: (g != 0).view(*g.shape[:2], -1).any(2).view(*g.shape[:2], *[1] * (g.dim() - 2))
        for name, g in gradients.items()
    }


@pytest.mark.parametrize("share", [0.6, 0.95])
@pytest.mark.parametrize("name", [*NAMES, "residual"])
def test_the_net_computes_the_same_bits_and_what_is_left_leads_somewhere(name, share):
    net, images = net_of(name)
    shape = tuple(images.shape[1:])
    pruner = Pruner(budget="effective", exclude=[])
    before = random_masks(net, pruner, shape, share)
    after = without_dead_ends(net, pruner.groups(net, shape), before)
    apply_masks_(net, before)
    with torch.no_grad():
        expected = net(images)
        apply_masks_(net, after)
        assert torch.equal(net(images), expected)
    net, _ = net_of(name)
    apply_masks_(net, before)
    live = leads_somewhere(net, list(before), images)
    for weight in before:
        expected = before[weight].bool() & live[weight]
        assert not (expected & ~after[weight].bool()).any(), f"{weight} has lost what leads somewhere"
        if name not in CAUTIOUS:
            assert torch.equal(after[weight].bool(), expected), f"{weight} has dead ends"
    if share > 0.9:
        assert sparsity(after, net) > sparsity(before, net)


def test_biases_and_norms_of_dead_ends_go_and_all_others_stay():
    net, images = net_of("normed vectors")
    pruner = Pruner(budget="effective", exclude=[])
    groups = pruner.groups(net, tuple(images.shape[1:]))
    masks = {group.parameters[0]: torch.ones_like(net.get_parameter(group.parameters[0])) for group in groups}
    masks["fc3.weight"][:, [3, 7]] = 0
    found = without_dead_ends(net, groups, masks)
    for name in ("fc2.weight", "norm2.weight", "norm2.bias"):
        rows = found[name].view(len(found[name]), -1)
        assert (rows == 0).all(1).nonzero().flatten().tolist() == [3, 7]
        assert int((rows != 0).sum()) == (len(rows) - 2) * rows.shape[1]
    assert found["fc1.weight"].all() and found["norm1.bias"].all()
    assert masks["fc2.weight"].all(), "the masks that were given are as they were"


def test_layers_that_are_not_pruned_read_everything_and_stay_whole():
    net, images = net_of("LeNet5-28x19")
    shape = tuple(images.shape[1:])
    pruner = Pruner(budget="effective", exclude=["fc2", "conv2"])
    groups = pruner.groups(net, shape)
    masks = without_dead_ends(net, groups, random_masks(net, pruner, shape, 0.995))
    assert [group.layer for group in groups] == ["conv1.conv", "fc1"]
    assert set(masks) == {"conv1.conv.weight", "conv1.conv.bias", "fc1.weight", "fc1.bias"}
    assert masks["conv1.conv.bias"].all() and masks["fc1.bias"].all()


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_rounds_end_at_the_schedules_share_of_what_leads_somewhere(scope):
    """Dead ends that a round takes beyond its share are what the next one need not take."""
    net, images = net_of("LeNet5-28x19")
    shape = tuple(images.shape[1:])
    pruner, schedule = Pruner(budget="effective", scope=scope, exclude=[], keep=0.01), Iterative(0.5, 6)
    groups, masks = pruner.groups(net, shape), {}
    gone, overshot = [0.0], 0
    for number in range(6):
        before = masks
        masks = pruner.prune(net, groups, masks, schedule.amount(number, gone[-1]))
        gone.append(pruner.share_gone(net, groups, masks))
        assert gone[-1] > schedule.level(number) - 1e-4
        overshot += gone[-1] > schedule.level(number) + 1e-4
        assert all((masks[name] <= mask).all() for name, mask in before.items())
        again = without_dead_ends(net, groups, masks)
        assert all(torch.equal(again[name], mask) for name, mask in masks.items())
    assert all(before < after for before, after in pairwise(gone))
    assert overshot and gone[-1] < schedule.level(-1) + 0.005


@pytest.mark.parametrize(("structure", "scope"), [("units", "global"), ("units", "layer"), ("weights", "deviation")])
def test_what_counts_no_weights_is_refused(structure, scope):
    with pytest.raises(ValueError, match=r"budget is effective, but structure is .* set structure: weights"):
        Pruner(structure, scope=scope, budget="effective")
