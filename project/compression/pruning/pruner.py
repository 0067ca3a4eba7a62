"""Pruning: masks that keep the weights, or the whole units, that matter.

LeCun, Denker & Solla 1989 (Optimal Brain Damage); Han et al. 2015 (arXiv:1506.02626): magnitude, layer by layer, with a
threshold of a quality factor times the layer's standard deviation; Li et al. 2017 (arXiv:1608.08710): filters; Blalock
et al. 2020 (arXiv:2003.03033): global against layerwise. Scores come from :mod:`project.compression.pruning.saliency`.

A mask is a 0/1 tensor for a parameter that multiplies it (broadcast over a unit's weights); the net's own parameters
stay where they are and keep their names. Pruning only ever takes away: each call starts from the masks before it.
"""

import re
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from project.compression.pruning.dead_ends import without_dead_ends
from project.compression.pruning.masks import Group, Masks, sparsity
from project.compression.pruning.saliency import Criterion, saliency_of_units, saliency_of_weights
from project.compression.pruning.unit_budget import Macs, least_units, take_cheapest
from project.compression.thinning.dependency_graph import UnitGroup, trace
from project.compression.thinning.thin import look_at_units

Scope = Literal["global", "layer", "deviation"]
Budget = Literal["count", "effective", "macs"]


