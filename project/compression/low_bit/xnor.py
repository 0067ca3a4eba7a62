"""XNOR-Net: inputs that are signs beside weights that are signs, so that a product needs a bit of each.

Rastegari et al. 2016 (arXiv:1603.05279). Section 3.2: a convolution of inputs ``I`` with weights ``W`` becomes

    I * W  ~  (sign(I) (*) sign(W)) . K a,      a = mean |W| of the filter,      K = mean_c |I_c| * k      (eq. 11),

with ``k`` a box filter of the kernel's size, so that ``K`` is the mean of ``|I|`` over each window, all channels. The
gradient of the sign goes straight through where ``|I| <= 1`` (sec. 3.1, Courbariaux et al. 2016, arXiv:1602.02830).
Section 3.3: norm, sign, convolution, in this order. Here the norm is needed all the more, as inputs come out of a ReLU
and would all have the sign +: each layer gets a batch norm of its own in front of the sign. What stood behind it, a
norm and a ReLU, stays. Weights: :func:`project.compression.low_bit.ternary.binary_weight`.

Without ``input_scale`` there is no ``K``. It matters little, says the paper itself; Bulat & Tzimiropoulos 2019
(arXiv:1909.13863, XNOR-Net++) do better with learned scales, which the norm behind a layer has for each channel; and on
the digits it does harm (``configs/compression/xnor.yaml``).

Deviations: the sign of 0 is +, zero padding stays zero, the branches of an Inception block, which read one map, each
have their own norm, and ``K`` counts as a constant in the gradient, as ``a`` does.

What this saves is the file: a bit a weight. It is not faster: no engine here has a kernel that counts bits (XNOR and
popcount; the paper expects 58 times on a CPU, sec. 4.1), so signs are multiplied as floats, and norm and sign come on
top. :func:`count_sign_macs` says what such a kernel would take over.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from project.metrics.complexity import complexity_by_layer
from project.models.surgery import register_surgery


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return gradients[0] * (x.abs() <= 1)


def binary_sign(x: Tensor) -> Tensor:
    """1 where ``x >= 0``, else -1; the gradient goes straight through where ``|x| <= 1`` and ends elsewhere."""
    result: Tensor = _Sign.apply(x)
    return result


class BinaryInput(nn.Module):
    """A layer that sees the signs of its normed inputs: ``layer(sign(norm(x)))``, by ``K`` with ``input_scale``.

    Its weights are what they are: :class:`~project.compression.low_bit.ternary.LowBitWeights` makes them binary, too.

    Args:
        layer: a convolution ``[N, C, H, W]`` or a linear layer ``[N, C]``, which becomes a part of this one.
        input_scale: multiply by ``K``; the layer's bias moves here, to be added afterwards.

    Raises:
        ValueError: with ``input_scale``, for a convolution whose windows have no such mean.
    """

    inputs_are_signs = True

    def __init__(self, layer: nn.Conv2d | nn.Linear, input_scale: bool = False) -> None:
        super().__init__()
        self.input_scale = input_scale
        self.window = _window(layer) if input_scale and isinstance(layer, nn.Conv2d) else None
        """Of a convolution: kernel's size, stride, padding."""
        self.norm: nn.Module = (
            nn.BatchNorm2d(layer.in_channels) if isinstance(layer, nn.Conv2d) else nn.BatchNorm1d(layer.in_features)
        )
        self.layer = layer
        self.bias: Tensor | None = None
        if input_scale:
            self.bias, layer.bias = layer.bias, None
        self.norm.to(layer.weight.device)
        self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(x)
        y = self.layer(binary_sign(z))
        if not self.input_scale:
            return y
        y = y * self.scale(z.detach())
        return y if self.bias is None else y + self.bias.view(-1, *[1] * (y.dim() - 2))

    def scale(self, z: Tensor) -> Tensor:
        """``K``: ``[N, 1, H', W']``, of a linear layer ``[N, 1]``."""
        size = z.abs().mean(1, keepdim=True)
        return size if self.window is None else nn.functional.avg_pool2d(size, *self.window)


@register_surgery
@dataclass(frozen=True)
class BinarizeInputs:
    """Let layers see the signs of their inputs: each becomes a :class:`BinaryInput` with a fresh norm.

    Args:
        layers: names; the weight of ``name`` is ``name.layer.weight`` afterwards.
        input_scale: of all of them.
    """

    layers: list[str]
    input_scale: bool = False

    def apply_(self, net: nn.Module) -> None:
        """Wrap the layers of ``net`` in place.

        Raises:
            ValueError: when ``net`` lacks a layer, one is no plain convolution or linear layer, or its inputs are signs
                already; ``net`` is then as it was.
        """
        modules = dict(net.named_modules())
        for name in self.layers:
            layer, parent = modules.get(name), modules.get(name.rpartition(".")[0])
            if type(layer) not in (nn.Conv2d, nn.Linear) or isinstance(parent, BinaryInput):
                raise ValueError(
                    f"{type(net).__name__} has no plain convolution or linear layer {name} with inputs that are no "
                    "signs yet: binarize the net that the plan was made for, and once."
                )
            if self.input_scale and isinstance(layer, nn.Conv2d):
                try:
                    _window(layer)
                except ValueError as error:
                    raise ValueError(f"the inputs of {name} have no scale: {error}: exclude it.") from None
        for name in self.layers:
            net.set_submodule(name, BinaryInput(modules[name], self.input_scale))


def count_sign_macs(net: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """Multiply-accumulates of one image whose inputs are signs: with binary weights, what XNOR and popcount could do.

    They are a part of :func:`project.metrics.complexity.count_macs`, since they run as multiplications of floats.
    """
    inside = tuple(f"{name}." for name, module in net.named_modules() if isinstance(module, BinaryInput))
    return sum(row.macs for row in complexity_by_layer(net, image_shape) if row.name.startswith(inside))


def _window(conv: nn.Conv2d) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    padding = conv.padding
    if conv.groups != 1 or conv.dilation != (1, 1) or conv.padding_mode != "zeros" or isinstance(padding, str):
        raise ValueError("K is a mean over the windows of a convolution of one group, padded by numbers of zeros")
    if any(2 * side > size for side, size in zip(padding, conv.kernel_size, strict=True)):
        raise ValueError(f"padding {padding} is more than half of the kernel {conv.kernel_size}")
    return conv.kernel_size, conv.stride, padding
