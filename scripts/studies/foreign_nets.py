"""Narrow nets of torchvision and timm, trained for a minute or less on digits in colour: what other scripts compare."""

from collections.abc import Callable

import torch
import torchvision
from timm.models import _efficientnet_builder as builder
from timm.models.convnext import ConvNeXt
from timm.models.efficientnet import EfficientNet as TimmEfficientNet
from timm.models.nfnet import NfCfg, NormFreeNet
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.efficientnet import EfficientNet, MBConvConfig
from torchvision.models.mobilenetv3 import MobileNetV3, _mobilenet_v3_conf
from torchvision.models.regnet import BlockParams, RegNet

from project.data import Digits


class ColourDigits(Digits):
    """The digits as colour images of 32x32 pixels, whose three channels differ."""

    image_shape = (3, 32, 32)
    mean = (0.5, 0.5, 0.5)  # type: ignore[assignment]
    std = (0.5, 0.5, 0.5)  # type: ignore[assignment]

    def load(self, train: bool) -> tuple[Tensor, Tensor]:
        images, labels = super().load(train)
        gray = F.interpolate(images.float(), (32, 32), mode="bilinear")
        return torch.cat([gray, 255 - gray * 0.5, gray * 0.7 + 20], 1).clamp(0, 255).to(torch.uint8), labels


def _efficientnet_b0() -> nn.Module:
    rows = [(1, 3, 1, 32, 16, 1), (6, 3, 2, 16, 24, 1), (6, 5, 2, 24, 40, 1), (6, 3, 2, 40, 80, 2)]
    blocks = [MBConvConfig(*row, 0.25, 1.0) for row in rows]
    return EfficientNet(blocks, dropout=0.2, num_classes=10, last_channel=128)


def _efficientnet_lite() -> nn.Module:
    blocks = [["ds_r1_k3_s1_e1_c16"], ["ir_r1_k3_s2_e6_c24"], ["ir_r1_k5_s2_e6_c40"], ["ir_r2_k3_s2_e6_c80"]]
    return TimmEfficientNet(
        builder.decode_arch_def(blocks),
        num_classes=10,
        num_features=64,
        stem_size=16,
        fix_stem=True,
        pad_type="same",
        act_layer=nn.ReLU6,
        round_chs_fn=lambda channels: builder.round_channels(channels, multiplier=0.25),
    )


def _mobilenet_v3() -> nn.Module:
    blocks, _ = _mobilenet_v3_conf("mobilenet_v3_small", width_mult=0.35)
    return MobileNetV3(blocks, 128, num_classes=10)


def _regnet_y() -> nn.Module:
    blocks = BlockParams.from_init_params(depth=6, w_0=16, w_a=8.0, w_m=2.0, group_width=8, se_ratio=0.25)
    return RegNet(blocks, num_classes=10)


def _nfnet() -> nn.Module:
    shape = NfCfg(depths=(1, 1, 1, 1), channels=(32, 48, 64, 96), stem_type="3x3", num_features=0, act_layer="relu")
    return NormFreeNet(shape, num_classes=10)


def _resnet() -> nn.Module:
    channels = (16, 32, 48, 64)
    return ResNet(BasicBlock, (1, 1, 1, 1), num_classes=10, channels=channels, stem_width=16)  # type: ignore[arg-type]


NETS: dict[str, Callable[[], nn.Module]] = {
    "ResNet": _resnet,
    "DenseNet": lambda: torchvision.models.DenseNet(12, (2, 3, 3, 2), 24, num_classes=10),
    "MobileNetV2": lambda: torchvision.models.mobilenet_v2(num_classes=10, width_mult=0.35),
    "MobileNetV3": _mobilenet_v3,
    "EfficientNet-B0": _efficientnet_b0,
    "EfficientNet-Lite": _efficientnet_lite,
    "ShuffleNetV2": lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=10),
    "RegNetY": _regnet_y,
    "ConvNeXt": lambda: ConvNeXt(num_classes=10, depths=(1, 1, 2, 1), dims=(16, 32, 48, 64), patch_size=2),
    "NFNet": _nfnet,
    "ViT of timm": lambda: VisionTransformer(32, 4, embed_dim=48, depth=3, num_heads=4, num_classes=10),
    "ViT of torchvision": lambda: torchvision.models.VisionTransformer(32, 4, 3, 4, 64, 128, num_classes=10),
}
"""Nets for colour images of 32x32 pixels and ten classes, by name."""


def trained(name: str, data: Digits, epochs: int, seed: int = 0) -> nn.Module:
    """A net of :data:`NETS` in evaluation mode, trained on the training and the validation images; the same each time.

    Args:
        name: name of the net.
        data: data module whose images it learns; they are moved by up to two pixels.
        epochs: number of epochs; 1 or more.
        seed: seed of the first weights and of the order of the images; any int.
    """
    torch.manual_seed(seed)
    net = NETS[name]().train()
    norms = [layer for layer in net.modules() if isinstance(layer, nn.BatchNorm2d)]
    pixels, labels = data.load(True)
    images = data.normalize(pixels.float().div(255)).contiguous()
    batches = len(images) // 62
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * batches)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(62)[:batches]:
            moved = images[batch].roll(torch.randint(-2, 3, (2,)).tolist(), (2, 3))
            loss = F.cross_entropy(net(moved), labels[batch], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    for norm in norms:  # few steps leave running means behind: take the mean over batches of the trained net
        norm.reset_running_stats()
        norm.momentum = None
    with torch.no_grad():
        for batch in torch.randperm(len(images))[:1280].split(128):
            net(images[batch])
    return net.eval()
