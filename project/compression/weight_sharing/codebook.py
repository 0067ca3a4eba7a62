"""Weight sharing: the weights of a layer take only a few different values, and these values are trained.

Han, Mao & Dally 2016, Deep Compression (arXiv:1510.00149, sec. 3). After training, k-means clusters the weights of each
layer (sec. 3.1). Then the centers are trained further: the gradient of a center is the sum of the gradients of its
weights (sec. 3.3, eq. 3 and figure 3). The zeros of a pruned layer are not clustered: they stay zero and are stored
beside the codebook. The net computes with the centers rounded to float16, which a file stores. Training updates float32
centers.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from project.compression.plain_layers import check_weights
from project.compression.weight_sharing.kmeans import Start, assign, kmeans


@dataclass(frozen=True)
class Sharer:
    """Settings of weight sharing: which layers share their weights, and how many values each layer keeps.

    Biases and norms are never shared.

    Example::

        trainer:
          callbacks+:
            - class_path: project.callbacks.WeightSharing
              init_args:
                sharer:
                  class_path: project.compression.Sharer
                  init_args: {bits: 4, layer_bits: {fc: 6}, exclude: ["^stem"]}

    Args:
        bits: number of bits for each layer, 1 to 8. A layer then has at most ``2 ** bits`` values, and 0 if it is
            pruned.
        layer_bits: bits of single layers, 1 to 8, in place of ``bits``. A key is a regular expression; the first one
            that is found in a layer's name (``re.search``) counts.
        budget_bytes: largest size of all shared weights in a file, in bytes; 1 or more. It replaces ``bits``: each
            layer gets the number of bits that changes the net's outputs least. Sizes are those of
            :func:`project.compression.weight_sharing.bit_budget.estimated_bytes`. None means that ``bits`` counts.
        start: first centers of k-means, ``linear``, ``density``, ``random`` or ``optimal``; see
            :func:`project.compression.weight_sharing.kmeans.kmeans`.
        include: regular expressions; a layer is shared if one is found in its name (``re.search``).
        exclude: regular expressions; a layer is not shared if one is found in its name.
        num_images: number of training images for measuring the loss under ``budget_bytes``; 1 or more.

    Raises:
        ValueError: if a number is outside its range, or if both ``layer_bits`` and ``budget_bytes`` are given.
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
                raise ValueError(f"{name} is {bits}, but a layer can keep 2 to 256 values: choose 1 to 8 bits.")
        if self.budget_bytes is not None and self.budget_bytes < 1:
            raise ValueError(f"budget_bytes is {self.budget_bytes}: choose a number above 0, or null for fixed bits.")
        if self.budget_bytes is not None and self.layer_bits:
            raise ValueError("layer_bits and budget_bytes are given, but a budget sets all numbers of bits: drop one.")
        if self.num_images < 1:
            raise ValueError(f"num_images is {self.num_images}: choose 1 or more.")

    def layers(self, net: nn.Module) -> dict[str, int]:
        """The number of bits of each shared weight, by the weight's name, in the order of the net.

        Args:
            net: net with the convolutions and linear layers to share; it is not changed.

        Raises:
            ValueError: if a regular expression matches no layer, or if no layer is left to share.
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
        check_weights(net, chosen, "weight sharing")
        own = self.layer_bits.items()
        bits = {name: next((bits for pattern, bits in own if re.search(pattern, name)), self.bits) for name in chosen}
        return {f"{name}.weight": number for name, number in bits.items()}


class Codebook:
    """The shared values of a net's weights: ``weight = centers[index]`` for each shared weight tensor.

    The center with number 0 is always 0. It stands for the weights that were pruned.

    Example::

        >>> import torch
        >>> from project.compression import Codebook
        >>> net = torch.nn.Linear(4, 2)
        >>> codebook = Codebook.of(net, {"weight": 1})
        >>> codebook.write_(net)
        >>> len(net.weight.unique())
        2

    Args:
        centers: shared values by the weight's name, ``[1 + k]`` in float32: first 0, then the k centers.
        index: numbers of the centers by the weight's name, 0 to k, in the shape of the weight tensor.
    """

    def __init__(self, centers: dict[str, Tensor], index: dict[str, Tensor]) -> None:
        self.centers, self.index = centers, index

    @classmethod
    def of(cls, net: nn.Module, bits: Mapping[str, int], start: Start = "optimal", seed: int = 0) -> "Codebook":
        """Cluster the nonzero values of each named weight tensor by k-means.

        Args:
            net: net with these weights; it is not changed.
            bits: number of bits, 1 to 8, by the name of the weight parameter, such as ``fc.weight``.
            start: first centers of k-means; see :func:`project.compression.weight_sharing.kmeans.kmeans`.
            seed: seed of the k-means start ``random``; any int of 0 or more.

        Raises:
            ValueError: if a weight tensor holds NaN or infinity, holds only zeros, or has a value beyond float16.
        """
        centers, index = {}, {}
        for name, num_bits in bits.items():
            centers[name], index[name] = _share(name, net.get_parameter(name).detach(), num_bits, start, seed)
        return cls(centers, index)

    def to_(self, device: torch.device | str) -> "Codebook":
        """Move the codebook to a device and return it.

        The centers are new tensors afterwards, so create their optimizer after this call.

        Args:
            device: device of the net whose weights are shared.
        """
        self.centers = {name: centers.to(device) for name, centers in self.centers.items()}
        self.index = {name: index.to(device) for name, index in self.index.items()}
        return self

    @torch.no_grad()
    def write_(self, net: nn.Module) -> None:
        """Write the shared values, rounded to float16, into the weights of a net.

        Args:
            net: net whose shared weights are overwritten in place.
        """
        for name, centers in self.centers.items():
            weight = net.get_parameter(name)
            _flat(weight, weight).copy_(centers.half().to(weight.dtype)[self._flat_index(name, weight)])

    @torch.no_grad()
    def gradients(self, net: nn.Module) -> dict[str, Tensor]:
        """The gradients ``[1 + k]`` of the centers, by the weight's name: sums over the weights of a center (eq. 3).

        The gradient of center 0 is always 0. If a weight has no gradient, because the forward pass did not use it, all
        of its centers have gradient 0.

        Args:
            net: net whose weights hold gradients from ``backward``; it is not changed.
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
        """Set each center to the mean of its weights in a net, for example in a net of averaged weights (EMA).

        Args:
            net: net with weights of the same names and shapes; it is not changed.
        """
        for name, centers in self.centers.items():
            weight = net.get_parameter(name)
            index = self._flat_index(name, weight)
            sums = torch.bincount(index, _flat(weight, weight).double(), minlength=len(centers))
            counts = torch.bincount(index, minlength=len(centers))
            means = (sums / counts.clamp(min=1)).to(centers.dtype)
            means[0] = 0
            centers.copy_(torch.where(counts > 0, means, centers))

    def state_dict(self) -> dict[str, Any]:
        """The centers and the indices as plain tensors; an index takes two bytes."""
        return {"centers": self.centers, "index": {name: index.short() for name, index in self.index.items()}}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "Codebook":
        """The codebook that was saved by :meth:`state_dict`.

        Args:
            state: dictionary with the keys ``centers`` and ``index``, as :meth:`state_dict` returns it.
        """
        return cls(dict(state["centers"]), dict(state["index"]))

    def _flat_index(self, name: str, weight: Tensor) -> Tensor:
        """The flat index in the memory order of the weight.

        The conversion is stored in ``index``, so that it is done once and not in every step.
        """
        index = self.index[name]
        if index.dtype != torch.long or index.stride() != weight.stride():
            index = self.index[name] = torch.empty_like(weight, dtype=torch.long).copy_(index)
        return _flat(index, weight)


def _share(name: str, weight: Tensor, num_bits: int, start: Start, seed: int) -> tuple[Tensor, Tensor]:
    """The centers ``[1 + k]`` and the index of one weight tensor; index 0 is kept for its zeros."""
    kept = weight != 0
    values = weight[kept].double().cpu().numpy()
    if not len(values):
        raise ValueError(
            f"all weights of {name} are 0, so that there is nothing to share: prune less, or exclude the layer."
        )
    found = kmeans(values, 2**num_bits, start, seed=seed)
    centers = torch.tensor([0.0, *found])
    if not centers.half().isfinite().all():
        raise ValueError(f"{name} holds {float(weight.abs().max()):g}, which is beyond float16: exclude the layer.")
    index = torch.zeros_like(weight, dtype=torch.long)
    index[kept] = torch.from_numpy(assign(values, found)).to(weight.device) + 1
    return centers.to(weight.device), index


def _flat(x: Tensor, like: Tensor) -> Tensor:
    """``x`` flattened in the memory order of ``like``; a view, not a copy, if ``x`` has that order too."""
    if like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).reshape(-1)
    return x.reshape(-1)


def _finds(patterns: Iterable[str], name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)
