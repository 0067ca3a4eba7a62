"""Chooses the layers that use Winograd's algorithm, and their tile sizes.

A layer is chosen if it is exact enough and faster. Both are measured on this machine, with the shapes that the layer
has in the net.

The test of exactness: the layer gets the activations of the first images. Its error is that of float32 against float64,
divided by the same error of direct convolution. It may be at most :data:`ERROR_LIMITS`. With one input channel
the error of F(2x2, 3x3) is about this limit, since direct sums of nine products have almost no error.

The test of speed: direct convolution and both tile sizes are timed in rounds, in the memory format that the net runs
in. The order within each round is random. Winograd is faster if the lower quartile of its times is below the fastest
round of direct convolution. At the end the whole net must be faster by the same rule, since there the weights and maps
of the other layers compete for the caches.
"""

import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from project.compression.plain_layers import is_plain
from project.compression.winograd.convolution import (
    TILES,
    Winograd,
    WinogradConv2d,
    count_multiplications,
    why_not_winograd,
)
from project.models.kernels import can_run_winograd

Algorithm = Literal["auto", "f2", "f4"]

ERROR_LIMITS = {2: 2.0, 4: 50.0}
"""By the tile's side: the largest allowed error of a layer, as a multiple of that of direct convolution in float32."""

_NUM_CHECKED = 4  # images that the error is measured on
_TILE_OF = {"f2": 2, "f4": 4}


@dataclass(frozen=True)
class WinogradRow:
    """The measurements of one layer, and what was chosen for it.

    Args:
        name: name of the layer in the net.
        shape: input shape N, C, H, W, and then the number of output channels.
        ms: lower quartile of the times for a batch, in ms, by the tile's side; 0 stands for direct convolution.
        errors: error relative to that of direct convolution, by the tile's side.
        saved: multiplications of direct convolution divided by those of Winograd, by the tile's side. Partial tiles
            count as whole ones.
        kept: side of the chosen tile, 2 or 4; None means direct convolution.
        reason: text that says why the layer stays a direct convolution; empty if it does not.
    """

    name: str
    shape: tuple[int, int, int, int, int]
    ms: dict[int, float]
    errors: dict[int, float]
    saved: dict[int, float]
    kept: int | None = None
    reason: str = ""

    def __str__(self) -> str:
        images, channels, height, width, out_channels = self.shape
        times = "  ".join(
            f"f{tile} {self.ms[tile]:8.3f} ms ({self.ms[0] / self.ms[tile]:.2f}x of {self.saved[tile]:.2f}x, "
            f"error {self.errors[tile]:.1f}x)"
            for tile in TILES
        )
        kept = f"f{self.kept}" if self.kept else f"direct, {self.reason}"
        what = f"{images} x {height}x{width}, {channels} -> {out_channels}"
        return f"{self.name:44s} {what:26s} direct {self.ms[0]:8.3f} ms  {times}  {kept}"


@dataclass(frozen=True)
class WinogradPlan:
    """The chosen layers, and the measurements behind the choice.

    Args:
        surgery: surgery that replaces the chosen layers; it may hold no layer.
        rows: measurements of all layers that could be chosen.
        direct_ms: lower quartile of the times of the whole net for a batch with direct convolutions, in ms.
        ms: lower quartile of the times of the whole net for a batch with each layer replaced that was chosen alone, in
            ms. If this net is not faster, ``auto`` gives a surgery without layers.
    """

    surgery: Winograd
    rows: list[WinogradRow]
    direct_ms: float
    ms: float


