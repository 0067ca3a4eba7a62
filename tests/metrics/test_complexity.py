import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop

from project.metrics.complexity import (
    complexity_by_layer,
    count_macs,
    count_nonzero,
    count_parameters,
    parameter_bytes,
)
from project.models import SmallInception


class TwoConvs(nn.Module):
    """One grouped and one strided convolution, a batch norm, a linear layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, (1, 5), stride=2)
        )
        self.fc = nn.Linear(6, 6)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.fc(self.body(images).mean((2, 3))))


SHAPE = (4, 9, 11)
# 9 x 11 outputs of 8 channels, each from 2 of the input's 4 channels in 3x3; 5 x 4 outputs of 6, each from 8 in 1x5.
CONV1, CONV2, FC = 9 * 11 * 8 * 2 * 9, 5 * 4 * 6 * 8 * 5, 6 * 6


def test_macs_equal_the_hand_calculation() -> None:
    assert count_macs(TwoConvs(), SHAPE) == CONV1 + CONV2 + 2 * FC
    assert count_macs(TwoConvs(), SHAPE, batch=3) == 3 * (CONV1 + CONV2 + 2 * FC)


def test_rows_equal_the_hand_calculation() -> None:
    rows = [
        (row.name, row.type, row.num_params, row.macs, row.output_shape)
        for row in complexity_by_layer(TwoConvs(), SHAPE)
    ]
    assert rows == [
        ("body.0", "Conv2d", 8 * 2 * 9 + 8, CONV1, (8, 9, 11)),
        ("body.1", "BatchNorm2d", 16, 0, (8, 9, 11)),
        ("body.3", "Conv2d", 6 * 8 * 5 + 6, CONV2, (6, 5, 4)),
        ("fc", "Linear", 6 * 6 + 6, 2 * FC, (6,)),
    ]


def test_columns_add_up_for_a_real_net() -> None:
    net = SmallInception(10, (3, 32, 32))
    rows = complexity_by_layer(net, (3, 32, 32))
    assert sum(row.macs for row in rows) == count_macs(net, (3, 32, 32))
    assert sum(row.num_params for row in rows) == count_parameters(net)


def test_work_of_a_module_itself_is_its_own_row() -> None:
    class LowRank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left = nn.Parameter(torch.randn(5, 2))
            self.right = nn.Linear(12, 2, bias=False)

        def forward(self, images: Tensor) -> Tensor:
            return self.right(images.flatten(1)) @ self.left.T

    rows = complexity_by_layer(LowRank(), (3, 2, 2))
    assert [(row.name, row.num_params, row.macs) for row in rows] == [("", 10, 10), ("right", 24, 24)]


def test_counting_leaves_the_net_as_it_was() -> None:
    torch.manual_seed(0)
    net = TwoConvs().train()
    net.body[1].eval()
    net.body[1].running_mean.fill_(0.5)
    state = {key: value.clone() for key, value in net.state_dict().items()}
    random_state = torch.get_rng_state()
    count_macs(net, SHAPE)
    complexity_by_layer(net, SHAPE)
    assert net.training and net.body[0].training and not net.body[1].training
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(parameter.grad is None for parameter in net.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_a_failing_net_is_left_as_it_was_too() -> None:
    net = TwoConvs().train()
    for count in (count_macs, complexity_by_layer):
        with pytest.raises(RuntimeError):
            count(net, (3, 9, 11))
    assert net.training and not any(module._forward_hooks for module in net.modules())
    assert count_macs(net, SHAPE) == CONV1 + CONV2 + 2 * FC


def test_parameters_nonzero_and_bytes() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3, bias=False))
    assert count_parameters(net) == 12 + 4 + 12
    with torch.no_grad():
        net[0].weight.fill_(1.0)[:2] = 0
        net[0].bias.zero_()
        net[1].weight.fill_(-1e-30)
    assert count_nonzero(net) == 6 + 12
    assert parameter_bytes(net) == 28 * 4
    assert parameter_bytes(net.half()) == 28 * 2


def test_shared_parameters_count_once() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    assert count_parameters(net) == 9 + 3 + 3
    assert parameter_bytes(net) == 4 * 15


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_nets_of_other_types_are_counted(dtype: torch.dtype) -> None:
    assert count_macs(TwoConvs().to(dtype), SHAPE) == CONV1 + CONV2 + 2 * FC


class Tokens(nn.Module):
    """Patches of 7x7 pixels as 16 tokens of 32 numbers, a layer for sequences, and a head."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 32, 7, 7)
        self.layer = layer
        self.head = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        y = self.layer(x, x, x, need_weights=False) if isinstance(self.layer, nn.MultiheadAttention) else self.layer(x)
        return self.head((y[0] if isinstance(y, tuple) else y).mean(1))


