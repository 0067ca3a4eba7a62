"""Which layers compute by Winograd's algorithm, and on which tiles: those that are as exact as they must be and that
gain time, measured on this machine at the shapes they have in the net.

The gate: on what the first images put into the layer, the error of float32 against float64, over that of direct
convolution, may be :data:`ERROR_LIMITS`; of one channel F(2x2, 3x3) reaches it, since sums of nine products have next
to no error. The clock: direct convolution and both tiles take turns in rounds of an order drawn anew, in the memory
format that the net runs in; a layer is kept where Winograd's lower quartile is below the fastest round of direct
convolution. In the end the whole net must be faster by the same measure, since there other layers' weights and maps
compete for the caches.
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
"""By the tile's side: how many times the error of direct convolution in float32 a layer's may be."""

_NUM_CHECKED = 4
_TILE_OF = {"f2": 2, "f4": 4}


@dataclass(frozen=True)
class WinogradRow:
    """What was measured of a layer.

    Args:
        name: of the layer.
        shape: of its input, ``[N, C, H, W]``, and its output channels.
        ms: lower quartile for a batch by tile; 0 is direct convolution.
        errors: by tile, over direct convolution's.
        saved: by tile, multiplications of direct convolution over its own, whole tiles counted.
        kept: tile; ``None`` is direct convolution.
        reason: why it stays direct.
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
    """What was chosen, and why.

    Args:
        surgery: may hold no layer.
        rows: of all layers that there were to choose from.
        direct_ms, ms: lower quartiles of the whole net for a batch, before and with the layers that won.
    """

    surgery: Winograd
    rows: list[WinogradRow]
    direct_ms: float
    ms: float


@dataclass(frozen=True)
class WinogradChooser:
    """Chooses layers and tiles.

    Args:
        algorithm: ``auto`` takes what is fastest, layer by layer, direct convolution included; ``f2`` and ``f4`` take
            F(2x2, 3x3) or F(4x4, 3x3) wherever the error allows it.
        batch_size: images that the net is to be fast at.
        rounds: of measurements of each layer, at most.
        budget_s: seconds for a layer and for the whole net; there are five rounds at least.
        include: regular expressions, searched for in the names of layers; without any, all layers are.
        exclude: likewise, what stays direct.

    Raises:
        ValueError: for an unknown algorithm and counts below 1.
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
            raise ValueError(f"batch_size is {self.batch_size} and rounds {self.rounds}: choose at least 1 of each.")

    def layers(self, net: nn.Module) -> dict[str, nn.Conv2d]:
        """The convolutions that may be chosen, by name.

        Raises:
            ValueError: when an expression finds no convolution, or none that it leaves has a Winograd form.
        """
        convs = {name: layer for name, layer in net.named_modules() if isinstance(layer, nn.Conv2d) and name}
        for argument, patterns in (("include", self.include), ("exclude", self.exclude)):
            for pattern in patterns:
                if not any(re.search(pattern, name) for name in convs):
                    raise ValueError(f"{argument} has {pattern!r}, which finds no convolution of the net.")
        chosen = {
            name: layer
            for name, layer in convs.items()
            if any(re.search(pattern, name) for pattern in self.include or [""])
            and not any(re.search(pattern, name) for pattern in self.exclude)
            and why_not_winograd(layer) is None
        }
        if not chosen:
            raise ValueError(
                f"{type(net).__name__} has no convolution of 3x3 with stride 1, one group and zeros as padding among "
                "those to choose from, and Winograd's algorithm is for these: leave it out, or include more."
            )
        return chosen

    @torch.inference_mode()
    def plan(self, net: nn.Module, images: Tensor) -> "WinogradPlan":
        """The surgery, which may hold no layer, and what was measured.

        Args:
            net: on the processor, in the memory format that it runs in; stays as it is.
            images: ``[N, C, H, W]`` as the net takes them, :attr:`batch_size` of them.

        Raises:
            ValueError: as :meth:`layers`.
        """
        net = deepcopy(net).eval()
        Winograd({}).apply_(net)
        rows: list[WinogradRow] = []

        def measure(name: str, layer: nn.Conv2d, x: Tensor) -> None:
            if all(row.name != name for row in rows):
                rows.append(self._measure(name, layer, x))

        handles = [
            layer.register_forward_pre_hook(lambda layer, args, name=name: measure(name, layer, args[0]))
            for name, layer in self.layers(net).items()
        ]
        net(images)
        for handle in handles:
            handle.remove()
        fast = deepcopy(net)
        _surgery(rows).apply_(fast)
        direct, own = self._times([partial(net, images), partial(fast, images)])
        if self.algorithm == "auto" and not _wins(own, direct):
            rows = [replace(row, kept=None, reason=row.reason or "the whole net is not faster") for row in rows]
        return WinogradPlan(_surgery(rows), rows, _typical(direct), _typical(own))

    def _measure(self, name: str, layer: nn.Conv2d, x: Tensor) -> WinogradRow:
        fast = {tile: WinogradConv2d.of(layer, tile) for tile in TILES}
        forms: dict[int, nn.Conv2d] = {0: layer, **fast}
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
        if not can_run:
            return None, "there is no kernel for its maps"
        wanted = TILES if self.algorithm == "auto" else (_TILE_OF[self.algorithm],)
        exact = [tile for tile in wanted if row.errors[tile] <= ERROR_LIMITS[tile]]
        if not exact:
            return None, "its error is too large"
        if self.algorithm != "auto":
            return exact[0], ""
        fastest = min(exact, key=lambda tile: row.ms[tile])
        return (fastest, "") if _wins(times[fastest], times[0]) else (None, "it is not faster")

    def _times(self, runs: Sequence[Callable[[], object]]) -> list[list[float]]:
        """Milliseconds in rounds, each timed call after an untimed one, since another has used the caches last."""
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
    """By tile, the error of float32 against float64, in the root mean square, over that of direct convolution; for the
    latter a quarter of the last digit is taken at least, which is what rounding the exact output costs: a short sum of
    round numbers may have none.
    """
    exact = deepcopy(layer).double().forward(x.double())
    least = torch.finfo(torch.float32).eps / 4 * exact.norm()
    unit = max(float((layer.forward(x) - exact).norm()), float(least), torch.finfo(torch.float32).tiny)
    return {tile: float((WinogradConv2d.of(layer, tile).forward(x) - exact).norm()) / unit for tile in TILES}


def _surgery(rows: list[WinogradRow]) -> Winograd:
    return Winograd({row.name: row.kept for row in rows if row.kept is not None})


def _wins(own: list[float], direct: list[float]) -> bool:
    """Whether a quarter of the rounds is faster than direct convolution's fastest: by chance, of two that are equally
    fast, once in forty times.
    """
    return _typical(own) < min(direct)


def _typical(samples: list[float]) -> float:
    """The lower quartile: what other processes take of the machine only ever adds."""
    return float(torch.tensor(samples, dtype=torch.float64).quantile(0.25))
