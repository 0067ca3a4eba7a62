"""XNOR-Net: the inputs and the weights of a layer are signs, so that one product needs one bit of each.

Rastegari et al. 2016 (arXiv:1603.05279). By section 3.2, a convolution of inputs ``I`` with weights ``W`` becomes

    I * W  ~  (sign(I) (*) sign(W)) . K a,      a = mean |W| of the filter,      K = mean_c |I_c| * k      (eq. 11).

Here ``k`` is a box filter of the kernel's size, so ``K`` is the mean of ``|I|`` over all channels of each window. The
gradient of the sign is straight-through where ``|I| <= 1`` (sec. 3.1, Courbariaux et al. 2016, arXiv:1602.02830).

Section 3.3 gives the order: norm, sign, convolution. The norm is necessary here, because the inputs come from a ReLU
and would all have the sign +. So each layer gets a batch norm of its own before the sign. The norm and the ReLU that
follow the layer stay. The weights are those of :func:`project.compression.low_bit.ternary.binary_weight`.

Without ``input_scale`` there is no ``K``. The paper itself says that ``K`` matters little. Bulat & Tzimiropoulos 2019
(arXiv:1909.13863, XNOR-Net++) get better results with learned scales, and the norm after a layer has such a scale for
each channel. On the digits, ``K`` makes the accuracy worse (``configs/compression/xnor.yaml``).

Deviations: the sign of 0 is +. Zero padding stays zero. The branches of an Inception block read the same map, but each
branch has its own norm. ``K`` is a constant in the gradient, as ``a`` is.

The gain is a small file: one bit for each weight. The net is not faster. No engine here has a kernel that counts bits
(XNOR and popcount; the paper expects 58 times on a CPU, sec. 4.1), so signs are multiplied as floats, and the norm and
the sign take additional time. :func:`count_sign_macs` counts the operations that such a kernel could do.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from project.compression.plain_layers import is_plain
from project.metrics.complexity import complexity_by_layer
from project.models.surgery import register_surgery


class _Sign(torch.autograd.Function):
    """The sign with the straight-through gradient of :func:`binary_sign`."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return gradients[0] * (x.abs() <= 1)


def binary_sign(x: Tensor) -> Tensor:
    """1 where ``x >= 0``, else -1. The gradient is passed on unchanged where ``|x| <= 1``; elsewhere it is 0.

    Args:
        x: inputs of any shape.
    """
    result: Tensor = _Sign.apply(x)
    return result


class BinaryInput(nn.Module):
    """A layer with binary inputs: ``layer(sign(norm(x)))``, multiplied by ``K`` if ``input_scale`` is true.

    This class does not change the weights. :class:`~project.compression.low_bit.ternary.LowBitWeights` makes them
    binary.

    Args:
        layer: convolution for inputs ``[N, C, H, W]`` or linear layer for inputs ``[N, C]``. It becomes a submodule.
        input_scale: whether to multiply the output by ``K``. The layer's bias then moves to this module, which adds it
            after the multiplication.

    Raises:
        ValueError: if ``input_scale`` is true and ``K`` is not defined for the convolution.
    """

    inputs_are_signs = True

    def __init__(self, layer: nn.Conv2d | nn.Linear, input_scale: bool = False) -> None:
        super().__init__()
        self.input_scale = input_scale
        self.window = _window(layer) if input_scale and isinstance(layer, nn.Conv2d) else None
        """Kernel size, stride and padding of a convolution with ``K``; None for other layers."""
        self.norm: nn.Module = (
            nn.BatchNorm2d(layer.in_channels) if isinstance(layer, nn.Conv2d) else nn.BatchNorm1d(layer.in_features)
        )
        self.layer = layer
        self.bias: Tensor | None = None
        if input_scale:
            self.bias, layer.bias = layer.bias, None
        self.norm.to(layer.weight.device, layer.weight.dtype)
        self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(x)
        y = self.layer(binary_sign(z))
        if not self.input_scale:
            return y
        y = y * self.scale(z.detach())
        return y if self.bias is None else y + self.bias.view(-1, *[1] * (y.dim() - 2))

    def scale(self, z: Tensor) -> Tensor:
        """The scale ``K`` of eq. 11: ``[N, 1, H', W']`` for a convolution, ``[N, 1]`` for a linear layer.

        Args:
            z: normalised inputs ``[N, C, H, W]`` or ``[N, C]``, before the sign.
        """
        size = z.abs().mean(1, keepdim=True)
        return size if self.window is None else nn.functional.avg_pool2d(size, *self.window)


@register_surgery
@dataclass(frozen=True)
class BinarizeInputs:
    """Surgery that wraps layers in :class:`BinaryInput`, each with a new norm, so that they compute with binary inputs.

    Example::

        >>> import torch
        >>> from project.compression import BinarizeInputs
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> BinarizeInputs(["2"]).apply_(net)
        >>> list(dict(net[2].named_children()))
        ['norm', 'layer']

    Args:
        layers: names of convolutions and linear layers. Afterwards the weight of ``name`` is ``name.layer.weight``.
        input_scale: whether these layers multiply their outputs by ``K`` (eq. 11 of the paper).
    """

    layers: list[str]
    input_scale: bool = False

    def apply_(self, net: nn.Module) -> None:
        """Wrap the layers in place.

        Args:
            net: net with these layers, all plain convolutions or linear layers.

        Raises:
            ValueError: if the net lacks a layer, if a layer is neither a plain convolution nor a plain linear layer, if
                its inputs are binary already, or if ``K`` is not defined for it. The net is not changed then.
        """
        modules = dict(net.named_modules())
        for name in self.layers:
            layer, parent = modules.get(name), modules.get(name.rpartition(".")[0])
            if not is_plain(layer) or isinstance(parent, BinaryInput):
                raise ValueError(
                    f"{type(net).__name__} has no plain convolution or linear layer {name} whose inputs are still "
                    "floats: apply the surgery to the net that it was planned for, and once."
                )
            if self.input_scale and isinstance(layer, nn.Conv2d):
                try:
                    _window(layer)
                except ValueError as error:
                    raise ValueError(f"the inputs of {name} have no scale K, since {error}: exclude it.") from None
        for name in self.layers:
            net.set_submodule(name, BinaryInput(modules[name], self.input_scale))


def count_sign_macs(net: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """The number of multiply-accumulates with binary inputs for one image: with binary weights, XNOR could do them.

    :func:`project.metrics.complexity.count_macs` counts them too, since they run as multiplications of floats.

    Args:
        net: net with :class:`BinaryInput` layers; without them the result is 0.
        image_shape: shape (C, H, W) of one image.
    """
    inside = tuple(f"{name}." for name, module in net.named_modules() if isinstance(module, BinaryInput))
    return sum(row.macs for row in complexity_by_layer(net, image_shape) if row.name.startswith(inside))


def _window(conv: nn.Conv2d) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Kernel size, stride and padding for the average pooling that computes ``K``.

    Raises:
        ValueError: if ``K`` is not defined for this convolution.
    """
    padding = conv.padding
    if conv.groups != 1 or conv.dilation != (1, 1) or conv.padding_mode != "zeros" or isinstance(padding, str):
        raise ValueError("K needs a convolution of one group, without dilation, with a number of zeros as padding")
    if any(2 * side > size for side, size in zip(padding, conv.kernel_size, strict=True)):
        raise ValueError(f"padding {padding} is more than half of the kernel {conv.kernel_size}")
    return conv.kernel_size, conv.stride, padding
