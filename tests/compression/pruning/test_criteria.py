"""Each criterion against a loop, a formula of its paper, or Torch-Pruning."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from project.compression import NormScaleL1, Pruner, Units, units_of
from project.compression.pruning import saliency
from project.compression.pruning.gradients import readable_at_inputs
from project.compression.pruning.norm_scales import norm_scales
from project.compression.pruning.saliency import FOR_UNITS, OF_IMAGES, saliency_of_units, saliency_of_weights
from project.models import SmallInception

SHAPE = (2, 8, 8)


class Residual(nn.Module):
    """Channels that a shortcut shares, that their own block reads, a depthwise convolution, and a linear reader."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
        self.square = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6))
        self.wide = nn.Sequential(nn.Conv2d(6, 9, 1), nn.GroupNorm(9, 9), nn.Hardswish())
        self.depthwise = nn.Conv2d(9, 9, 3, padding=1, groups=9)
        self.narrow = nn.Conv2d(9, 6, 1)
        self.fc = nn.Linear(6 * 9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.square(x))
        x = x + self.narrow(self.depthwise(self.wide(x)))
        return self.fc(nn.functional.max_pool2d(x, 2).flatten(1))


def plain() -> nn.Sequential:
    """Convolutions and a linear layer in a row, each with a norm."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 7, 3, bias=False)]
    net = nn.Sequential(*layers, nn.BatchNorm2d(7), nn.ReLU(), nn.Flatten(), nn.Linear(7 * 16, 5))
    return trained(net)


def trained(net: nn.Module) -> nn.Module:
    """With scales, shifts and statistics as after a while of training."""
    for norm in (module for module in net.modules() if isinstance(module, nn.BatchNorm2d | nn.GroupNorm)):
        nn.init.normal_(norm.weight, 1, 0.4)
        nn.init.normal_(norm.bias, 0, 0.4)
    for _ in range(4):
        net(torch.randn(8, *SHAPE))
    return net


def residual() -> nn.Module:
    torch.manual_seed(0)
    return trained(Residual())


def double(net: nn.Module) -> tuple[nn.Module, dict[str, Units], Tensor, Tensor]:
    """The net in double precision, its units, and images with labels, more than one chunk."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(40, *SHAPE, generator=generator, dtype=torch.float64)
    units = units_of(net, SHAPE)
    return net.double(), units, images, torch.randint(0, 5, (40,), generator=generator)


def entries(net: nn.Module, units: Units, unit: int) -> dict[str, Tensor]:
    """For each weight, whether each entry belongs to the unit."""
    found = {name: torch.zeros_like(weight, dtype=torch.bool) for name, weight in net.named_parameters()}
    for (name, dim), indices in units.slices.items():
        if name in found:
            found[name].movedim(dim, 0)[indices[unit]] = True
    return {name: mask for name, mask in found.items() if mask.dim() > 1}


# -- of the weights alone --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [plain, residual])
def test_norms_of_units_are_those_of_a_loop_over_their_entries(make):
    net, units, *_ = double(make())
    for name, layer in product(("magnitude", "l2"), units):
        score = saliency_of_units(net, units, name, None, None, 0)[layer]
        for unit in range(units[layer].num):
            mine = entries(net, units[layer], unit)
            values = torch.cat([net.get_parameter(key)[mask].detach() for key, mask in mine.items()])
            expected = values.abs().mean() if name == "magnitude" else values.norm()
            torch.testing.assert_close(score[unit], expected)


def test_the_residual_net_has_a_weight_that_makes_and_reads_its_units():
    """Else the loop above says nothing about weights that count once."""
    units = units_of(residual(), SHAPE)["stem.0"]
    assert {("square.0.weight", 0), ("square.0.weight", 1)} <= set(units.slices)
    assert units.layers == ("stem.0", "square.0", "narrow")


def lamp_by_hand(squares: list[float]) -> list[float]:
    """Eq. 3 of the paper, for distinct weights."""
    return [square / math.fsum(other for other in squares if other >= square) for square in squares]


def test_lamp_of_weights_is_that_of_the_paper():
    net = plain().double()
    weight = net.get_parameter("3.weight")
    with torch.no_grad():
        weight[0, :2] = 0  # pruned before
    score = saliency_of_weights(net, ["3.weight"], "lamp", None, None, 0)["3.weight"]
    expected = lamp_by_hand(weight.detach().square().flatten().tolist())
    torch.testing.assert_close(score.flatten(), torch.tensor(expected, dtype=torch.float64))
    assert score.max() == 1
    assert not score[0, :2].any()