class Pruner:
    """Chooses what goes.

    Args:
        structure: ``weights`` one by one, or ``units``: output neurons and channels with their bias and their norm's
            scale and shift, so that they can be removed for good (:mod:`project.compression.thinning.thin`).
        criterion: ``magnitude``, ``obd``, ``gradient`` or ``random``; see :mod:`project.compression.pruning.saliency`.
        scope: ``global`` ranks all layers together, ``layer`` takes the same share of each; ``deviation`` (Han) takes
            all weights below (the schedule's number) times the standard deviation of what the layer has left.
            Scores of units are divided by their layer's mean first when ``magnitude`` ranks them globally: norms of
            filters differ between layers for no reason that matters.
        include: regular expressions, searched for in the names of layers; what none of them finds is left alone.
        exclude: likewise, what is left alone; null is the default: the head (the last layer), and of units also the
            stem (the first layer). Biases and norms are never pruned on their own.
        rates: regular expression -> factor on the share that goes, for ``layer`` and ``deviation`` (Frankle & Carbin
            2019 prune the output layer at half the rate: ``{fc3: 0.5}``).
        keep: share of each layer, in [0, 1), that ``global`` never takes: no layer dies while others are wide.
        budget: what the schedule's shares count. ``count``: weights or units. ``effective``: weights that lead
            somewhere; those whose unit no weight reads go too, with its bias and norm, and the next round takes so
            much less (:mod:`project.compression.pruning.dead_ends`). ``macs``, of units with ``global``:
            multiply-accumulates of the whole net; what is worth least for each of them goes
            (:mod:`project.compression.pruning.unit_budget`).
        round_to: a layer of more units than this that loses any keeps a multiple of it, and every layer keeps some:
            dense kernels work on 8 or 16 channels at a time. Null is 8 for units with ``global``, else 1.
        num_images: training images that gradients are taken of (``obd``, ``gradient``).

    Raises:
        ValueError: for a number out of its range, or a combination that makes no sense.
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
            raise ValueError(f"keep is {keep}, but it is a share of each layer: choose 0 or more, below 1.")
        if rates and scope == "global":
            raise ValueError("rates are given, but scope is global, which ranks all layers together: set scope: layer.")
        if any(rate < 0 for rate in (rates or {}).values()):
            raise ValueError(f"rates are {rates}, but a factor on the share that goes is 0 or more.")
        if scope == "deviation" and (structure, criterion) != ("weights", "magnitude"):
            raise ValueError(
                "scope is deviation, which compares magnitudes of weights: set structure and criterion so."
            )
        if num_images < 1:
            raise ValueError(f"num_images is {num_images}: choose 1 or more.")
        if budget == "macs" and (structure, scope) != ("units", "global"):
            raise ValueError(
                f"budget is macs, but structure is {structure} and scope {scope}: zeros among weights save no "
                "multiplication, and only a global ranking knows what is left; set structure: units, scope: global."
            )
        if budget == "effective" and (structure != "weights" or scope == "deviation"):
            raise ValueError(
                f"budget is effective, but structure is {structure} and scope {scope}: a unit goes with all its "
                "weights, and deviation counts no share; set structure: weights, scope: global or layer."
            )
        rounds = (structure, scope) == ("units", "global")
        if round_to is not None and (round_to < 1 or (round_to > 1 and not rounds)):
            raise ValueError(
                f"round_to is {round_to}: it is 1 or more, and above 1 for structure: units, scope: global alone."
            )
        self.budget, self.round_to = budget, round_to or (8 if rounds else 1)
        self.structure, self.criterion, self.scope = structure, criterion, scope
        self.include, self.exclude, self.rates = include or [".*"], exclude, rates or {}
        self.keep, self.num_images = keep, num_images

    @property
    def needs_images(self) -> bool:
        return self.criterion in ("obd", "gradient")

    @property
    def overshoots(self) -> bool:
        """Whether a round can take more than it was asked for."""
        return (self.structure, self.scope) == ("units", "global") or self.budget == "effective"

    @property
    def counted(self) -> str:
        """What the schedule's shares count."""
        return "multiply-accumulates" if self.budget == "macs" else self.structure

    def groups(self, net: nn.Module, image_shape: tuple[int, int, int]) -> list[Group]:
        """The layers that are pruned, in the order of the net.

        Args:
            net: images ``[N, *image_shape]`` -> logits.
            image_shape: (C, H, W); units are traced with such an image.

        Raises:
            ValueError: when an expression finds no layer, when nothing is left to prune, or a layer was included by
                name whose units can not be removed.
        """
        layers = [name for name, module in net.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
        for argument, patterns in (("include", self.include), ("exclude", self.exclude or []), ("rates", self.rates)):
            for pattern in patterns:
                if not any(re.search(pattern, name) for name in layers):
                    raise ValueError(f"{argument} has {pattern!r}, which finds no layer: the net has {_some(layers)}.")
        excluded = [f"^{re.escape(name)}$" for name in layers[-1:]] if self.exclude is None else self.exclude
        if self.exclude is None and self.structure == "units":
            excluded = [*excluded, f"^{re.escape(layers[0])}$"]
        chosen = [
            name
            for name in layers
            if any(re.search(pattern, name) for pattern in self.include)
            and not any(re.search(pattern, name) for pattern in excluded)
        ]
        if self.structure == "weights":
            known = trace(net, image_shape)[0] if self.budget == "effective" else {}
            groups = [_group_of_weights(net, name, known.get(name)) for name in chosen]
        else:
            units, reasons = look_at_units(net, image_shape)
            refused = next((name for name in chosen if name not in units), None)
            if refused is not None:
                raise ValueError(f"units of {refused} can not be removed: {reasons.get(refused, 'it is not traced')}")
            groups = []
            for name in chosen:
                if not any(name in group.coupled for group in groups):
                    weight = f"{name}.weight"
                    others = tuple(parameter for parameter in units[name].parameters if parameter != weight)
                    groups.append(Group(name, (weight, *others), units[name].coupled, units[name].readers))
        if not groups:
            raise ValueError("no layer is left to prune: include more layers, or exclude fewer.")
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
    ) -> Masks:
        """New masks, with ``amount`` of what is left gone.

        Args:
            net: its weights are scored; not changed.
            groups: from :meth:`groups`.
            masks: those before; empty at first.
            amount: share of what is left that goes, in [0, 1); for ``deviation`` the quality factor, ≥ 0.
            images, labels: ``[N, C, H, W]`` as the net takes them and ``[N]``, where the criterion needs gradients.
            seed: of the random criterion and of OBD's labels.
            image_shape: (C, H, W), for the budget ``macs``.

        Raises:
            ValueError: when a layer (or with it an Inception's branch) would lose all it has; nothing has changed then.
        """
        left = {group.layer: _left(net, group, masks, self.structure) for group in groups}
        scores = self._scores(net, groups, images, labels, seed)
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
            macs = self._macs(net, groups, image_shape)
            kept = take_cheapest(scores, left, amount, keep=self.keep, round_to=self.round_to, macs=macs)
        else:
            kept = self._prune_global(scores, left, amount)
        masks = {
            name: _shaped(kept[group.layer], net.get_parameter(name))
            for group in groups
            for name in (group.parameters if self.structure == "units" else group.parameters[:1])
        }
        if self.budget == "effective":
            masks = without_dead_ends(net, groups, masks)
        for group in groups:
            if not masks[group.parameters[0]].any():
                raise ValueError(
                    f"pruning would take all {self.structure} of {group.layer}, and nothing could pass through it: "
                    "prune less, exclude it, set keep, or set scope: layer."
                )
        return masks

    def share_gone(
        self, net: nn.Module, groups: list[Group], masks: Masks, image_shape: tuple[int, int, int] | None = None
    ) -> float:
        """The share of what is :attr:`counted` that the masks take."""
        if self.structure == "weights":
            return sparsity(masks, net)
        kept = {group.layer: int(_left(net, group, masks, self.structure).sum()) for group in groups}
        return self._share_without(net, groups, kept, image_shape)

    def most(self, net: nn.Module, groups: list[Group], image_shape: tuple[int, int, int] | None = None) -> float:
        """The largest share that ``global`` can take, whatever the scores; see :meth:`share_gone`."""
        if self.structure == "weights":
            sizes = [net.get_parameter(group.parameters[0]).numel() for group in groups]
            return 1 - sum(round(self.keep * size) for size in sizes) / sum(sizes)
        widths = {group.layer: len(net.get_parameter(group.parameters[0])) for group in groups}
        least = {layer: min(least_units(width, self.keep, self.round_to), width) for layer, width in widths.items()}
        return self._share_without(net, groups, least, image_shape)

    def _share_without(
        self,
        net: nn.Module,
        groups: list[Group],
        kept: Mapping[str, int],
        image_shape: tuple[int, int, int] | None,
    ) -> float:
        whole = {group.layer: len(net.get_parameter(group.parameters[0])) for group in groups}
        macs = self._macs(net, groups, image_shape)
        return 1 - (sum(kept.values()) / sum(whole.values()) if macs is None else macs(kept) / macs(whole))

    def _macs(self, net: nn.Module, groups: list[Group], image_shape: tuple[int, int, int] | None) -> Macs | None:
        """What counts the cost, of the budget ``macs``."""
        if self.budget == "count":
            return None
        assert image_shape is not None, "multiply-accumulates depend on the image's size"
        return Macs(net, image_shape, {g.layer: ((g.layer, *g.coupled), g.readers) for g in groups})

    def _scores(
        self, net: nn.Module, groups: list[Group], images: Tensor | None, labels: Tensor | None, seed: int
    ) -> dict[str, Tensor]:
        if self.structure == "weights":
            names = [group.parameters[0] for group in groups]
            scores = saliency_of_weights(net, names, self.criterion, images, labels, seed)
            return {group.layer: scores[group.parameters[0]] for group in groups}
        units = {group.layer: group.parameters for group in groups}
        scores = saliency_of_units(net, units, self.criterion, images, labels, seed)
        if self.criterion == "magnitude" and self.scope == "global":
            return {layer: score / score.mean().clamp(min=1e-12) for layer, score in scores.items()}
        return scores

    def _prune_global(self, scores: Mapping[str, Tensor], left: Mapping[str, Tensor], amount: float) -> Masks:
        """The least of all layers together, but for the best ``keep`` of each."""
        protected = {}
        for layer, score in scores.items():
            num_kept = round(self.keep * score.numel())
            gone = 1 - num_kept / max(int(left[layer].sum()), 1)
            best = _without_least(score, left[layer], min(max(gone, 0.0), 1.0)) if num_kept else None
            protected[layer] = score if best is None else score.masked_fill(best, torch.inf)
        flat = torch.cat([score.flatten() for score in protected.values()])
        flat_left = torch.cat([mask.flatten() for mask in left.values()])
        if round(amount * int(flat_left.sum())) > int((flat_left & ~flat.isinf()).sum()):
            raise ValueError(
                f"keep is {self.keep} of each layer, but {100 * amount:g} % of what is left are to go, more than all "
                "the rest: prune less, or keep less."
            )
        mask = _without_least(flat, flat_left, amount)
        pieces = mask.split([score.numel() for score in scores.values()])
        return {layer: piece.view(scores[layer].shape) for layer, piece in zip(scores, pieces, strict=True)}

    def _rate(self, layer: str) -> float:
        return next((rate for pattern, rate in self.rates.items() if re.search(pattern, layer)), 1.0)


