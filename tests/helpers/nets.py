"""For the tests of surgery and deployment: each shipped net in small, with lively weights, and the same net thinned."""

from collections.abc import Callable
from copy import deepcopy
from functools import cache, partial

import torch
from torch import Tensor, nn

from project.compression import to_plain
from project.compression.thinning.masked import MaskedNet
from project.compression.thinning.thin import Thin
from project.compression.thinning.units import Units, masked_net, plan_thinning, units_of
from project.deployment.recipe import Recipe
from project.frame.rooms import needed, optional
from project.models import BatchNorm, DropPath, InstanceNorm, NoNorm, SmallInception

Shape = tuple[int, int, int]


class Nets(dict[str, tuple[Callable[..., nn.Module], Shape]]):
    """Nets by name. Without the classic nets' room a test that asks for one of them is skipped (see conftest.py)."""

    def __missing__(self, name: str) -> tuple[Callable[..., nn.Module], Shape]:
        needed("models.zoo.googlenet", name)
        raise KeyError(name)


NETS = Nets(
    {
        "SmallInception-8": (partial(SmallInception, stem=(16,), stages=((64,),)), (1, 8, 8)),
        "SmallInception-28": (partial(SmallInception, stem=(16, 24), stages=((64,), (128,))), (1, 28, 28)),
        "SmallInception-64x48": (partial(SmallInception, width=0.25, stages=((96, 64), (64,), (128,))), (3, 64, 48)),
    }
)
OTHERS = Nets(
    {
        "instance norm": (partial(SmallInception, norm=InstanceNorm, width=0.5, activation=nn.SiLU), (3, 16, 16)),
        "no norm": (partial(SmallInception, norm=NoNorm, width=0.5, activation=nn.GELU), (3, 16, 16)),
        "dropout": (
            partial(SmallInception, width=0.5, conv_dropout=0.5, conv_dropout_type=DropPath, fc_dropout=0.5),
            (1, 28, 28),
        ),
    }
)
if optional("models.zoo"):
    from project.models import BNGoogLeNet, GoogLeNet, InceptionV3, LeNet5, LeNet300100

    NETS |= {
        "GoogLeNet-32": (partial(GoogLeNet, width=0.125), (3, 32, 32)),
        "BNGoogLeNet-48": (partial(BNGoogLeNet, width=0.125, factorized=True), (1, 48, 48)),
        "InceptionV3-75": (partial(InceptionV3, width=0.125), (3, 75, 75)),
        "LeNet300100-9x5": (LeNet300100, (3, 9, 5)),
        "LeNet5-28x19": (LeNet5, (3, 28, 19)),
    }
    OTHERS |= {
        "instance norm on 1x1": (partial(BNGoogLeNet, norm=InstanceNorm, width=0.125), (1, 32, 32)),
        "normed vectors": (partial(LeNet300100, norm=BatchNorm, activation=nn.Tanh), (1, 8, 8)),
        "1x1 before flatten": (partial(LeNet5, norm=InstanceNorm, conv_activation=nn.PReLU), (1, 16, 16)),
    }
ALL = Nets(NETS | OTHERS)
SMALL = ["SmallInception-28", "GoogLeNet-32", "LeNet5-28x19"]


def build(name: str, seed: int = 0) -> nn.Module:
    net_class, image_shape = ALL[name]
    torch.manual_seed(seed)
    return net_class(5, image_shape)


def recipe_of(name: str, surgeries: tuple[Thin, ...] = ()) -> Recipe:
    """The plain values of one of these nets, as a configuration would have them."""
    maker, image_shape = ALL[name]
    kind, options = (maker.func, maker.keywords) if isinstance(maker, partial) else (maker, {})
    plain = {key: {"class_path": _path(value)} if isinstance(value, type) else value for key, value in options.items()}
    arguments = {"num_classes": 5, "image_shape": image_shape, **plain}
    return Recipe({"class_path": _path(kind), "init_args": arguments}, [to_plain(each) for each in surgeries])


def _path(kind: type) -> str:
    return f"{'torch.nn' if kind.__module__.startswith('torch') else 'project.models'}.{kind.__name__}"


