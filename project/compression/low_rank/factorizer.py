"""Low-rank layers: replace a layer by two or three thin layers, with the ranks that keep most of it.

The factors and their papers are in :mod:`project.compression.low_rank.factors`. The ranks are chosen by energy (Denton
et al. 2014, arXiv:1404.0736), by variational Bayes (Kim et al. 2016, arXiv:1511.06530, sec. 3.2;
:mod:`project.compression.low_rank.vbmf`), or for all layers together by a budget of multiply-accumulates
(:mod:`project.compression.low_rank.rank_budget`). The surgery is
:class:`project.compression.low_rank.thin_layers.Factorize`.
"""

import logging
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
from project.compression.plain_layers import copy_of, name_layers, other_layers, read_by_torch
from project.metrics.complexity import complexity_by_layer, count_macs
from project.models.known import KINDS

log = logging.getLogger(__name__)

Moments = Mapping[tuple[str, Kind], Tensor]
"""Second moments of responses, by the name of the layer and the kind of factors."""


class Factorizer:
    """Chooses the layers that are replaced by thin layers, and the kind and the ranks of their factors.

    A layer is replaced only if its factors need fewer multiply-accumulates than the layer.

    Example::

        trainer:
          callbacks+:
            - class_path: project.callbacks.LowRank
              init_args:
                begin_epoch: 20
                factorizer:
                  class_path: project.compression.Factorizer
                  init_args: {macs_left: 0.4, round_to: 8}

    Args:
        kinds: the kinds of factors to choose from for each layer, of ``svd``, ``spatial`` and ``tucker``
            (:mod:`project.compression.low_rank.factors`); null is ``[svd, spatial]``.
        ranks: the rule that chooses ranks. ``macs``: the ranks of least loss over all layers within ``macs_left``.
            ``energy``: the lowest ranks that keep ``energy``. ``vbmf``: the number of components above the noise. With
            ``energy`` and ``vbmf`` a layer gets the kind with the fewest multiply-accumulates.
        macs_left: share of the whole net's multiply-accumulates that may be left, in (0, 1), for ``ranks: macs``.
        energy: share of the sum of squares that is kept, in (0, 1], for ``ranks: energy``. The squares are those of the
            layer's responses if ``num_images`` is above 0 and the kind is ``svd`` or ``spatial``, and otherwise those
            of its weight.
        round_to: divisor of the ranks, 1 or more. A rank is rounded up to a multiple, at most to the largest possible
            rank. Dense kernels work on 8 or 16 channels at a time, and on a processor with 512-bit vectors a rank of 24
            takes as long as a rank of 32.
        num_images: number of training images on which the layers' responses are measured, 0 or more. Above 0, ``svd``
            and ``spatial`` keep the responses instead of the weights, and ``ranks: macs`` measures the loss of a layer
            in the logits. At 0 only the weights are used.
        include: regular expressions; a layer is factorised only if one of them is found in its name. Null includes all.
        exclude: regular expressions; a layer is not factorised if one of them is found in its name. Null excludes the
            stem (the first layer) and the head (the last layer).

    Raises:
        ValueError: if a number is outside its range, if ``kinds`` is empty, or if a word is unknown.
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
            raise ValueError(
                f"macs_left is {macs_left}, but it is a share of the net's multiply-accumulates: choose a number above "
                "0 and below 1."
            )
        if not 0 < energy <= 1:
            raise ValueError(
                f"energy is {energy}, but it is the share of the squares that is kept: choose a number above 0, at "
                "most 1."
            )
        if round_to < 1 or num_images < 0:
            raise ValueError(
                f"round_to is {round_to} and num_images is {num_images}: choose a round_to of 1 or more, and a "
                "num_images of 0 or more."
            )
        self.ranks, self.macs_left, self.energy = ranks, macs_left, energy
        self.round_to, self.num_images = round_to, num_images
        self.include, self.exclude = include or [".*"], exclude

    def plan(
        self, net: nn.Module, image_shape: tuple[int, int, int], images: Tensor | None = None
    ) -> tuple[Factorize, dict[str, Tensor]]:
        """Plan the factorisation of a net.

        Args:
            net: a net that maps images ``[N, C, H, W]`` to logits; it is not changed.
            image_shape: shape (C, H, W) of an image.
            images: normalised training images ``[N, C, H, W]``; used only if ``num_images`` is above 0.

        Returns:
            The surgery that replaces the layers, and the weights that the thin layers must get after it, by name.

        Raises:
            ValueError: if a regular expression matches no layer, if no layer becomes cheaper, if the budget cannot be
                met, or if ``num_images`` is above 0 and there are no images.
        """
        if self.num_images and (images is None or not len(images)):
            raise ValueError(
                f"num_images is {self.num_images}, but there are no images: give some, or set num_images to 0."
            )
        net = copy_of(net).cpu().eval()
        images = images.cpu() if self.num_images and images is not None else None
        positions = positions_of(net, image_shape)
        weights = self._checked(net, image_shape, positions)
        # Without images the factors keep most of the weight. With images they keep most of the responses, whose second
        # moments are measured here; `tucker` always keeps the weight.
        moments: Moments = {}
        if images is not None:
            kinds = {name: {"svd", "spatial"}.intersection(self._kinds(weight)) for name, weight in weights.items()}
            moments = second_moments(net, kinds, images)  # type: ignore[arg-type]
        options = {name: self._options(name, weight, positions[name], moments) for name, weight in weights.items()}
        if self.ranks == "macs":
            if images is not None:
                options = _weighted(net, options, moments, images)
            # `macs_left` counts the whole net, but only these layers can change: the rest of the net is paid for first.
            whole = count_macs(net, image_shape)
            rest = whole - sum(choices[0].macs for choices in options.values())
            chosen = choose_within(options, self.macs_left * whole - rest)
        else:
            chosen = {name: min(choices, key=lambda option: option.macs) for name, choices in options.items()}
        thin = {name: option for name, option in chosen.items() if option.kind != "dense"}
        if not thin:
            raise ValueError(
                "no layer multiplies less with the ranks it would get: choose a smaller energy or round_to, or include "
                "more layers."
            )
        return _surgery(net, image_shape, thin, moments)

    def check(self, net: nn.Module, image_shape: tuple[int, int, int]) -> None:
        """Check, without the cost of a plan, that there are layers to factorise and that the budget can be met.

        Args:
            net: a net that maps images ``[N, C, H, W]`` to logits; it is not changed.
            image_shape: shape (C, H, W) of an image.

        Raises:
            ValueError: if a regular expression matches no layer, if no layer is left, or if the budget cannot be met.
        """
        net = copy_of(net)
        self._checked(net, image_shape, positions_of(net, image_shape))

    def _checked(
        self, net: nn.Module, image_shape: tuple[int, int, int], positions: Mapping[str, Positions]
    ) -> dict[str, Tensor]:
        """The weights of the layers that can be factorised. Raises the errors of :meth:`check`."""
        weights = self._weights(net, image_shape)
        if self.ranks == "macs":
            whole, dense, least = count_macs(net, image_shape), 0, 0
            for name, weight in weights.items():
                own = positions[name].macs(weight, None)
                lowest = [(kind, (self.round_to,) * len(largest_ranks(weight, kind))) for kind in self._kinds(weight)]
                known = [pair for pair in lowest if max(pair[1]) <= min(largest_ranks(weight, pair[0]))]
                dense += own
                least += min([own, *(positions[name].macs(weight, kind, ranks) for kind, ranks in known)])
            if whole - dense + least > self.macs_left * whole:
                rows = [row for row in complexity_by_layer(net, image_shape) if row.name not in weights and row.macs]
                largest = max(rows, key=lambda row: row.macs).name if rows else ""
                raise ValueError(
                    f"macs_left is {self.macs_left:g}, but at least {(whole - dense + least) / whole:.3g} of the net's "
                    f"multiply-accumulates stay: {(whole - dense) / whole:.3g} are in {len(rows)} layers that are not "
                    f"factorised{f' (the largest is {largest})' if rows else ''}, and {least / whole:.3g} are in the "
                    "others at their lowest ranks. Raise macs_left, lower round_to, or exclude fewer layers."
                )
        return weights

    def _weights(self, net: nn.Module, image_shape: tuple[int, int, int]) -> dict[str, Tensor]:
        """The weight of each layer that can be factorised and is included, by the layer's name.

        Layers with groups, with a weight that is shared or computed, or of a subclass are left alone. So are the layers
        inside torch's ``TransformerEncoderLayer``, which reads their weights in evaluation.

        Raises:
            ValueError: if a regular expression matches no layer, or if no included layer can be factorised.
        """
        layers = {name: layer for name, layer in net.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
        for argument, patterns in (("include", self.include), ("exclude", self.exclude or [])):
            for pattern in patterns:
                if not any(re.search(pattern, name) for name in layers):
                    raise ValueError(
                        f"{argument} has {pattern!r}, which finds no layer of the net: choose among "
                        f"{', '.join(layers)}."
                    )
        ends = [f"^{re.escape(name)}$" for name in (*list(layers)[:1], *list(layers)[-1:])]
        excluded = ends if self.exclude is None else self.exclude
        chosen = [
            name
            for name, layer in layers.items()
            if any(re.search(pattern, name) for pattern in self.include)
            and not any(re.search(pattern, name) for pattern in excluded)
            and getattr(layer, "groups", 1) == 1
            and name  # the net itself, if it is a single layer, has no parent that could hold another one
        ]
        others = other_layers(net, image_shape) | read_by_torch(net)
        left = {name: others[name] for name in chosen if name in others}
        owners = [id(p) for _, p in net.named_parameters(remove_duplicate=False)]
        weights = {name: layers[name].weight for name in chosen if name not in left and type(layers[name]) in KINDS}
        weights = {name: weight for name, weight in weights.items() if owners.count(id(weight)) == 1}
        if not weights and left:
            raise ValueError(f"no layer can be factorised: {name_layers(left)}. Leave the factorisation out.")
        if not weights:
            raise ValueError(
                f"{type(net).__name__} has no layer that can be factorised: include more layers, or exclude fewer. "
                "Grouped layers and layers that share a weight are left out."
            )
        if left:
            log.warning("these layers are not factorised: %s", name_layers(left))
        return weights

    def _kinds(self, weight: Tensor) -> list[Kind]:
        """The kinds of factors that are possible for a weight and allowed."""
        return [kind for kind in kinds_of(weight) if kind in self.kinds]

    def _options(self, name: str, weight: Tensor, positions: Positions, moments: Moments) -> list[Option]:
        """The options of one layer: first the layer as it is, then the factors that cost less."""
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
        """The ranks to consider for one layer and kind: all multiples of ``round_to``, or those of the chosen rule."""
        most = largest_ranks(weight, kind)
        if self.ranks == "macs":
            return list(product(*(range(self.round_to, rank + 1, self.round_to) for rank in most)))
        if self.ranks == "energy":
            wanted = _lowest(errors, self.energy)
        elif kind == "tucker":  # the unfoldings of the weight along its inputs and outputs, Kim et al., sec. 3.2
            wanted = (vbmf_rank(weight.transpose(0, 1).flatten(1)), vbmf_rank(weight.flatten(1)))
        else:
            wanted = (vbmf_rank(matrix_of(weight, kind)),)
        rounded = tuple(math.ceil(max(rank, 1) / self.round_to) * self.round_to for rank in wanted)
        return [tuple(min(pair) for pair in zip(rounded, most, strict=True))]


def _lowest(errors: Tensor, energy: float) -> Ranks:
    """The lowest ranks that keep the share ``energy``; for ``tucker``, the pair with the least sum."""
    enough = (errors <= 1 - energy + 1e-9).nonzero()
    return tuple(int(rank) for rank in enough[enough.sum(dim=1).argmin()])


@torch.no_grad()
def _weighted(
    net: nn.Module, options: Mapping[str, list[Option]], moments: Moments, images: Tensor
) -> dict[str, list[Option]]:
    """The same options, with errors in units of the logits, so that layers and kinds can be compared.

    The error of an option is a share of the weight's or the responses' squares. Each layer and kind is tried once, with
    its lowest ranks. The squared change of the logits, over their variance, divided by the option's error gives a
    factor. This is approximate: the other ranks of this layer and kind are assumed to have the same factor.
    """
    logits = _run(net, images)
    weighted = {}
    for name, choices in options.items():
        weights: dict[str, float] = {"dense": 0.0}
        for option in choices:  # the first option of a kind has its lowest ranks
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
    """The logits of the images, computed 64 images at a time."""
    return torch.cat([net(chunk) for chunk in images.split(64)])


def _factors(net: nn.Module, chosen: Mapping[str, Option], moments: Moments) -> tuple[Factorize, dict[str, Tensor]]:
    """The surgery for the chosen options, and the weights of its thin layers, by name."""
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
    """The surgery and the weights of the thin layers, after the surgery is tried on ``net``, which it changes.

    Raises:
        ValueError: if the net does not run afterwards, as a net that reads the weight of one of its layers itself.
    """
    surgery, weights = _factors(net, thin, moments)
    before = count_macs(net, image_shape)
    surgery.apply_(net)
    try:
        after = count_macs(net, image_shape)
    except (AttributeError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"with thin layers for {', '.join(thin)} {type(net).__name__} no longer runs ({error}): exclude the layers "
            "whose weights its forward pass reads."
        ) from error
    assert after < before
    return surgery, weights


@torch.no_grad()
def load_(net: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy weights into the net's parameters, in place.

    Args:
        net: the net whose parameters are overwritten.
        weights: the new value of each parameter, by the parameter's name.
    """
    for name, weight in weights.items():
        net.get_parameter(name).copy_(weight)