def test_lamp_of_zeros_is_zero():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    nn.init.zeros_(net[1].weight)
    assert not saliency_of_weights(net, ["1.weight"], "lamp", None, None, 0)["1.weight"].any()


def test_lamp_of_equal_weights_ranks_them_one_after_the_other():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 1))
    nn.init.ones_(net[1].weight)
    score = saliency_of_weights(net, ["1.weight"], "lamp", None, None, 0)["1.weight"]
    torch.testing.assert_close(score, torch.tensor([[1 / 4, 1 / 3, 1 / 2, 1]]))


def test_lamp_of_units_is_that_of_their_squared_norms():
    net, units, *_ = double(residual())
    norms, scores = (saliency_of_units(net, units, name, None, None, 0) for name in ("l2", "lamp"))
    for layer, score in scores.items():
        expected = lamp_by_hand(norms[layer].square().tolist())
        torch.testing.assert_close(score, torch.tensor(expected, dtype=torch.float64))


def test_geometric_median_is_the_sum_of_distances():
    net, units, *_ = double(residual())
    for layer, score in saliency_of_units(net, units, "geometric_median", None, None, 0).items():
        expected = torch.zeros(units[layer].num, dtype=torch.float64)
        for (name, dim), indices in units[layer].slices.items():
            if name in dict(net.named_parameters()) and (weight := net.get_parameter(name).detach()).dim() > 1:
                for one, other in product(range(len(indices)), repeat=2):
                    pair = (weight.index_select(dim, indices[unit]) for unit in (one, other))
                    expected[one] += (next(pair) - next(pair)).square().sum().sqrt()
        torch.testing.assert_close(score, expected)