@dataclass(frozen=True)
class WinogradChooser:
    """Chooses the layers of a net that use Winograd's algorithm, and their tile sizes.

    Example::

        >>> import torch
        >>> from project.compression import WinogradChooser
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3, padding=1), torch.nn.Conv2d(8, 2, 1))
        >>> plan = WinogradChooser(batch_size=2, rounds=3).plan(net, torch.randn(2, 4, 8, 8))
        >>> [row.name for row in plan.rows]
        ['0']
        >>> plan.surgery.apply_(net)

    Args:
        algorithm: ``auto`` takes the fastest algorithm for each layer, which may be direct convolution. ``f2`` takes
            F(2x2, 3x3) and ``f4`` takes F(4x4, 3x3) for each layer whose error allows it.
        batch_size: number of images in the timed batch, 1 or more.
        rounds: largest number of timed rounds for each layer and for the whole net, 1 or more.
        budget_s: seconds after which no further round begins, for each layer and for the whole net; any number. The
            first five rounds are always allowed.
        include: regular expressions; a layer may be chosen if one is found in its name (``re.search``). An empty list
            means all layers.
        exclude: regular expressions; a layer stays a direct convolution if one is found in its name.

    Raises:
        ValueError: if the algorithm is unknown, or if ``batch_size`` or ``rounds`` is below 1.
    """

    algorithm: Algorithm = "auto"
    batch_size: int = 64
    rounds: int = 20
    budget_s: float = 3.0
    include: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.algorithm not in ("auto", *_TILE_OF):
            raise ValueError(f"algorithm is {self.algorithm!r}: choose auto, f2 or f4.")
        if self.batch_size < 1 or self.rounds < 1:
            raise ValueError(f"batch_size is {self.batch_size} and rounds is {self.rounds}: choose at least 1 of each.")

    def layers(self, net: nn.Module) -> dict[str, nn.Conv2d]:
        """The convolutions that may be chosen, by name.

        Args:
            net: net with the convolutions to choose from; it is not changed.

        Raises:
            ValueError: if a regular expression matches no convolution, or if none of the remaining ones has a Winograd
                form.
        """
        convs = {name: layer for name, layer in net.named_modules() if isinstance(layer, nn.Conv2d) and name}
        for argument, patterns in (("include", self.include), ("exclude", self.exclude)):
            for pattern in patterns:
                if not any(re.search(pattern, name) for name in convs):
                    raise ValueError(f"{argument} has {pattern!r}, which finds no convolution of the net: correct it.")
        chosen = {
            name: layer
            for name, layer in convs.items()
            if any(re.search(pattern, name) for pattern in self.include or [""])
            and not any(re.search(pattern, name) for pattern in self.exclude)
            and is_plain(layer)
            and why_not_winograd(layer) is None
        }
        if not chosen:
            raise ValueError(
                f"{type(net).__name__} has no convolution of 3x3 with stride 1, one group and zero padding among the "
                "layers to choose from, and Winograd's algorithm needs one: leave it out, or include more layers. "
                "Subclasses of Conv2d and layers with a computed weight are left alone."
            )
        return chosen

    @torch.inference_mode()
    def plan(self, net: nn.Module, images: Tensor) -> "WinogradPlan":
        """Measure all layers that may be chosen, and then the whole net.

        Args:
            net: net on the CPU, in the memory format that it runs in; it is not changed.
            images: images ``[N, C, H, W]``, normalised as the net expects them; N is :attr:`batch_size`.

        Raises:
            ValueError: if :meth:`layers` finds no layer to choose from.
        """
        net = deepcopy(net).eval()
        Winograd({}).apply_(net)  # begin with direct convolutions, also in a net that has Winograd layers
        rows: list[WinogradRow] = []

        def measure(name: str, layer: nn.Conv2d, x: Tensor) -> None:
            """Measure a layer on its own inputs; a layer that runs several times is measured once."""
            if all(row.name != name for row in rows):
                rows.append(self._measure(name, layer, x))

        handles = [
            layer.register_forward_pre_hook(lambda layer, args, name=name: measure(name, layer, args[0]))
            for name, layer in self.layers(net).items()
        ]
        net(images)
        for handle in handles:
            handle.remove()
        # A layer that is faster alone may be slower in the net. Compare the whole nets, and keep all layers or none.
        fast = deepcopy(net)
        _surgery(rows).apply_(fast)
        direct, own = self._times([partial(net, images), partial(fast, images)])
        if self.algorithm == "auto" and not _wins(own, direct):
            rows = [replace(row, kept=None, reason=row.reason or "the whole net is not faster") for row in rows]
        return WinogradPlan(_surgery(rows), rows, _typical(direct), _typical(own))

    def _measure(self, name: str, layer: nn.Conv2d, x: Tensor) -> WinogradRow:
        """Times, errors and choice of one layer with inputs ``x`` ``[N, C, H, W]``."""
        fast = {tile: WinogradConv2d.of(layer, tile) for tile in TILES}
        forms: dict[int, nn.Conv2d] = {0: layer, **fast}  # by the tile's side; 0 is direct convolution
        samples = self._times([partial(form.forward, x) for form in forms.values()])
        times = dict(zip(forms, samples, strict=True))
        errors = relative_errors(layer, x[:_NUM_CHECKED])
        height, width = layer.forward(x[:1]).shape[2:]
        counts = {
            tile: count_multiplications(height, width, layer.in_channels, layer.out_channels, tile or None)
            for tile in forms
        }
        row = WinogradRow(
            name,
            (len(x), layer.in_channels, x.shape[2], x.shape[3], layer.out_channels),
            {tile: _typical(samples) for tile, samples in times.items()},
            errors,
            {tile: counts[0] / counts[tile] for tile in TILES},
        )
        kept, reason = self._choose(row, times, can_run_winograd(x, layer.weight, layer.bias, fast[4].padding))
        return replace(row, kept=kept, reason=reason)

    def _choose(self, row: WinogradRow, times: Mapping[int, list[float]], can_run: bool) -> tuple[int | None, str]:
        """The chosen tile of a layer, or None and the reason for direct convolution."""
        if not can_run:
            return None, "there is no kernel for its inputs"
        wanted = TILES if self.algorithm == "auto" else (_TILE_OF[self.algorithm],)
        exact = [tile for tile in wanted if row.errors[tile] <= ERROR_LIMITS[tile]]
        if not exact:
            return None, "its error is too large"
        if self.algorithm != "auto":
            return exact[0], ""
        fastest = min(exact, key=lambda tile: row.ms[tile])
        return (fastest, "") if _wins(times[fastest], times[0]) else (None, "it is not faster")

    def _times(self, runs: Sequence[Callable[[], object]]) -> list[list[float]]:
        """The times of each function in ms, one for each round.

        An untimed call comes before each timed call, since another function has used the caches last. A round calls the
        functions in a random order, so that slow changes of the machine's speed do not favour one of them.
        """
        order, start = random.Random(0), time.perf_counter()
        samples: list[list[float]] = [[] for _ in runs]
        for number in range(self.rounds):
            if number >= 5 and time.perf_counter() - start > self.budget_s:
                break
            for key in order.sample(range(len(runs)), len(runs)):
                runs[key]()
                begin = time.perf_counter()
                runs[key]()
                samples[key].append(1000 * (time.perf_counter() - begin))
        return samples


