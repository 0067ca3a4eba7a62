"""Penalties and constraints on weights, each with its own strength for convolutions and fully connected layers.

L2, weight decay as a loss term: Krogh & Hertz 1991, A simple weight decay can improve generalization, eq. 2. L1:
Tibshirani 1996, Regression shrinkage and selection via the lasso. Max-norm: Srivastava et al. 2014 (JMLR 15, sec. 5.1).
Only the weights of convolutions and linear layers count. The scales and shifts of norms and all biases do not
(Goodfellow et al. 2016, Deep Learning, sec. 7.1).

A loss term differs from an optimizer's ``weight_decay``. Adam rescales the gradient of a loss term together with the
rest of the gradient; AdamW's weight decay is not rescaled (Loshchilov & Hutter 2019, arXiv:1711.05101). With SGD,
``l2`` takes the same steps as a ``weight_decay`` of the same strength.
"""

import torch
from torch import Tensor, nn

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Penalties(nn.Module):
    """``l1 * sum |w| + l2 / 2 * sum w^2`` over the weights of a net; the gradients are ``l1 * sign(w)`` and ``l2 * w``.

    Example::

        model:
          penalties:
            class_path: project.losses.Penalties
            init_args: {l1_conv: 1.e-5, l2_fc: 1.e-4}

    Args:
        l1_conv: strength of the L1 penalty on the weights of convolutions, 0 or more.
        l1_fc: strength of the L1 penalty on the weights of linear layers, 0 or more.
        l2_conv: strength of the L2 penalty on the weights of convolutions, 0 or more.
        l2_fc: strength of the L2 penalty on the weights of linear layers, 0 or more.

    Raises:
        ValueError: if a strength is negative.
    """

    def __init__(self, l1_conv: float = 0.0, l1_fc: float = 0.0, l2_conv: float = 0.0, l2_fc: float = 0.0) -> None:
        super().__init__()
        for name, strength in {"l1_conv": l1_conv, "l1_fc": l1_fc, "l2_conv": l2_conv, "l2_fc": l2_fc}.items():
            if not strength >= 0:
                raise ValueError(
                    f"{name} is {strength}, but a negative penalty rewards large weights: "
                    "choose 0 (off) or a small number such as 1e-4."
                )
        self.l1_conv, self.l1_fc, self.l2_conv, self.l2_fc = l1_conv, l1_fc, l2_conv, l2_fc

    def forward(self, net: nn.Module) -> Tensor | None:
        """The loss term, a scalar with gradients; ``None`` if there is nothing to add."""
        if not (self.l1_conv or self.l1_fc or self.l2_conv or self.l2_fc):
            return None
        conv, fc = weights_by_kind(net)
        terms = [
            term
            for weights, l1, l2 in ((conv, self.l1_conv, self.l2_conv), (fc, self.l1_fc, self.l2_fc))
            for term in _terms(weights, l1, l2)
        ]
        return torch.stack(terms).sum() if terms else None

    def extra_repr(self) -> str:
        return f"l1_conv={self.l1_conv}, l1_fc={self.l1_fc}, l2_conv={self.l2_conv}, l2_fc={self.l2_fc}"


class MaxNorm(nn.Module):
    """Projects the incoming weight vector of each unit onto ``||w|| <= c``. It is called after each optimizer step.

    A unit of a convolution is one output channel; its incoming vector holds all weights of this channel's kernel.

    Example::

        model:
          max_norm:
            class_path: project.losses.MaxNorm
            init_args: {conv: 4, fc: 3}

    Args:
        conv: largest norm c in convolutions, above 0. The paper used 3 to 4, with dropout. ``None`` means no bound.
        fc: largest norm c in linear layers, above 0. ``None`` means no bound.

    Raises:
        ValueError: if a norm is not positive.
    """

    def __init__(self, conv: float | None = None, fc: float | None = None) -> None:
        super().__init__()
        for name, norm in {"conv": conv, "fc": fc}.items():
            if norm is not None and not norm > 0:
                raise ValueError(
                    f"max-norm {name} is {norm}, but it bounds the length of a weight vector: "
                    "choose a number above 0, such as 3, or null for no bound."
                )
        self.conv, self.fc = conv, fc

    @torch.no_grad()
    def forward(self, net: nn.Module) -> None:
        """Project the weights of ``net`` in place. Without a bound nothing changes."""
        if self.conv is None and self.fc is None:
            return
        conv, fc = weights_by_kind(net)
        for weights, norm in ((conv, self.conv), (fc, self.fc)):
            if norm is not None:
                for weight in weights:
                    weight.renorm_(p=2, dim=0, maxnorm=norm)

    def extra_repr(self) -> str:
        return f"conv={self.conv}, fc={self.fc}"


def weights_by_kind(net: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The weights of the convolutions and of the linear layers; a weight that two layers share appears once."""
    kinds: tuple[dict[int, Tensor], dict[int, Tensor]] = ({}, {})
    for module in net.modules():
        if isinstance(module, (*_CONV, nn.Linear)):
            own = module._parameters.get("weight")  # a technique may hide it while it trains with another weight
            weight = module.weight if own is None else own
            kinds[isinstance(module, nn.Linear)][id(weight)] = weight
    return list(kinds[0].values()), list(kinds[1].values())


def _terms(weights: list[Tensor], l1: float, l2: float) -> list[Tensor]:
    """The scalars whose sum is the penalty. There is one foreach call per kind, because one call per layer would cost a
    few percent of a small net's step.
    """
    terms = []
    if l1 and weights:
        terms.append(l1 * torch.stack(torch._foreach_norm(weights, 1)).sum())
    if l2 and weights:
        terms.append(l2 / 2 * torch.stack(torch._foreach_norm(weights, 2)).square().sum())
    return terms
