"""Low-rank layers: thin ones in the place of a thick one, with the ranks that keep most of it.

The factors and their papers are in :mod:`project.compression.low_rank.factors`. Ranks: by energy (Denton et al. 2014,
arXiv:1404.0736); by variational Bayes (Kim et al. 2016, arXiv:1511.06530, sec. 3.2;
:mod:`project.compression.low_rank.vbmf`); or for all layers at once by a budget of multiply-accumulates
(:mod:`project.compression.low_rank.rank_budget`). The surgery is
:class:`project.compression.low_rank.thin_layers.Factorize`.
"""

import math
import re
from collections.abc import Mapping
from copy import deepcopy
from itertools import product
from typing import Literal

import torch
from torch import Tensor, nn

from project.compression.low_rank.factors import Kind, Ranks, errors_of, factors_of, kinds_of, largest_ranks, matrix_of
from project.compression.low_rank.layer_responses import Positions, positions_of, second_moments
from project.compression.low_rank.rank_budget import Option, choose_within
from project.compression.low_rank.thin_layers import Factorize
from project.compression.low_rank.vbmf import vbmf_rank
from project.metrics.complexity import count_macs

Moments = Mapping[tuple[str, Kind], Tensor]


class Factorizer:
    """Chooses which layers become thin ones, of which kind and rank: those that then multiply less, and no other.

    Args:
        kinds: what may be chosen among, layer by layer: ``svd``, ``spatial``, ``tucker``; see
            :mod:`project.compression.low_rank.factors`.
        ranks: by ``macs``: the least loss, over all layers, with ``macs_left``; by ``energy``: the lowest that keep
            ``energy``; by ``vbmf``: those that stand out of the noise. The last two take the cheapest kind.
        macs_left: share of the whole net's multiply-accumulates, in (0, 1).
        energy: share of the squares that is kept, in (0, 1], of the weight or of the layer's responses.
        round_to: ranks are multiples of it, rounded up: dense kernels work on 8 or 16 channels at a time, and a rank of
            24 takes as long as one of 32 on a processor with 512-bit vectors.
        num_images: training images to measure responses on, so that ``svd`` and ``spatial`` keep those instead of the
            weights, and that what a layer loses counts as what the logits lose by it; 0 looks at the weights alone.
        include: regular expressions, searched for in the names of layers; what none of them finds is left alone.
        exclude: likewise, what is left alone; null is the default: the stem (the first layer) and the head (the last).

    Raises:
        ValueError: for a number out of its range, and unknown or no kinds.
    """

    def __init__(
        self,
        kinds: list[Kind] | None = None,
        ranks: Literal["macs", "energy", "vbmf"] = "macs",
        macs_left: float = 0.5,
        energy: float = 0.9,
        round_to: int = 16,
        num_images: int = 256,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
    ) -> None:
        self.kinds: list[Kind] = ["svd", "spatial"] if kinds is None else kinds
        if not self.kinds or not {*self.kinds} <= {"svd", "spatial", "tucker"}:
            raise ValueError(f"kinds is {self.kinds}: choose some of svd, spatial, tucker.")
        if ranks not in ("macs", "energy", "vbmf"):
            raise ValueError(f"ranks is {ranks!r}: choose macs, energy or vbmf.")
        if not 0 < macs_left < 1:
            raise ValueError(f"macs_left is {macs_left}, but it is a share of the net's: choose above 0, below 1.")
        if not 0 < energy <= 1:
            raise ValueError(f"energy is {energy}, but it is the share that is kept: choose above 0, up to 1.")
        if round_to < 1 or num_images < 0:
            raise ValueError(f"round_to is {round_to} and num_images {num_images}: choose at least 1, and 0 or more.")
        self.ranks, self.macs_left, self.energy = ranks, macs_left, energy
        self.round_to, self.num_images = round_to, num_images
        self.include, self.exclude = include or [".*"], exclude

    def plan(
        self, net: nn.Module, image_shape: tuple[int, int, int], images: Tensor | None = None
    ) -> tuple[Factorize, dict[str, Tensor]]:
        """The surgery, and the weights that the thin layers are to have after it, by their names.

        Args:
            net: stays as it is.
            image_shape: (C, H, W).
            images: ``[N, C, H, W]`` as the net takes them; with ``num_images`` alone.

        Raises:
            ValueError: when an expression finds no layer, no layer gets cheaper, or the budget can not be met.
        """
        if self.num_images and (images is None or not len(images)):
            raise ValueError(f"num_images is {self.num_images}, but there are no images: give some, or set it to 0.")
        net = deepcopy(net).cpu().eval()
        images = images.cpu() if self.num_images and images is not None else None
        positions = positions_of(net, image_shape)
        weights = {name: weight for name, weight in self._weights(net).items() if name in positions}
        moments: Moments = {}
        if images is not None:
            kinds = {name: {"svd", "spatial"}.intersection(self._kinds(weight)) for name, weight in weights.items()}
            moments = second_moments(net, kinds, images)  # type: ignore[arg-type]
        options = {name: self._options(name, weight, positions[name], moments) for name, weight in weights.items()}
        if self.ranks == "macs":
            if images is not None:
                options = _weighted(net, options, moments, images)
            whole = count_macs(net, image_shape)
            rest = whole - sum(choices[0].macs for choices in options.values())
            chosen = choose_within(options, self.macs_left * whole - rest)
        else:
            chosen = {name: min(choices, key=lambda option: option.macs) for name, choices in options.items()}
        thin = {name: option for name, option in chosen.items() if option.kind != "dense"}
        if not thin:
            raise ValueError(
                "no layer multiplies less with the ranks it would get: lower energy or round_to, or include more."
            )
        return _surgery(net, image_shape, thin, moments)

    def _weights(self, net: nn.Module) -> dict[str, Tensor]:
        """Of the plain layers that are included, by name."""
        layers = {name: layer for name, layer in net.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
        for argument, patterns in (("include", self.include), ("exclude", self.exclude or [])):
            for pattern in patterns:
                if not any(re.search(pattern, name) for name in layers):
                    raise ValueError(f"{argument} has {pattern!r}, which finds no layer of the net.")
        ends = [f"^{re.escape(name)}$" for name in (*list(layers)[:1], *list(layers)[-1:])]
        excluded = ends if self.exclude is None else self.exclude
        owners = [id(p) for _, p in net.named_parameters(remove_duplicate=False)]
        return {
            name: layer.weight
            for name, layer in layers.items()
            if any(re.search(pattern, name) for pattern in self.include)
            and not any(re.search(pattern, name) for pattern in excluded)
            and type(layer) in (nn.Conv2d, nn.Linear)  # others may use their weight in their own way
            and getattr(layer, "groups", 1) == 1
            and owners.count(id(layer.weight)) == 1
            and name
        }

    def _kinds(self, weight: Tensor) -> list[Kind]:
        return [kind for kind in kinds_of(weight) if kind in self.kinds]

    def _options(self, name: str, weight: Tensor, positions: Positions, moments: Moments) -> list[Option]:
        """The layer as it is, then what is cheaper."""
        dense = positions.macs(weight, None)
        options = [Option("dense", (), dense, 0.0)]
        for kind in self._kinds(weight):
            errors = errors_of(weight, kind, moments.get((name, kind)))
            for ranks in self._ranks(weight, kind, errors):
                macs = positions.macs(weight, kind, ranks)
                if macs < dense:
                    options.append(Option(kind, ranks, macs, max(float(errors[ranks]), 0.0)))
        return options

    def _ranks(self, weight: Tensor, kind: Kind, errors: Tensor) -> list[Ranks]:
        """What is to be considered: all multiples, or the ones that a criterion asks for."""
        most = largest_ranks(weight, kind)
        if self.ranks == "macs":
            return list(product(*(range(self.round_to, rank + 1, self.round_to) for rank in most)))
        if self.ranks == "energy":
            wanted = _lowest(errors, self.energy)
        elif kind == "tucker":
            wanted = (vbmf_rank(weight.transpose(0, 1).flatten(1)), vbmf_rank(weight.flatten(1)))
        else:
            wanted = (vbmf_rank(matrix_of(weight, kind)),)
        rounded = tuple(math.ceil(max(rank, 1) / self.round_to) * self.round_to for rank in wanted)
        return [tuple(min(pair) for pair in zip(rounded, most, strict=True))]


def _lowest(errors: Tensor, energy: float) -> Ranks:
    """The lowest ranks that keep ``energy``; of ``tucker`` those of least sum."""
    enough = (errors <= 1 - energy + 1e-9).nonzero()
    return tuple(int(rank) for rank in enough[enough.sum(dim=1).argmin()])


@torch.no_grad()
def _weighted(
    net: nn.Module, options: Mapping[str, list[Option]], moments: Moments, images: Tensor
) -> dict[str, list[Option]]:
    """The same options with their errors in the logits' squares: each layer and kind is tried once, with the lowest
    ranks, and the errors of the others are taken to weigh as much.
    """
    logits = _run(net, images)
    weighted = {}
    for name, choices in options.items():
        weights: dict[str, float] = {"dense": 0.0}
        for option in choices:
            if option.kind not in weights:
                changed = deepcopy(net)
                surgery, factors = _factors(net, {name: option}, moments)
                surgery.apply_(changed)
                load_(changed, factors)
                loss = float((_run(changed, images) - logits).square().mean() / logits.var())
                weights[option.kind] = loss / max(option.error, 1e-12)
        weighted[name] = [
            Option(option.kind, option.ranks, option.macs, option.error * weights[option.kind]) for option in choices
        ]
    return weighted


def _run(net: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([net(chunk) for chunk in images.split(64)])


def _factors(net: nn.Module, chosen: Mapping[str, Option], moments: Moments) -> tuple[Factorize, dict[str, Tensor]]:
    kinds: dict[str, Kind] = {name: option.kind for name, option in chosen.items() if option.kind != "dense"}
    weights = {
        f"{name}.{number}.weight": factor
        for name, kind in kinds.items()
        for number, factor in enumerate(
            factors_of(net.get_parameter(f"{name}.weight"), kind, chosen[name].ranks, moments.get((name, kind)))
        )
    }
    return Factorize(kinds, {name: list(chosen[name].ranks) for name in kinds}), weights


def _surgery(
    net: nn.Module, image_shape: tuple[int, int, int], thin: Mapping[str, Option], moments: Moments
) -> tuple[Factorize, dict[str, Tensor]]:
    """Tried on the copy: a net that reads a layer's weight itself can not do without it."""
    surgery, weights = _factors(net, thin, moments)
    before = count_macs(net, image_shape)
    surgery.apply_(net)
    try:
        after = count_macs(net, image_shape)
    except (AttributeError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"with thin layers for {', '.join(thin)} {type(net).__name__} no longer runs ({error}): exclude the layers "
            "whose weights it reads itself."
        ) from error
    assert after < before
    return surgery, weights


@torch.no_grad()
def load_(net: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy weights into the net's parameters of these names."""
    for name, weight in weights.items():
        net.get_parameter(name).copy_(weight)