@torch.inference_mode()
def relative_errors(layer: nn.Conv2d, x: Tensor) -> dict[int, float]:
    """The root mean square error of Winograd in float32 against float64, relative to direct convolution, by tile.

    The error of direct convolution counts as at least a quarter of the last digit, the error of rounding the exact
    output. Without this limit the quotient could be infinite: a short sum of round numbers may have no error at all.

    Args:
        layer: convolution of 3x3 in float32 that has a Winograd form.
        x: inputs ``[N, C, H, W]`` of the layer, float32.
    """
    exact = deepcopy(layer).double().forward(x.double())
    least = torch.finfo(torch.float32).eps / 4 * exact.norm()
    unit = max(float((layer.forward(x) - exact).norm()), float(least), torch.finfo(torch.float32).tiny)
    return {tile: float((WinogradConv2d.of(layer, tile).forward(x) - exact).norm()) / unit for tile in TILES}


def _surgery(rows: list[WinogradRow]) -> Winograd:
    """The surgery for the layers that are kept."""
    return Winograd({row.name: row.kept for row in rows if row.kept is not None})


def _wins(own: list[float], direct: list[float]) -> bool:
    """Whether a quarter of the rounds is faster than the fastest round of direct convolution.

    If two functions are equally fast, this happens by chance once in forty times.
    """
    return _typical(own) < min(direct)


def _typical(samples: list[float]) -> float:
    """The lower quartile of the times: other processes can only make a call slower, never faster."""
    return float(torch.tensor(samples, dtype=torch.float64).quantile(0.25))
