"""Nets with Winograd convolutions: every layer of every shipped net, surgery, later surgeries, files."""

from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path

import onnx
import pytest
import torch
from helpers.nets import NETS, build, enliven_, images_for, recipe_of
from torch import Tensor, nn

from project import models
from project.compression import Factorizer, Quantizer, Winograd, WinogradConv2d, plan_thinning, replay_, to_plain
from project.compression.winograd.choice import ERROR_LIMITS, relative_errors
from project.compression.winograd.convolution import TILES, why_not_winograd
from project.deployment.export import export
from project.deployment.model_file import Metadata
from project.deployment.packed.file import open_packed
from project.deployment.recipe import Recipe
from project.metrics.complexity import count_macs


def map_of(*shape: int) -> Tensor:
    return torch.randn(shape).relu_().contiguous(memory_format=torch.channels_last)


def tiles_of(net: nn.Module, tile: int) -> dict[str, int]:
    layers = {name: layer for name, layer in net.named_modules() if isinstance(layer, nn.Conv2d)}
    return {name: tile for name, layer in layers.items() if why_not_winograd(layer) is None}


def lively(name: str) -> tuple[nn.Module, tuple[int, int, int], Tensor]:
    net, images = build(name), images_for(name)
    with torch.no_grad():
        enliven_(net, images)
    return net.eval().to(memory_format=torch.channels_last), NETS[name][1], images


LARGE = [pytest.param(name, marks=pytest.mark.slow) for name in ("GoogLeNet-32", "BNGoogLeNet-48", "InceptionV3-75")]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("name", ["SmallInception-8", "SmallInception-64x48", *LARGE])
def test_a_net_computes_what_it_did_from_the_same_state(name, tile):
    net, image_shape, images = lively(name)
    fast, surgery = deepcopy(net), Winograd(tiles_of(net, tile))
    surgery.apply_(fast)
    changed = [layer for layer in fast.modules() if isinstance(layer, WinogradConv2d)]
    assert len(changed) == len(surgery.tiles) > 2 and {layer.tile for layer in changed} == {tile}
    assert list(fast.state_dict()) == list(net.state_dict())
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in fast.state_dict().items())
    with torch.inference_mode():
        logits, own, exact = net(images), fast(images), deepcopy(net).double()(images.double())
    assert not torch.equal(own, logits)
    assert (own - exact).norm() < ERROR_LIMITS[tile] * (logits - exact).norm()
    assert count_macs(fast, image_shape) < count_macs(net, image_shape)
    fresh = build(name, seed=1).eval().to(memory_format=torch.channels_last)
    replay_(fresh, [to_plain(surgery)])
    fresh.load_state_dict(net.state_dict())
    with torch.inference_mode():
        assert torch.equal(fresh(images), own)
    Winograd({}).apply_(fast)  # these layers, and all others directly
    assert not any(isinstance(layer, WinogradConv2d) for layer in fast.modules())
    with torch.inference_mode():
        assert torch.equal(fast(images), logits)


def shapes_of(net_class: Callable[..., nn.Module], image_shape: tuple[int, int, int]) -> set[tuple[int, ...]]:
    """Distinct (C, H, W, K, padding) of a net's 3x3 convolutions of stride 1, without computing any."""
    found = set()

    def note(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, nn.Conv2d)
        if why_not_winograd(layer) is None:
            found.add((*args[0].shape[1:], layer.out_channels, int(layer.padding[0])))

    with torch.device("meta"):
        net = net_class(10, image_shape).eval()
        for layer in net.modules():
            if isinstance(layer, nn.Conv2d):
                layer.register_forward_pre_hook(note)
        net(torch.empty(1, *image_shape))
    return found