class Fused(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        heads = x.unflatten(2, (4, 8)).transpose(1, 2)
        return {"tokens": functional.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)}


class Unpacked(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return self[0](x)["tokens"]


L, D = 16, 32
ATTENTION = 3 * L * D * D + 2 * L * L * D + L * D * D  # of queries, keys and values; of the weights; of the output
SEQUENCES = {
    "attention": (lambda: nn.MultiheadAttention(D, 4, batch_first=True), ATTENTION),
    "encoder": (lambda: nn.TransformerEncoderLayer(D, 4, 64, batch_first=True), ATTENTION + 2 * L * D * 64),
    "fused": (lambda: Unpacked(Fused()), 2 * L * L * D),
    "lstm": (lambda: nn.LSTM(D, D, batch_first=True), 4 * L * 2 * D * D),
    "gru": (lambda: nn.GRU(D, D, batch_first=True), 3 * L * 2 * D * D),
    "both ways": (lambda: nn.LSTM(D, D // 2, batch_first=True, bidirectional=True), 2 * 4 * L * (D + D // 2) * D // 2),
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_attention_and_recurrent_layers_equal_the_hand_calculation(name: str) -> None:
    make, macs = SEQUENCES[name]
    net = Tokens(make())
    fast_path = torch.backends.mha.get_fastpath_enabled()
    assert count_macs(net, (1, 28, 28)) == L * D * 49 + macs + D * 10
    rows = {row.name: row for row in complexity_by_layer(net, (1, 28, 28))}
    assert sum(row.macs for row in rows.values() if row.name.startswith("layer")) == macs
    assert sum(row.num_params for row in rows.values()) == count_parameters(net)
    assert (
        all(row.output_shape[-2:] == (L, D) for row in rows.values() if row.name.startswith("layer") and row.macs)
        or name == "encoder"
    )
    assert torch.backends.mha.get_fastpath_enabled() == fast_path and torch.backends.mkldnn.enabled


def test_rows_count_a_shared_parameter_and_a_layer_that_never_runs_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
            self.second.weight = self.first.weight
            self.unused = nn.Linear(6, 5)

        def forward(self, images: Tensor) -> Tensor:
            return self.second(self.first(images.flatten(1)))

    rows = complexity_by_layer(Tied(), (1, 2, 3))
    assert [(row.name, row.num_params, row.macs, row.output_shape) for row in rows] == [
        ("first", 42, 36, (6,)),
        ("second", 6, 36, (6,)),
        ("unused", 35, 0, ()),
    ]


TORCHVISION = {
    "resnet18": 64,
    "googlenet": 64,
    "inception_v3": 80,
    "densenet121": 64,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "efficientnet_b0": 64,
    "shufflenet_v2_x0_5": 64,
    "squeezenet1_1": 64,
    "regnet_y_400mf": 64,
    "convnext_tiny": 64,
    "swin_t": 64,
    "vit_b_32": 64,
}
TIMM = ("tf_efficientnet_lite0", "vit_tiny_patch16_224", "test_nfnet")


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TORCHVISION, *TIMM])
def test_counts_are_those_of_torchs_counter_on_foreign_nets(name: str) -> None:
    """Torch's counter sees the fused attention of CPUs here, with the formula that it has for that of GPUs."""
    if name in TIMM:
        timm = pytest.importorskip("timm")
        side = 64
        net = timm.create_model(name, **({"img_size": side} if "vit" in name else {})).eval()
    else:
        side = TORCHVISION[name]
        options = {"image_size": side} if name.startswith("vit") else {}
        options |= {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        net = getattr(torchvision.models, name)(**options).eval()
    fused = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop.__wrapped__}
    attention = [module for module in net.modules() if isinstance(module, nn.MultiheadAttention)]
    for module in attention:  # a hook keeps torch from its kernel that does the whole module
        module.register_forward_pre_hook(lambda module, args: None)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False, custom_mapping=fused) as counter, torch.no_grad():
            net(torch.zeros(1, 3, side, side))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    macs = count_macs(net, (3, side, side))
    assert macs == pytest.approx(counter.get_total_flops() / 2, rel=0.01)
    rows = complexity_by_layer(net, (3, side, side))
    assert sum(row.macs for row in rows) == macs
    assert sum(row.num_params for row in rows) == count_parameters(net)


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["ResNet18_Weights", "GoogLeNet_Weights", "Swin_T_Weights", "ViT_B_32_Weights"])
def test_counts_are_those_that_torchvision_publishes(weights: str) -> None:
    meta = getattr(torchvision.models, weights).DEFAULT.meta
    name = weights.removesuffix("_Weights").lower()
    net = getattr(torchvision.models, name)(**({"init_weights": False} if name == "googlenet" else {}))
    assert count_macs(net, (3, 224, 224)) / 1e9 == pytest.approx(meta["_ops"], rel=0.01)
