"""Weight sharing: a layer's weights take few values, and these are trained.

Han, Mao & Dally 2016, Deep Compression (arXiv:1510.00149, sec. 3): k-means of each layer's weights, after training
(sec. 3.1); the centers go on learning by the sum of their weights' gradients (sec. 3.3, eq. 3 and figure 3). Zeros of a
pruned layer are not clustered: they stay zero, beside the codebook. Entries are used as float16, what a file keeps;
what learns is float32.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from project.compression.weight_sharing.kmeans import Start, assign, kmeans


@dataclass(frozen=True)
class Sharer:
    """What is shared, and among how many values.

    Args:
        bits: a layer has at most ``2 ** bits`` values, and 0 where it is pruned; 1 to 8.
        layer_bits: regular expression, searched for in the names of layers -> bits in place of ``bits``; the first that
            finds a layer counts.
        budget_bytes: in place of ``bits``: what all shared weights may take in a file, as
            :func:`project.compression.weight_sharing.bit_budget.estimated_bytes` counts; each layer gets what costs the
            net's outputs least.
        start: of k-means; see :func:`project.compression.weight_sharing.kmeans.kmeans`.
        include: regular expressions, searched for in the names of layers; what none of them finds is left alone.
        exclude: likewise, what is left alone. Biases and norms are never shared.
        num_images: training images that the budget's choice is measured on.

    Raises:
        ValueError: for numbers outside their range, and for bits of layers beside a budget.
    """

    bits: int = 4
    layer_bits: dict[str, int] = field(default_factory=dict)
    budget_bytes: int | None = None
    start: Start = "optimal"
    include: list[str] = field(default_factory=lambda: [".*"])
    exclude: list[str] = field(default_factory=list)
    num_images: int = 256

    def __post_init__(self) -> None:
        for name, bits in (("bits", self.bits), *(("layer_bits", bits) for bits in self.layer_bits.values())):
            if not 1 <= bits <= 8:
                raise ValueError(f"{name} is {bits}, but a codebook has 2 to 256 values: choose 1 to 8.")
        if self.budget_bytes is not None and self.budget_bytes < 1:
            raise ValueError(f"budget_bytes is {self.budget_bytes}: choose a number above 0, or null for fixed bits.")
        if self.budget_bytes is not None and self.layer_bits:
            raise ValueError("layer_bits and budget_bytes are given, but a budget chooses all bits: drop one.")
        if self.num_images < 1:
            raise ValueError(f"num_images is {self.num_images}: choose 1 or more.")

    def layers(self, net: nn.Module) -> dict[str, int]:
        """Names of the shared layers' weights -> bits, in the order of the net.

        Raises:
            ValueError: when an expression finds no layer, or none is left.
        """
        names = [name for name, module in net.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
        for argument in ("include", "exclude", "layer_bits"):
            for pattern in getattr(self, argument):
                if not any(re.search(pattern, name) for name in names):
                    near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4) or names[:3]
                    raise ValueError(f"{argument} has {pattern!r}, which finds no layer: there are {', '.join(near)}.")
        chosen = [name for name in names if _finds(self.include, name) and not _finds(self.exclude, name)]
        if not chosen:
            raise ValueError("no layer is left to share weights in: include more layers, or exclude fewer.")
        own = self.layer_bits.items()
        bits = {name: next((bits for pattern, bits in own if re.search(pattern, name)), self.bits) for name in chosen}
        return {f"{name}.weight": number for name, number in bits.items()}


class Codebook:
    """The values that a net's weights share: ``weight = values[index]``, for each shared weight by its name.

    ``centers[name]`` is ``[1 + k]`` float32: 0, which stays, and the k centers; ``index[name]`` has the weight's shape.
    """

    def __init__(self, centers: dict[str, Tensor], index: dict[str, Tensor]) -> None:
        self.centers, self.index = centers, index

    @classmethod
    def of(cls, net: nn.Module, bits: Mapping[str, int], start: Start = "optimal", seed: int = 0) -> "Codebook":
        """K-means of each named weight but for its zeros.

        Args:
            net: is not changed.
            bits: by the names of weights.
            start, seed: of k-means.

        Raises:
            ValueError: for a weight that is not finite, has no value but 0, or one beyond float16's range.
        """
        centers, index = {}, {}
        for name, num_bits in bits.items():
            centers[name], index[name] = _share(name, net.get_parameter(name).detach(), num_bits, start, seed)
        return cls(centers, index)

    def to_(self, device: torch.device | str) -> "Codebook":
        """Itself, where the net is; an optimizer of the centers is to be made afterwards."""
        self.centers = {name: centers.to(device) for name, centers in self.centers.items()}
        self.index = {name: index.to(device) for name, index in self.index.items()}
        return self

    @torch.no_grad()
    def write_(self, net: nn.Module) -> None:
        """The shared values into the net's weights."""
        for name, centers in self.centers.items():
            weight = net.get_parameter(name)
            _flat(weight, weight).copy_(centers.half().to(weight.dtype)[self._flat_index(name, weight)])

    @torch.no_grad()
    def gradients(self, net: nn.Module) -> dict[str, Tensor]:
        """The sum of the gradients of each center's weights (eq. 3), ``[1 + k]``; 0 is that of 0, and those of a weight
        without a gradient, which no image has passed.
        """
        sums = {}
        for name, centers in self.centers.items():
            weight = net.get_parameter(name)
            if weight.grad is None:
                sums[name] = torch.zeros_like(centers)
                continue
            index, grad = self._flat_index(name, weight), _flat(weight.grad, weight).to(centers.dtype)
            sums[name] = torch.bincount(index, grad, minlength=len(centers)).to(centers.dtype)
            sums[name][0] = 0
        return sums

    @torch.no_grad()
    def gather_(self, net: nn.Module) -> None:
        """The centers become the means of what the net's weights are now, as where these are averages over time."""
        for name, centers in self.centers.items():
            weight = net.get_parameter(name)
            index = self._flat_index(name, weight)
            sums = torch.bincount(index, _flat(weight, weight).double(), minlength=len(centers))
            counts = torch.bincount(index, minlength=len(centers))
            means = (sums / counts.clamp(min=1)).to(centers.dtype)
            means[0] = 0
            centers.copy_(torch.where(counts > 0, means, centers))

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors; a number of a center takes two bytes."""
        return {"centers": self.centers, "index": {name: index.short() for name, index in self.index.items()}}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "Codebook":
        return cls(dict(state["centers"]), dict(state["index"]))

    def _flat_index(self, name: str, weight: Tensor) -> Tensor:
        """In the order in which the weight lies in memory; made once."""
        index = self.index[name]
        if index.dtype != torch.long or index.stride() != weight.stride():
            index = self.index[name] = torch.empty_like(weight, dtype=torch.long).copy_(index)
        return _flat(index, weight)


def _share(name: str, weight: Tensor, num_bits: int, start: Start, seed: int) -> tuple[Tensor, Tensor]:
    kept = weight != 0
    values = weight[kept].double().cpu().numpy()
    if not len(values):
        raise ValueError(
            f"all weights of {name} are 0, and there is nothing to share: prune less, or exclude the layer."
        )
    found = kmeans(values, 2**num_bits, start, seed=seed)
    centers = torch.tensor([0.0, *found])
    if not centers.half().isfinite().all():
        raise ValueError(f"{name} holds {float(weight.abs().max()):g}, beyond float16: exclude the layer.")
    index = torch.zeros_like(weight, dtype=torch.long)
    index[kept] = torch.from_numpy(assign(values, found)).to(weight.device) + 1
    return centers.to(weight.device), index


def _flat(x: Tensor, like: Tensor) -> Tensor:
    """``x`` in the order in which ``like`` lies in memory; a view where both lie alike."""
    if like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).reshape(-1)
    return x.reshape(-1)


def _finds(patterns: Iterable[str], name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)