def _group_of_weights(net: nn.Module, layer: str, units: UnitGroup | None) -> Group:
    """One layer's weights; where its units' readers are known, the biases and norms that go with a dead end."""
    others = [
        f"{module}.{key}"
        for module in (units.outputs if units else ())
        for key, parameter in net.get_submodule(module).named_parameters(recurse=False)
        if parameter.dim() == 1
    ]
    return Group(layer, (f"{layer}.weight", *others), units=units)


def _left(net: nn.Module, group: Group, masks: Mapping[str, Tensor], structure: str) -> Tensor:
    """What earlier rounds have left: ``[out, …]`` of a weight, ``[num_units]`` of units."""
    name = group.parameters[0]
    weight = net.get_parameter(name)
    if name not in masks:
        return torch.ones_like(weight if structure == "weights" else weight.flatten(1)[:, 0], dtype=torch.bool)
    mask = masks[name] != 0
    return mask if structure == "weights" else mask.flatten(1)[:, 0]


def _without_least(scores: Tensor, left: Tensor, amount: float) -> Tensor:
    """``left`` less its ``round(amount * count)`` entries of least score; of equal ones the first go."""
    num_gone = round(amount * int(left.sum()))
    order = scores.flatten().masked_fill(~left.flatten(), torch.inf).sort(stable=True).indices
    mask = left.flatten().clone()
    mask[order[:num_gone]] = False
    return mask.view(left.shape)


def _deviation(net: nn.Module, layer: str, left: Tensor) -> Tensor:
    return net.get_parameter(f"{layer}.weight").detach()[left].std()


def _shaped(mask: Tensor, parameter: Tensor) -> Tensor:
    """The mask in the parameter's type and number of dimensions, in its memory format where it is as large."""
    if mask.shape == parameter.shape:
        return torch.empty_like(parameter).copy_(mask)
    return mask.to(parameter.dtype).view(-1, *[1] * (parameter.dim() - 1))


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