SHIPPED = {
    "SmallInception": ((1, 28, 28), 8),
    "SmallInception, 64 pixels": ((3, 64, 64), 8),
    "LeNet5": ((1, 28, 28), 0),
    "GoogLeNet": ((3, 224, 224), 10),
    "BNGoogLeNet": ((3, 224, 224), 10),
    "BNGoogLeNet, factorized": ((3, 224, 224), 20),
    "InceptionV3": ((3, 299, 299), 6),
}
SLOW = ("BNGoogLeNet", "BNGoogLeNet, factorized", "InceptionV3")


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in SHIPPED])
def test_every_layer_of_every_shipped_net_is_within_the_bars(name):
    image_shape, least = SHIPPED[name]
    net_class = getattr(models, name.partition(",")[0])
    net_class = partial(net_class, factorized=True) if "factorized" in name else net_class
    shapes = sorted(shapes_of(net_class, image_shape))
    assert len(shapes) >= least
    torch.manual_seed(0)
    for channels, height, width, out_channels, padding in shapes:
        conv = nn.Conv2d(channels, out_channels, 3, padding=padding).to(memory_format=torch.channels_last).eval()
        errors = relative_errors(conv, map_of(1, channels, height, width))
        assert 0 < errors[2] <= ERROR_LIMITS[2] * (1.5 if channels == 1 else 1), (channels, height, out_channels)
        assert 0 < errors[4] <= ERROR_LIMITS[4], (channels, height, out_channels)


@pytest.mark.usefixtures("kernels")
def test_thinned_and_factorised_afterwards():
    net, image_shape, images = lively("SmallInception-8")
    surgery = Winograd(tiles_of(net, 4))
    surgery.apply_(net)
    thin = plan_thinning(net, {"blocks.1.branches.conv3x3.1.conv": [0, 2]}, image_shape)
    masked = deepcopy(net)
    with torch.no_grad():
        for part in ("conv.weight", "norm.weight", "norm.bias"):
            masked.get_parameter(f"blocks.1.branches.conv3x3.1.{part}")[[0, 2]] = 0
    thin.apply_(net)
    with torch.inference_mode():
        torch.testing.assert_close(net(images), masked(images), atol=1e-4, rtol=1e-4)
    plan, _ = Factorizer(["svd", "spatial"], "energy", energy=0.3, round_to=1, num_images=0).plan(net, image_shape)
    assert not set(plan.kinds) & set(surgery.tiles)
    plan.apply_(net)
    assert net(images).shape == (8, 5)


def test_a_plan_for_another_net_is_refused_and_leaves_it_as_it_was():
    net = build("SmallInception-8")
    first = next(iter(tiles_of(net, 2)))
    for tiles, message in [
        ({first: 2, "blocks.9.conv": 4}, "SmallInception has no convolution blocks.9.conv"),
        ({first: 2, "fc": 4}, "no convolution fc"),
        ({first: 2, "blocks.1.branches.conv1x1.conv": 4}, "no Winograd form: its kernel is 1x1"),
    ]:
        with pytest.raises(ValueError, match=message):
            Winograd(tiles).apply_(net)
        assert not any(isinstance(layer, WinogradConv2d) for layer in net.modules())


@pytest.mark.parametrize(
    "format", ["packed", *(pytest.param(name, marks=pytest.mark.slow) for name in ("onnx", "onnx-int8"))]
)
def test_files_hold_plain_convolutions_of_the_same_weights(format, tmp_path: Path):
    name = "SmallInception-8"
    net, image_shape, images = lively(name)
    surgery = Winograd(tiles_of(net, 4))
    recipe = Recipe(recipe_of(name).net, [to_plain(surgery)])
    files = []
    for number, own in enumerate((net, deepcopy(net))):
        if number:
            surgery.apply_(own)
        path = tmp_path / f"{number}.{format.rpartition('-')[0] or format}"
        metadata = Metadata(("a", "b", "c", "d", "e"), image_shape, (0.5,), (0.5,))
        tolerance = 2.0 if format == "onnx-int8" else None
        options = {"calibration": images, "quantizer": Quantizer(observer="min-max"), "tolerance": tolerance}
        export(own, path, metadata, images, format=format, recipe=recipe if number else recipe_of(name), **options)
        files.append(path)
    if format == "packed":
        found, _ = open_packed(files[1])
        assert sum(isinstance(layer, WinogradConv2d) for layer in found.modules()) == len(surgery.tiles)
        assert all(torch.equal(value, net.state_dict()[key]) for key, value in found.state_dict().items())
    else:
        first, second = (onnx.load(path) for path in files)
        assert Counter(node.op_type for node in first.graph.node) == Counter(n.op_type for n in second.graph.node)
        for one, other in zip(first.graph.initializer, second.graph.initializer, strict=True):
            assert one.raw_data == other.raw_data
