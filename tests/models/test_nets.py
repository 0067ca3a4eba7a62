"""What holds for every net, with every norm, dropout and image size. The classic nets are there if their room is."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import nn

from project import models
from project.frame.rooms import optional
from project.metrics.complexity import count_parameters
from project.models import BatchNorm, DropPath, GroupNorm, InstanceNorm, LayerNorm, NoNorm, SmallInception

NetFactory = Callable[..., nn.Module]

# The sweep runs narrow nets: widths do not matter to it, and it stays at seconds.
NETS: dict[str, tuple[NetFactory, tuple[int, int, int]]] = {
    "SmallInception-8": (partial(SmallInception, width=0.5), (1, 8, 8)),
    "SmallInception-28": (partial(SmallInception, width=0.5), (1, 28, 28)),
    "SmallInception-32": (partial(SmallInception, width=0.5), (3, 32, 32)),
    "SmallInception-64x48": (partial(SmallInception, width=0.25), (3, 64, 48)),
}
ONE_OF_EACH = ["SmallInception-28"]
TOO_SMALL_OR_LARGE: list[tuple[NetFactory, tuple[int, int, int]]] = [
    (SmallInception, (1, 7, 28)),
    (SmallInception, (1, 65, 28)),
]
SCALABLE: list[NetFactory] = [SmallInception]
if optional("models.zoo"):
    NETS |= {
        "GoogLeNet-32": (partial(models.GoogLeNet, width=0.125), (3, 32, 32)),
        "GoogLeNet-65x40": (partial(models.GoogLeNet, width=0.125), (2, 65, 40)),
        "BNGoogLeNet-48": (partial(models.BNGoogLeNet, width=0.125, factorized=True), (1, 48, 48)),
        "InceptionV3-75": (partial(models.InceptionV3, width=0.125), (3, 75, 75)),
        "InceptionV3-79x96": (partial(models.InceptionV3, width=0.125), (1, 79, 96)),
        "LeNet300100-8": (models.LeNet300100, (1, 8, 8)),
        "LeNet300100-9x5": (models.LeNet300100, (3, 9, 5)),
        "LeNet5-16": (models.LeNet5, (1, 16, 16)),
        "LeNet5-28x19": (models.LeNet5, (3, 28, 19)),
    }
    ONE_OF_EACH += ["GoogLeNet-32", "BNGoogLeNet-48", "InceptionV3-75", "LeNet300100-8", "LeNet5-16"]
    TOO_SMALL_OR_LARGE += [
        (models.GoogLeNet, (3, 31, 64)),
        (models.BNGoogLeNet, (3, 64, 31)),
        (models.InceptionV3, (3, 74, 299)),
        (models.LeNet5, (1, 15, 28)),
    ]
    SCALABLE += [models.GoogLeNet, models.InceptionV3]
NORMS = [BatchNorm, GroupNorm, LayerNorm, InstanceNorm, NoNorm]


def build(name: str, **options: object) -> tuple[nn.Module, torch.Tensor]:
    net_class, image_shape = NETS[name]
    torch.manual_seed(0)
    return net_class(5, image_shape, **options), torch.randn(3, *image_shape)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", NETS)
def test_every_parameter_learns_with_every_norm(name: str, norm: type[nn.Module]) -> None:
    net, images = build(name, norm=norm)
    logits = net(images)
    assert logits.shape == (3, 5)
    nn.functional.cross_entropy(logits, torch.tensor([0, 1, 4])).backward()
    for key, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
    net.eval()
    with torch.no_grad():
        assert net(images).isfinite().all()


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_gradient_reaches_every_layer(name: str) -> None:
    """The sweep's batches are so small that batch norm on 1x1 maps may silence a layer; a layer norm cannot."""
    net, images = build(name, norm=LayerNorm, activation=nn.GELU)
    net(images).square().sum().backward()
    silent = [key for key, parameter in net.named_parameters() if not parameter.grad.abs().max() > 0]
    assert silent == []


