"""The scales of norms, and the penalty that trains for pruning by them.

Network Slimming, Liu et al. 2017 (arXiv:1708.06519, eq. 1): an L1 penalty on the scales of the batch norms drives those
of useless channels to zero. Then the channels of the least scales are pruned, in our :class:`Pruner` with the criterion
``norm_scale``. The other norms with a scale for each channel are treated in the same way.
"""

import torch
from torch import Tensor, nn

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


class NormScaleL1(nn.Module):
    """``strength * sum |scale|`` over the scales of all norms of a net. An argument ``penalties`` of the classifier.

    Example::

        model:
          penalties:
            class_path: project.compression.NormScaleL1
            init_args: {strength: 1.e-4}

    Args:
        strength: factor of the penalty, 0 or more. The paper uses 1e-4 and 1e-5.

    Raises:
        ValueError: if the strength is negative.
    """

    def __init__(self, strength: float = 1e-4) -> None:
        super().__init__()
        if not strength >= 0:
            raise ValueError(
                f"strength is {strength}, but a negative penalty rewards large scales: choose 0 (off) or a small "
                "number such as 1e-4."
            )
        self.strength = strength

    def forward(self, net: nn.Module) -> Tensor | None:
        """The loss term, a scalar with gradients; ``None`` if the net has no such scale."""
        scales: list[Tensor] = list(norm_scales(net).values())
        return self.strength * torch.stack(torch._foreach_norm(scales, 1)).sum() if scales else None

    def extra_repr(self) -> str:
        return f"strength={self.strength}"


def norm_scales(net: nn.Module) -> dict[str, nn.Parameter]:
    """The scales of a net's norms, by their names in ``net.named_parameters()``. A shared one appears once.

    Args:
        net: net whose norms are looked for.
    """
    own = {
        id(module._parameters.get("weight"))
        for module in net.modules()
        if isinstance(module, _NORMS) or "Norm" in type(module).__name__
    }
    return {name: each for name, each in net.named_parameters() if id(each) in own and each.dim() == 1}