def test_a_unit_between_the_others_goes_first():
    """The geometric median itself, though its norm is not the least."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2, bias=False))
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[1.0, 0], [2, 0], [3, 0]]))
        net[3].weight.fill_(1)
    units = units_of(net, (1, 1, 2))
    assert saliency_of_units(net, units, "geometric_median", None, None, 0)["1"].argmin() == 1
    assert saliency_of_units(net, units, "l2", None, None, 0)["1"].argmin() == 0


def test_norm_scales_add_up_over_all_norms_of_a_unit():
    net, units, *_ = double(residual())
    scores = saliency_of_units(net, units, "norm_scale", None, None, 0)
    first, second, third = (norm.weight.detach().abs() for norm in (net.stem[1], net.square[1], net.wide[1]))
    torch.testing.assert_close(scores["stem.0"], first + second)
    torch.testing.assert_close(scores["wide.0"], third)


def test_units_without_a_norm_are_refused_by_name():
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.Flatten())
    net.append(nn.Linear(5 * 16, 5))
    pruner = Pruner("units", "norm_scale", round_to=1)
    with pytest.raises(ValueError, match=r"cannot score 0 \(no norm scales its units\): exclude"):
        pruner.prune(net, pruner.groups(net, SHAPE), {}, 0.5)
    pruner = Pruner("units", "norm_scale", round_to=1, exclude=["^0", "^5"])
    assert pruner.prune(net, pruner.groups(net, SHAPE), {}, 0.4)


@pytest.mark.parametrize(
    ("name", "ours", "options"),
    [
        ("MagnitudeImportance", "magnitude", {"p": 1}),
        ("MagnitudeImportance", "l2", {"p": 2}),
        ("BNScaleImportance", "norm_scale", {}),
        ("LAMPImportance", "lamp", {}),
        ("FPGMImportance", "geometric_median", {"p": 1}),
        ("GroupTaylorImportance", "gradient_sum", {}),
    ],
)
def test_the_order_of_units_is_that_of_torch_pruning(name, ours, options):
    tp = pytest.importorskip("torch_pruning")
    net, units, images, labels = double(plain())
    if ours == "geometric_median":  # theirs takes the distances of absolute weights, which the paper does not
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.abs_()
    net.eval()
    nn.functional.cross_entropy(net(images), labels).backward()
    if ours == "norm_scale":
        options = {"group_reduction": "sum", "normalizer": None}
    else:
        kinds = [nn.modules.conv._ConvNd, nn.Linear]  # without the scales of norms, which we do not count
        options = {**options, "group_reduction": "sum", "normalizer": "lamp" if ours == "lamp" else None}
    importance = getattr(tp.importance, name)(**options)
    if ours != "norm_scale":
        importance.target_types = kinds
    graph = tp.DependencyGraph().build_dependency(net, example_inputs=images[:1])
    scores = saliency_of_units(net, units, ours, images, labels, 0)
    for layer, score in scores.items():
        if (layer, ours) == ("3", "geometric_median"):
            continue  # theirs compares each of the 16 inputs of the linear layer that a unit fills with the others
        module = net.get_submodule(layer)
        group = graph.get_pruning_group(module, tp.prune_conv_out_channels, list(range(len(score))))
        theirs = importance(group).double()
        shares = score.square() if ours == "l2" else score
        torch.testing.assert_close(theirs / theirs.sum(), shares / shares.sum(), rtol=1e-5, atol=1e-7)


# -- with gradients --------------------------------------------------------------------------------------------------


def gradient_of_each(net: nn.Module, images: Tensor, labels: Tensor) -> list[dict[str, Tensor]]:
    """The gradients of single images, by a plain backward pass each."""
    net.eval()
    found = []
    for image, label in zip(images, labels, strict=True):
        loss = nn.functional.cross_entropy(net(image[None]), label[None])
        named = dict(net.named_parameters())
        found.append(dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True)))
    return found


def test_taylor_of_weights_is_the_mean_of_squares():
    net, _, images, labels = double(plain())
    gradients = gradient_of_each(net, images, labels)
    score = saliency_of_weights(net, ["3.weight"], "taylor", images, labels, 0)["3.weight"]
    weight = net.get_parameter("3.weight").detach()
    torch.testing.assert_close(score, torch.stack([(weight * each["3.weight"]).square() for each in gradients]).mean(0))


def test_gradient_sum_adds_up_the_weights_of_a_unit():
    net, units, images, labels = double(residual())
    gradients = gradient_of_each(net, images, labels)
    products = {
        name: (parameter.detach() * torch.stack([each[name] for each in gradients]).mean(0)).abs()
        for name, parameter in net.named_parameters()
    }
    for layer, score in saliency_of_units(net, units, "gradient_sum", images, labels, 0).items():
        for unit in range(units[layer].num):
            mine = entries(net, units[layer], unit)
            torch.testing.assert_close(score[unit], sum(products[name][mask].sum() for name, mask in mine.items()))


@pytest.mark.parametrize("make", [plain, residual])
@pytest.mark.parametrize("criterion", ["taylor", "gradient"])
def test_gates_of_units_by_a_loop_over_images(make, criterion):
    net, units, images, labels = double(make())
    gradients = gradient_of_each(net, images, labels)
    for layer, score in saliency_of_units(net, units, criterion, images, labels, 0).items():
        each = units[layer]
        slopes = torch.zeros(len(images), each.num, dtype=torch.float64)
        for (name, dim), number in product(each.read, range(len(images))):
            products = (net.get_parameter(name).detach() * gradients[number][name]).movedim(dim, 0).flatten(1).sum(1)
            slopes[number] += products[each.slices[name, dim]].sum(1)
        torch.testing.assert_close(score, slopes.square().mean(0) if criterion == "taylor" else slopes.mean(0).abs())


class Tokens(nn.Module):
    """Linear readers of tokens, of tokens before images, and a convolution with groups."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(2, 8, 2, 2)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.first, self.second = nn.Linear(8, 10), nn.Linear(10, 8)
        self.grouped = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2))
        self.twice = nn.Linear(6, 6)
        self.fc = nn.Sequential(nn.Linear(8, 6), nn.ReLU())
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x)
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + self.down(torch.relu(self.up(tokens)))
        turned = tokens.transpose(0, 1)
        tokens = (turned + self.second(torch.relu(self.first(turned)))).transpose(0, 1)
        x = self.grouped(tokens.transpose(1, 2).reshape(x.shape)).mean((2, 3))
        x = self.fc(x)
        return self.head(torch.relu(self.twice(torch.relu(self.twice(x)))))


@pytest.mark.parametrize("images_per_batch", [40, 16])  # 16 is the number of tokens, too
@pytest.mark.parametrize("criterion", ["obd", "taylor", "gradient"])
def test_gates_at_inputs_are_gates_of_weights(criterion, images_per_batch, monkeypatch):
    """And the way is taken where it is right alone."""
    torch.manual_seed(0)
    net, units, images, labels = double(Tokens())
    images, labels = images[:images_per_batch], labels[:images_per_batch]
    names = readable_at_inputs(net, units, images)
    assert "up" in names
    assert not names & {"first", "grouped.0", "fc.0", "twice"}
    fast = saliency_of_units(net, units, criterion, images, labels, 3)
    monkeypatch.setattr(saliency, "readable_at_inputs", lambda *_: set())
    slow = saliency_of_units(net, units, criterion, images, labels, 3)
    assert list(fast) == list(slow) == list(units)
    for layer, score in slow.items():
        assert score.any()
        torch.testing.assert_close(fast[layer], score)