@pytest.mark.parametrize("dropout", [nn.Dropout, nn.Dropout2d, DropPath])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_dropout_acts_in_training_only(name: str, dropout: type[nn.Module]) -> None:
    options = {} if name.startswith("LeNet300") else {"conv_dropout": 0.3, "conv_dropout_type": dropout}
    net, images = build(name, norm=LayerNorm, fc_dropout=0.2, **options)
    plain, _ = build(name, norm=LayerNorm, fc_dropout=0.0)
    assert net.state_dict().keys() == plain.state_dict().keys(), "dropout has no weights and shifts no key"
    kinds = {type(module) for module in net.modules()}
    assert nn.Dropout in kinds and (not options or dropout in kinds)
    assert not torch.equal(net(images), net(images))
    torch.testing.assert_close(net.eval()(images), plain.eval()(images))


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_keys_do_not_depend_on_the_image(name: str) -> None:
    net, _ = build(name)
    other = {"InceptionV3-75": (3, 99, 80)}.get(name, (3, 40, 36))
    assert net.state_dict().keys() == NETS[name][0](7, other).state_dict().keys()


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_channels_last_gives_the_same_logits(name: str) -> None:
    net, images = build(name)
    net.eval()
    with torch.no_grad():
        expected = net(images)
        net.to(memory_format=torch.channels_last)
        torch.testing.assert_close(net(images.to(memory_format=torch.channels_last)), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_images_of_another_shape_are_refused(name: str) -> None:
    net, images = build(name)
    for wrong in (images[..., 1:], images.repeat(1, 2, 1, 1), images[0]):
        with pytest.raises(ValueError, match=r"images are \[.*\], but this \w+ takes \[N, .*\]: resize"):
            net(wrong)


@pytest.mark.parametrize(("net_class", "image_shape"), TOO_SMALL_OR_LARGE)
def test_sizes_a_net_cannot_take_are_refused(net_class: NetFactory, image_shape: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"image_shape is .* takes sides of .* pixels: resize"):
        net_class(10, image_shape)


@pytest.mark.parametrize("rate", [-0.1, 1.0])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_rates_outside_zero_to_one_are_refused(name: str, rate: float) -> None:
    for argument in ("fc_dropout",) if name.startswith("LeNet300") else ("conv_dropout", "fc_dropout"):
        with pytest.raises(ValueError, match=f"{argument} is {rate}"):
            build(name, **{argument: rate})


@pytest.mark.parametrize("net_class", SCALABLE)
def test_width_grows_the_net(net_class: NetFactory) -> None:
    shape = (3, 75, 75) if net_class is not SmallInception else (3, 32, 32)
    with torch.device("meta"):
        sizes = [
            count_parameters(net_class(10, shape, width=width, weight_init=lambda weight: weight))
            for width in (0.125, 0.25, 0.5, 1.0, 1.5)
        ]
    assert sizes == sorted(set(sizes))
    with pytest.raises(ValueError, match="width is 0"):
        net_class(10, shape, width=0)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_nets_are_built_from_configuration(name: str) -> None:
    net, _ = build(name)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(nn.Module, "net", required=True)
    config = {
        "class_path": f"project.models.{type(net).__name__}",
        "init_args": {
            "num_classes": 5,
            "image_shape": [3, 75, 75] if "V3" in name else [3, 32, 32],
            "norm": "project.models.GroupNorm",
            "activation": "torch.nn.SiLU",
            "fc_dropout": 0.25,
            "weight_init": "torch.nn.init.orthogonal_",
        },
    }
    if not name.startswith("LeNet300"):
        config["init_args"] |= {"conv_dropout": 0.1, "conv_dropout_type": "project.models.DropPath"}
    if "GoogLeNet" in name:
        config["init_args"] |= {"width": 0.125, "factorized": True}
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # renamed in jsonargparse 4.49
    built = instantiate(parser.parse_object({"net": config})).net
    assert type(built) is type(net)
    kinds = {type(module) for module in built.modules()}
    assert {GroupNorm, nn.SiLU, nn.Dropout} <= kinds and (DropPath in kinds or name.startswith("LeNet300"))


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_weight_init_fills_every_weight_and_biases_start_at_zero(name: str) -> None:
    net, _ = build(name, weight_init=partial(nn.init.constant_, val=0.25))
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            assert (module.weight == 0.25).all()
            assert module.bias is None or (module.bias == 0).all()