def images_for(name: str) -> Tensor:
    return torch.randn(8, *ALL[name][1], generator=torch.Generator().manual_seed(1))


@cache
def units_by_layer(name: str) -> dict[str, Units]:
    return units_of(build(name), ALL[name][1])


def choose(units: dict[str, Units], sparsity: float) -> dict[str, list[int]]:
    """Random outputs of each layer: a share of its units, but not all."""
    generator = torch.Generator().manual_seed(2)
    removed: dict[str, list[int]] = {}
    for of in units.values():
        gone = torch.randperm(of.num, generator=generator)[: min(of.num - 1, int(sparsity * of.num))]
        removed.setdefault(of.layers[0], []).extend(of.outputs(gone.tolist()))
    return removed


@torch.no_grad()
def enliven_(net: nn.Module, images: Tensor) -> None:
    """Random shifts, scales and running statistics around the true ones, so that logits depend on the image.

    A deep net of random weights and statistics gives the same logits for all images, and any net equals any other.
    """
    generator = torch.Generator().manual_seed(3)

    def scale_(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        scale = output.square().mean().sqrt().clamp(min=1e-3)
        layer.weight /= scale
        if layer.bias is None:
            return output / scale
        alive = (layer.weight.flatten(1) != 0).any(dim=1)
        layer.bias.normal_(0.2, 0.3, generator=generator)
        if output.dim() == 4:
            layer.bias -= output.mean(dim=(0, 2, 3)) / scale
        layer.bias *= alive
        return output / scale + layer.bias.reshape((-1,) + (1,) * (output.dim() - 2))

    def settle_(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        alive = norm.weight != 0
        norm.weight.uniform_(0.5, 1.5, generator=generator).mul_(alive)
        norm.bias.normal_(0.2, 0.3, generator=generator).mul_(alive)
        if isinstance(norm, nn.BatchNorm2d):
            var, mean = torch.var_mean(args[0], dim=(0, 2, 3))
            norm.running_mean.copy_(mean)
            # One variance for all, means included: a channel that hardly varies would blow up the rounding error.
            power = (var + mean.square())[alive].mean().clamp(min=1e-3)
            norm.running_var.uniform_(0.5, 1.5, generator=generator).mul_(power)

    handles = []
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            if module.bias is not None:
                module.bias.zero_()
            handles.append(module.register_forward_hook(scale_))
        elif isinstance(module, nn.BatchNorm2d | nn.InstanceNorm2d):
            handles.append(module.register_forward_pre_hook(settle_))
    net.eval()(images)
    for handle in handles:
        handle.remove()


def reference_and_thinned(name: str, sparsity: float) -> tuple[MaskedNet, nn.Module, Thin]:
    """A lively net with zeros for its units, whose norms leave these units out, and the same net without them."""
    net, shape = build(name), ALL[name][1]
    removed = choose(units_by_layer(name), sparsity)
    masked = masked_net(net, removed, shape)
    enliven_(masked.net, images_for(name))
    plan = plan_thinning(net, removed, shape)
    thinned = deepcopy(masked.net)
    plan.apply_(thinned)
    return masked, thinned, plan


def masked_and_thinned(name: str, sparsity: float) -> tuple[nn.Module, nn.Module, Thin]:
    """A lively net in which a share of the units is zero, and the same net without them."""
    masked, thinned, plan = reference_and_thinned(name, sparsity)
    return masked.net, thinned, plan


@torch.no_grad()
def assert_same_logits(masked: nn.Module, thinned: nn.Module, images: Tensor) -> None:
    """Up to rounding: 1e-5 of the largest logit in float32, where the masked net itself is that exact."""
    exact = deepcopy(masked).double().eval()(images.double())
    largest = exact.abs().max()
    assert exact.std(dim=0).max() > 0.01 * largest, "all images have the same logits: any net would pass"
    assert (deepcopy(thinned).double().eval()(images.double()) - exact).abs().max() <= 1e-10 * largest
    expected, logits = masked.eval()(images), thinned.eval()(images)
    rounding = (expected - exact).abs().max()
    assert (logits - expected).abs().max() <= max(1e-5 * largest, 10 * rounding)
