"""Pruning: masks that keep the most important weights, or whole units, of a net.

- LeCun, Denker & Solla 1989 (Optimal Brain Damage): the saliency of a weight.
- Han et al. 2015 (arXiv:1506.02626): magnitude, layer by layer, with a threshold of a quality factor times the layer's
  standard deviation.
- Li et al. 2017 (arXiv:1608.08710): whole filters.
- Blalock et al. 2020 (arXiv:2003.03033): ranking all layers together or layer by layer.

Scores come from :mod:`project.compression.pruning.saliency`. A mask is a tensor of 0 and 1 that multiplies a parameter.
The net's own parameters stay in place and keep their names. A pruned weight never comes back: each call starts from the
masks of the call before.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from project.compression.pruning.choice import choose_layers, groups_of_units, groups_of_weights
from project.compression.pruning.dead_ends import without_dead_ends
from project.compression.pruning.last_weights import keep_last_weights_, last_weights
from project.compression.pruning.masks import Group, Masks, sparsity, unit_masks, units_left
from project.compression.pruning.saliency import (
    FOR_UNITS,
    OF_IMAGES,
    OF_ONE_LAYER,
    Criterion,
    saliency_of_units,
    saliency_of_weights,
)
from project.compression.pruning.unit_budget import Macs, least_units, take_cheapest

Scope = Literal["global", "layer", "deviation"]
Budget = Literal["count", "effective", "macs"]


@dataclass(frozen=True)
class Whole:
    """The size of a net before a pruning.

    Args:
        counted: the quantity that the schedule's shares are shares of; see :attr:`Pruner.counted`.
        weights: number of the net's weights without biases and norms.
        units: number of units by the name of their group; empty for single weights.
    """

    counted: float
    weights: int
    units: dict[str, int]


class Pruner:
    """Chooses which weights or units are pruned.

    Example::

        trainer:
          callbacks+:
            - class_path: project.callbacks.IterativeMagnitudePruning
              init_args:
                pruner:
                  class_path: project.compression.Pruner
                  init_args: {structure: units, criterion: obd, budget: macs, keep: 0.1}

    Args:
        structure: the things that are pruned. ``weights`` are single weights; each layer keeps its best one whatever
            the amount (:mod:`project.compression.pruning.last_weights`). ``units`` are output channels and output
            neurons, each with its bias and with the scale and shift of its norm, so that they can be removed for good
            (:mod:`project.compression.thinning.thin`).
        criterion: the score of a weight or unit. ``magnitude``, ``lamp``, ``obd``, ``taylor``, ``gradient`` and
            ``random`` score both; ``l2``, ``geometric_median``, ``norm_scale`` and ``gradient_sum`` score units alone
            (:mod:`project.compression.pruning.saliency` has the formulas).
        scope: the set in which scores are compared. ``global`` ranks all layers together. ``layer`` prunes the same
            share of each layer. ``deviation`` (Han) prunes all weights below a threshold: the schedule's factor times
            the standard deviation of the weights that the layer has left. If ``magnitude``, ``l2`` or
            ``geometric_median`` ranks units globally, the scores of a layer are divided by their mean first, because
            the norms of filters differ between layers for reasons other than importance.
        include: regular expressions; a layer is pruned only if one of them is found in its name. Null includes all.
        exclude: regular expressions; a layer is not pruned if one of them is found in its name. Null excludes the head
            (the last layer). Layers whose units cannot be removed keep them, and a log line names them; it is an error
            only if ``include`` names such a layer. Biases and norms are never pruned on their own.
        rates: factors, 0 or more, on the share that is pruned of the layers whose names match a regular expression, for
            the scopes ``layer`` and ``deviation``. The first match counts. Frankle & Carbin 2019 prune the output layer
            at half the rate: ``{fc3: 0.5}``.
        keep: share of each layer, in [0, 1), that ``global`` never prunes, so that no layer loses (nearly) all while
            others are wide.
        budget: the quantity that the schedule's shares are shares of. ``count``: the number of weights or units.
            ``effective``: the number of weights, where weights whose unit is read by no remaining weight are pruned as
            well, with their biases and norms, and count as pruned (:mod:`project.compression.pruning.dead_ends`).
            ``macs``: the multiply-accumulates of the whole net, for units with ``global``; the units that are worth
            least for each saved multiply-accumulate are pruned (:mod:`project.compression.pruning.unit_budget`).
        round_to: divisor of the layers' widths after a pruning, 1 or more, because dense kernels work on 8 or 16
            channels at a time. A layer with more units than ``round_to`` that loses any keeps a multiple of it. Null is
            8 for units with ``global``, and 1 otherwise.
        num_images: number of training images, 1 or more, that ``obd``, ``taylor``, ``gradient`` and ``gradient_sum``
            take gradients of.

    Raises:
        ValueError: if a number is outside its range, or if two arguments contradict each other.
    """

    def __init__(
        self,
        structure: Literal["weights", "units"] = "weights",
        criterion: Criterion = "magnitude",
        scope: Scope = "global",
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        rates: dict[str, float] | None = None,
        keep: float = 0.0,
        num_images: int = 512,
        budget: Budget = "count",
        round_to: int | None = None,
    ) -> None:
        if not 0 <= keep < 1:
            raise ValueError(f"keep is {keep}, but it is a share of each layer: choose a number from 0 to below 1.")
        if rates and scope == "global":
            raise ValueError(
                f"rates are {rates}, but scope is global, which ranks all layers together: set scope: layer, or leave "
                "rates out."
            )
        if any(rate < 0 for rate in (rates or {}).values()):
            raise ValueError(f"rates are {rates}, but they multiply the share that is pruned: choose 0 or more.")
        if scope == "deviation" and (structure, criterion) != ("weights", "magnitude"):
            raise ValueError(
                f"scope is deviation, but structure is {structure} and criterion is {criterion}: set structure: "
                "weights and criterion: magnitude."
            )
        if structure == "weights" and criterion in FOR_UNITS:
            raise ValueError(
                f"criterion is {criterion}, but structure is weights: it scores whole units; set structure: units, or "
                "choose the criterion magnitude, lamp, obd, taylor or gradient."
            )
        if num_images < 1:
            raise ValueError(f"num_images is {num_images}, but gradients need at least one image: choose 1 or more.")
        if budget == "macs" and (structure, scope) != ("units", "global"):
            raise ValueError(
                f"budget is macs, but structure is {structure} and scope is {scope}: only removed units save "
                "multiplications, and only a global ranking counts those of the net; set structure: units and "
                "scope: global."
            )
        if budget == "effective" and (structure != "weights" or scope == "deviation"):
            raise ValueError(
                f"budget is effective, but structure is {structure} and scope is {scope}: it counts single weights and "
                "prunes a share of them; set structure: weights and scope: global or layer."
            )
        rounds = (structure, scope) == ("units", "global")
        if round_to is not None and (round_to < 1 or (round_to > 1 and not rounds)):
            raise ValueError(
                f"round_to is {round_to}, but structure is {structure} and scope is {scope}: choose 1 or more with "
                "structure: units and scope: global, and 1 otherwise."
            )
        self.budget, self.round_to = budget, round_to or (8 if rounds else 1)
        self.structure, self.criterion, self.scope = structure, criterion, scope
        self.include, self.exclude, self.rates = include, exclude, rates or {}
        self.keep, self.num_images = keep, num_images

    @property
    def needs_images(self) -> bool:
        """Whether the criterion takes gradients of images."""
        return self.criterion in OF_IMAGES

    @property
    def overshoots(self) -> bool:
        """Whether a round can prune more than the amount asked for."""
        return (self.structure, self.scope) == ("units", "global") or self.budget == "effective"

    @property
    def counted(self) -> str:
        """The name of the quantity that the schedule's shares are shares of."""
        return "multiply-accumulates" if self.budget == "macs" else self.structure

    def groups(self, net: nn.Module, image_shape: tuple[int, int, int]) -> list[Group]:
        """The layers that are pruned, in the order of the net.

        Layers that share their units, as a residual connection makes them, are one group.

        Args:
            net: a net that maps images ``[N, *image_shape]`` to logits.
            image_shape: shape (C, H, W) of an image, with which the units are traced.

        Raises:
            ValueError: if a regular expression matches no layer, if no layer is left to prune, or if ``include`` names
                a layer whose units cannot be removed.
        """
        patterns = {"include": self.include, "exclude": self.exclude, "rates": list(self.rates)}
        chosen, excluded = choose_layers(net, patterns, units=self.structure == "units")
        if self.structure == "units":
            groups = groups_of_units(net, chosen, excluded, image_shape, named=self.include is not None)
        else:
            groups = groups_of_weights(net, chosen, excluded, image_shape, dead_ends=self.budget == "effective")
        if not groups:
            raise ValueError(
                f"no layer is left to prune with include {self.include or ['.*']} and exclude {excluded}: include more "
                "layers, or exclude fewer."
            )
        return groups

    def prune(
        self,
        net: nn.Module,
        groups: list[Group],
        masks: Masks,
        amount: float,
        *,
        images: Tensor | None = None,
        labels: Tensor | None = None,
        seed: int = 0,
        image_shape: tuple[int, int, int] | None = None,
        widths: Mapping[str, int] | None = None,
    ) -> Masks:
        """New masks that prune ``amount`` of what the old masks leave.

        Args:
            net: the net whose weights are scored; it is not changed.
            groups: the groups that :meth:`groups` returned for this net.
            masks: the masks of the pruning before; an empty dict at first.
            amount: share of what is left that is pruned, in [0, 1); for ``deviation`` the quality factor, 0 or more.
            images: normalised training images ``[N, C, H, W]``, if the criterion needs gradients.
            labels: class numbers ``[N]`` of the images, if the criterion needs gradients.
            seed: seed of the criterion ``random`` and of the labels that ``obd`` draws; any int.
            image_shape: shape (C, H, W) of an image, if the budget is ``macs``.
            widths: number of units of each group before the first pruning, of which ``keep`` is a share, if units have
                left the net since.

        Raises:
            ValueError: if a layer would lose all its units, so that nothing could pass through it, or if ``keep``
                protects more than ``amount`` leaves. Nothing has changed then.
        """
        # `left` and `kept` hold a boolean mask for each group: of the weight's shape, or `[num_units]`.
        left = {group.layer: _left(net, group, masks, self.structure) for group in groups}
        scores = self._scores(net, groups, images, labels, seed)
        last = last_weights(groups, scores, left) if self.structure == "weights" else {}  # rank them above all others
        scores |= {layer: scores[layer].masked_fill(best, torch.inf) for layer, best in last.items()}
        if self.scope == "deviation":
            kept = {
                layer: left[layer] & (scores[layer] >= amount * self._rate(layer) * _deviation(net, layer, left[layer]))
                for layer in left
            }
        elif self.scope == "layer":
            kept = {
                layer: _without_least(scores[layer], left[layer], min(amount * self._rate(layer), 1.0))
                for layer in left
            }
        elif self.structure == "units":
            cost = self._macs(net, groups, image_shape)
            round_to = self._round_to(groups)
            must = _fewest(groups)
            kept = take_cheapest(
                scores, left, amount, keep=self.keep, round_to=round_to, cost=cost, widths=widths, fewest=must
            )
        else:
            kept = self._prune_global(scores, left, amount)
        if self.structure == "units":
            for layer, fewest in _fewest(groups).items():
                if 0 < kept[layer].sum() < fewest <= left[layer].sum():
                    kept[layer][scores[layer].masked_fill(~left[layer], -torch.inf).topk(fewest).indices] = True
            for group in groups:
                if not kept[group.layer].any():
                    other = "set keep, or set scope: layer" if self.scope == "global" else "or give it a lower rate"
                    raise ValueError(
                        f"the amount {amount:g} would take all units of {group.layer}, so that nothing could pass "
                        f"through this layer: prune less, exclude the layer, {other}."
                    )
            return unit_masks(net, groups, kept)
        kept |= {layer: kept[layer] | best for layer, best in last.items()}
        masks = {
            group.parameters[0]: _shaped(kept[group.layer], net.get_parameter(group.parameters[0])) for group in groups
        }
        if self.budget == "effective":
            masks = without_dead_ends(net, groups, masks)
        keep_last_weights_(masks, last, left, "choose a larger keep" if self.scope == "global" else "prune less")
        return masks

    def share_gone(
        self, net: nn.Module, groups: list[Group], masks: Masks, image_shape: tuple[int, int, int] | None = None
    ) -> float:
        """The share of the :attr:`counted` quantity that the masks remove, in [0, 1].

        Args:
            net: the net that the masks are for.
            groups: the groups that :meth:`groups` returned for this net.
            masks: the mask of each pruned parameter; an empty dict before the first pruning.
            image_shape: shape (C, H, W) of an image, if the budget is ``macs``.
        """
        if self.structure == "weights":
            return sparsity(masks, net)
        kept = {group.layer: int(_left(net, group, masks, self.structure).sum()) for group in groups}
        return self._share_without(net, groups, kept, image_shape)

    def size_of(self, net: nn.Module, groups: list[Group], image_shape: tuple[int, int, int]) -> Whole:
        """The present size of a net.

        Args:
            net: the net that is pruned.
            groups: the groups that :meth:`groups` returned for this net.
            image_shape: shape (C, H, W) of an image.
        """
        units = {g.layer: g.units.num for g in groups if g.units is not None and self.structure == "units"}
        macs = self._macs(net, groups, image_shape) if self.budget == "macs" else None
        return Whole(sum(units.values()) if macs is None else macs.total, num_weights(net), units)

    def most(self, net: nn.Module, groups: list[Group], image_shape: tuple[int, int, int] | None = None) -> float:
        """The largest share that the scope ``global`` can prune, whatever the scores are. See :meth:`share_gone`.

        Args:
            net: the net that is to be pruned.
            groups: the groups that :meth:`groups` returned for this net.
            image_shape: shape (C, H, W) of an image, if the budget is ``macs``.
        """
        if self.structure == "weights":
            sizes = [net.get_parameter(group.parameters[0]).numel() for group in groups]
            return 1 - sum(max(round(self.keep * size), 1) for size in sizes) / sum(sizes)
        widths = {group.layer: group.units.num for group in groups if group.units is not None}
        round_to = self._round_to(groups)
        fewest = _fewest(groups)
        least = {
            layer: min(least_units(width, self.keep, round_to[layer], fewest[layer]), width)
            for layer, width in widths.items()
        }
        return self._share_without(net, groups, least, image_shape)

    def _share_without(
        self,
        net: nn.Module,
        groups: list[Group],
        kept: Mapping[str, int],
        image_shape: tuple[int, int, int] | None,
    ) -> float:
        """The share that is gone if each group keeps this number of units."""
        whole = {group.layer: group.units.num for group in groups if group.units is not None}
        macs = self._macs(net, groups, image_shape)
        return 1 - (sum(kept.values()) / sum(whole.values()) if macs is None else macs(kept) / macs(whole))

    def _macs(self, net: nn.Module, groups: list[Group], image_shape: tuple[int, int, int] | None) -> Macs | None:
        """A counter of the net's multiply-accumulates if the budget is ``macs``; otherwise ``None``, to count units."""
        if self.budget == "count":
            return None
        assert image_shape is not None, "multiply-accumulates depend on the image's size"
        return Macs(net, image_shape, {g.layer: g.units for g in groups if g.units is not None})

    def _round_to(self, groups: list[Group]) -> dict[str, int]:
        """For each group the divisor of its number of units: a unit of several channels counts as so many."""
        sizes = {g.layer: next(iter(g.units.slices.values())).shape[1] for g in groups if g.units is not None}
        return {layer: max(self.round_to // size, 1) for layer, size in sizes.items()}

    def _scores(
        self, net: nn.Module, groups: list[Group], images: Tensor | None, labels: Tensor | None, seed: int
    ) -> dict[str, Tensor]:
        """The saliency of each group's weights, in the weight's shape, or of its units, ``[num_units]``."""
        if self.structure == "weights":
            names = [group.parameters[0] for group in groups]
            scores = saliency_of_weights(net, names, self.criterion, images, labels, seed)
            return {group.layer: scores[group.parameters[0]] for group in groups}
        units = {group.layer: group.units for group in groups if group.units is not None}
        scores = saliency_of_units(net, units, self.criterion, images, labels, seed)
        if self.criterion in OF_ONE_LAYER and self.scope == "global":
            return {layer: score / score.mean().clamp(min=1e-12) for layer, score in scores.items()}
        return scores

    def _prune_global(self, scores: Mapping[str, Tensor], left: Mapping[str, Tensor], amount: float) -> Masks:
        """Prune the weights of least score over all layers. The best ``keep`` of each layer are protected."""
        # A protected weight gets the score infinity, so that it is last in the ranking.
        protected = {}
        for layer, score in scores.items():
            num_kept = round(self.keep * score.numel())  # a share of the whole layer, not of what is left of it
            gone = 1 - num_kept / max(int(left[layer].sum()), 1)
            best = _without_least(score, left[layer], min(max(gone, 0.0), 1.0)) if num_kept else None
            protected[layer] = score if best is None else score.masked_fill(best, torch.inf)
        flat = torch.cat([score.flatten() for score in protected.values()])
        flat_left = torch.cat([mask.flatten() for mask in left.values()])
        num_left, num_free = int(flat_left.sum()), int((flat_left & ~flat.isinf()).sum())
        # The rounds before have rounded their counts, so that a few weights may be missing in the last round.
        if round(amount * num_left) > num_free + len(scores):
            raise ValueError(
                f"keep is {self.keep} of each layer, and one weight at least, but {100 * amount:g} % of the weights "
                "that are left are to be pruned, which is more than all others: prune less, or choose a smaller keep."
            )
        mask = _without_least(flat, flat_left, min(amount, num_free / max(num_left, 1)))
        # back from one long vector to a mask for each layer
        pieces = mask.split([score.numel() for score in scores.values()])
        return {layer: piece.view(scores[layer].shape) for layer, piece in zip(scores, pieces, strict=True)}

    def _rate(self, layer: str) -> float:
        """The factor of the first expression in ``rates`` that matches the layer; 1 without a match."""
        return next((rate for pattern, rate in self.rates.items() if re.search(pattern, layer)), 1.0)


def num_weights(net: nn.Module) -> int:
    """Number of a net's weights, without biases and the parameters of norms.

    Args:
        net: net whose weights are counted.
    """
    return sum(parameter.numel() for parameter in net.parameters() if parameter.dim() > 1)


def _left(net: nn.Module, group: Group, masks: Mapping[str, Tensor], structure: str) -> Tensor:
    """What earlier rounds have left of a group, as bools: the weight's shape for weights, ``[num_units]`` for units."""
    name = group.parameters[0]
    weight = net.get_parameter(name)
    if structure == "units":
        return units_left(group, masks).to(weight.device)
    return torch.ones_like(weight, dtype=torch.bool) if name not in masks else masks[name] != 0


def _fewest(groups: list[Group]) -> dict[str, int]:
    """The number of units that each group must keep."""
    return {group.layer: group.units.fewest for group in groups if group.units is not None}


def _without_least(scores: Tensor, left: Tensor, amount: float) -> Tensor:
    """``left`` without its ``round(amount * count)`` entries of least score. Of equal scores the first are removed.

    An amount below 1 leaves one entry, so that rounding never takes the last one.
    """
    count = int(left.sum())
    num_gone = min(round(amount * count), count if amount == 1 else max(count - 1, 0))
    order = scores.flatten().masked_fill(~left.flatten(), torch.inf).sort(stable=True).indices
    mask = left.flatten().clone()
    mask[order[:num_gone]] = False
    return mask.view(left.shape)


def _deviation(net: nn.Module, layer: str, left: Tensor) -> Tensor:
    """The standard deviation of the layer's weights that are left."""
    weights = net.get_parameter(f"{layer}.weight").detach()[left]
    return weights.std() if len(weights) > 1 else weights.new_zeros(())


def _shaped(mask: Tensor, parameter: Tensor) -> Tensor:
    """The mask with the parameter's type and memory format."""
    return torch.empty_like(parameter).copy_(mask)
