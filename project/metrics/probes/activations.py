"""The sparsity of activations: the share of zeros in the output of each ReLU.

Glorot et al. 2011, Deep sparse rectifier neural networks (sec. 3.1); Srivastava et al. 2014 (JMLR 15, sec. 7.2 and fig.
8) find that dropout makes activations sparse. A value counts as zero if it is exactly 0. Sigmoid, tanh, GELU and the
like give no exact zeros, so their share is 0.

Activation modules are found by their class: those of ``torch.nn.modules.activation``, and subclasses. What a net calls
as a function (``torch.relu(x)``) is no module and is not seen. A module that is called several times counts as one. The
project's C kernels, which compute convolution, norm and ReLU as one, step aside for a layer with a hook.
"""

import torch
from torch import Tensor, nn
from torch.nn.modules import activation

_NO_ACTIVATIONS = (nn.MultiheadAttention, nn.Softmax, nn.Softmax2d, nn.Softmin, nn.LogSoftmax)


def is_activation(module: nn.Module) -> bool:
    """Whether a module is an activation of torch, or of a subclass."""
    return not isinstance(module, _NO_ACTIVATIONS) and any(
        base.__module__ == activation.__name__ for base in type(module).__mro__
    )


@torch.no_grad()
def activation_sparsity(net: nn.Module, images: Tensor) -> dict[str, float]:
    """The share of exact zeros in the output of each activation module, by its name; between 0 and 1.

    It costs one forward pass. The net runs in the mode that it has. In training mode the running statistics of batch
    norm change and dropout draws random numbers: see :func:`project.metrics.probes.unchanged`.

    Args:
        net: module with activation modules.
        images: images ``[N, C, H, W]`` as the net takes them, on its device, at least one.

    Raises:
        ValueError: if there are no images, or if no activation module runs.
    """
    if not len(images):
        raise ValueError("images is empty: give at least one image.")
    zeros: dict[str, Tensor] = {}
    totals: dict[str, int] = {}

    def count(name: str, output: Tensor) -> None:
        found = (output == 0).sum()
        zeros[name] = zeros[name] + found if name in zeros else found
        totals[name] = totals.get(name, 0) + output.numel()

    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output, name=name: count(name, output))
        for name, module in net.named_modules()
        if is_activation(module)
    ]
    try:
        net(images)
    finally:
        for hook in hooks:
            hook.remove()
    if not totals:
        raise ValueError(
            f"net has no activation module that runs ({type(net).__name__}): use modules such as nn.ReLU, because "
            "functions such as torch.relu cannot be seen."
        )
    return {name: zeros[name].item() / total for name, total in totals.items()}