def test_all_units_of_the_inception_have_gates_at_inputs(monkeypatch):
    torch.manual_seed(0)
    net = SmallInception(5, SHAPE, width=0.25, stages=((32,),)).double()
    net, units, images, labels = double(net)
    assert readable_at_inputs(net, units, images) == set(units)
    fast = saliency_of_units(net, units, "obd", images[:8], labels[:8], 3)
    monkeypatch.setattr(saliency, "readable_at_inputs", lambda *_: set())
    torch.testing.assert_close(fast, saliency_of_units(net, units, "obd", images[:8], labels[:8], 3))


@pytest.mark.parametrize("criterion", OF_IMAGES)
def test_frozen_nets_and_callers_without_gradients(criterion):
    net, units, images, labels = double(residual())
    expected = saliency_of_units(net, units, criterion, images, labels, 0)
    net.requires_grad_(False).train()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(saliency_of_units(net, units, criterion, images, labels, 0), expected)
    assert all(module.training for module in net.modules())
    assert not any(module._forward_pre_hooks for module in net.modules())


# -- the pruner, and the penalty ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", FOR_UNITS)
def test_criteria_of_units_are_refused_for_weights(criterion):
    with pytest.raises(ValueError, match=f"criterion is {criterion}, but structure is weights"):
        Pruner("weights", criterion)


@pytest.mark.parametrize("criterion", ["lamp", "taylor"])
def test_the_pruner_takes_the_weights_of_least_score(criterion):
    net = plain()
    _, _, images, labels = double(plain())
    given = {"images": images.float(), "labels": labels}
    pruner = Pruner("weights", criterion)
    groups = pruner.groups(net, SHAPE)
    first = pruner.prune(net, groups, {}, 0.4, **given)
    scores = saliency_of_weights(net, list(first), criterion, *given.values(), 0)
    score, kept = (torch.cat([each.flatten() for each in values.values()]) for values in (scores, first))
    assert int((kept == 0).sum()) == round(0.4 * len(kept))
    assert score[kept == 0].max() <= score[kept == 1].min()
    second = pruner.prune(net, groups, first, 0.4, **given)
    assert all(torch.equal(second[name] * mask, second[name]) for name, mask in first.items())


@pytest.mark.parametrize("criterion", ["l2", "lamp", "geometric_median", "norm_scale", "taylor", "gradient_sum"])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_the_pruner_takes_the_units_of_least_score(criterion, scope):
    net = residual()
    _, units, images, labels = double(residual())
    pruner = Pruner("units", criterion, scope, round_to=1)
    groups = pruner.groups(net, SHAPE)
    masks = pruner.prune(net, groups, {}, 0.4, images=images.float(), labels=labels)
    scores = saliency_of_units(net, units, criterion, images.float(), labels, 0)
    gone = 0
    for layer, score in scores.items():
        kept = masks[f"{layer}.weight"].flatten(1).any(1)
        gone += int((~kept).sum())
        assert kept.all() or score[~kept].max() <= score[kept].min()
    assert gone == 6


def test_the_penalty_is_the_sum_of_absolute_scales_and_its_gradient_their_signs():
    net = residual()
    net.norm = nn.LayerNorm([6, 3])  # one with a scale for each position is no scale of channels
    value = NormScaleL1(0.01)(net)
    scales = [net.stem[1].weight, net.square[1].weight, net.wide[1].weight]
    torch.testing.assert_close(value, 0.01 * sum(scale.abs().sum() for scale in scales))
    value.backward()
    for scale in scales:
        torch.testing.assert_close(scale.grad, 0.01 * scale.detach().sign())
    assert list(norm_scales(net)) == ["stem.1.weight", "square.1.weight", "wide.1.weight"]


def test_the_penalty_of_a_net_without_norms_is_none():
    assert NormScaleL1(0.01)(nn.Sequential(nn.Flatten(), nn.Linear(4, 2))) is None
    assert NormScaleL1(0.01)(nn.BatchNorm1d(4, affine=False)) is None


def test_a_negative_strength_is_refused():
    with pytest.raises(ValueError, match="strength is -1"):
        NormScaleL1(-1)
