"""The norm of the gradient, layer by layer: whether gradients vanish or explode with depth.

Glorot & Bengio 2010 (AISTATS, fig. 7), Ioffe & Szegedy 2015 (arXiv:1502.03167, sec. 1). The number of a layer is the L2
norm over all gradients of its own parameters together, ``sqrt(sum g^2)``, and not of its children's. A wide layer has
more values, so nets of different width compare by ``norm / sqrt(number of values)`` only.
"""

from torch import Tensor, linalg, nn, stack


def gradient_norms(net: nn.Module) -> dict[str, float]:
    """The L2 norm of the gradients of each layer, by its name, in the order of ``net.named_modules()``.

    It reads ``.grad`` after a backward pass and costs no pass. Layers without gradients are left out. A parameter that
    several layers share counts in the first of them. Norms are summed in float64, so they neither overflow nor vanish.

    Args:
        net: module after a backward pass.

    Raises:
        ValueError: if no parameter has a gradient.
    """
    seen: set[Tensor] = set()
    norms: dict[str, Tensor] = {}
    for name, module in net.named_modules():
        own = [
            parameter
            for parameter in module.parameters(recurse=False)
            if parameter.grad is not None and parameter not in seen
        ]
        seen.update(own)
        gradients = [parameter.grad.detach().cpu() for parameter in own if parameter.grad is not None]
        if gradients:
            of_each = stack([linalg.vector_norm(gradient.double()) for gradient in gradients])
            norms[name.replace("_orig_mod.", "")] = linalg.vector_norm(of_each)
    if not norms:
        raise ValueError("net has no gradients: call loss.backward() before gradient_norms.")
    return {name: norm.item() for name, norm in norms.items()}
