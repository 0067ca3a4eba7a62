"""The checks of scripts/units_of_nets.py: what a net without half of its units must still do, and the laws that hold.

Each check is a method of :class:`Thinned`. It returns its numbers, raises :class:`any_net_cells.Wrong` if a law does
not hold, or lets the package's own refusal pass. :func:`any_net_cells.judge` tells these apart.
"""

import math
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from any_net_cells import difference, must, short
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from project.compression import to_plain
from project.compression.thinning.masked import MaskedNet
from project.compression.thinning.thin import Thin, sliced
from project.compression.thinning.units import masked_net, plan_thinning
from project.deployment.export import TOLERANCE as FILE_TOLERANCE
from project.deployment.export import Format, export
from project.deployment.metadata import Metadata
from project.deployment.model_file import ModelFile
from project.deployment.packed.file import write_packed
from project.deployment.recipe import Recipe
from project.models.surgery import replay_

TOLERANCE = 1e-5
"""Largest difference between the masked and the thinned net in float32, as a share of the largest logit or gradient."""
EXACT = 1e-9
"""The same in double precision."""
SHARE = 0.01
"""Largest difference of a logit between the nets, as a share of its difference between images: else any net passes."""
NUM_IMAGES = 16
"""Images that calibrate an int8 file, and on which files and nets are compared."""

Shape = tuple[int, int, int]
Removed = dict[str, list[int]]


class SameDropout(TorchFunctionMode):
    """Dropout with one draw for each image instead of one for each value.

    The thinned net has fewer values than the masked one, so torch would draw other numbers for it.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not F.dropout:
            return function(*args, **(kwargs or {}))
        return _dropout(*args, **(kwargs or {}))


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not training or not p:
        return input
    return input * input.new_empty(len(input), *[1] * (input.dim() - 1)).bernoulli_(1 - p) / (1 - p)


def judged(error: float, exact: float) -> str:
    """A difference that is too large in float32, and what it is in double precision."""
    must(exact <= EXACT, f"{exact:.1e} of the largest in double precision, {error:.1e} in float32")
    return f"{short(exact)} in double precision, {short(error)} in float32"


def random_images(num: int, shape: Shape, seed: int) -> Tensor:
    return torch.randn(num, *shape, generator=torch.Generator().manual_seed(seed))


def pair(net: nn.Module, removed: Removed, shape: Shape) -> tuple[Thin, MaskedNet, nn.Module]:
    """The plan that removes units from a net, the masked net and the thinned net.

    The running statistics of both are those of the masked net on eight images. With others the logits would hardly
    depend on the image.
    """
    plan, masked = plan_thinning(net, removed, shape), masked_net(net, removed, shape)
    norms = [module for module in masked.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().momentum = 1
    with torch.no_grad():
        masked(random_images(8, shape, seed=1))
    for norm, norm.momentum in zip(norms, momenta, strict=True):
        norm.eval()
    thinned = deepcopy(masked.net)
    plan.apply_(thinned)
    return plan, masked, thinned


class Thinned:
    """A net, and the same net without the chosen units.

    Args:
        recipe: description of the net.
        fresh: makes the net with its first values, in eval mode.
        choose: the numbers of the units to remove from a net, by the layer's name.
        shape: shape (C, H, W) of an image.
        folder: an existing folder for files.
    """

    def __init__(
        self,
        recipe: Recipe,
        fresh: Callable[[], nn.Module],
        choose: Callable[[nn.Module], Removed],
        shape: Shape,
        folder: Path,
    ) -> None:
        self.fresh, self.choose, self.shape, self.folder = fresh, choose, shape, folder
        self.net = fresh()
        self.plan, self.masked, self.thinned = pair(self.net, choose(self.net), shape)
        self.recipe = Recipe(recipe.net, [to_plain(self.plan)])
        self.metadata = Metadata(tuple("abcdefghij"), shape, (0.5,) * 3, (0.5,) * 3)
        self.model = SimpleNamespace(net=self.net)  # judge looks for the names of layers here

    def images(self, num: int) -> Tensor:
        """Random images ``[num, C, H, W]``."""
        return random_images(num, self.shape, seed=2)

    # -- the net ------------------------------------------------------------------------------------------------------

    def same(self) -> str:
        return self._compared(self.masked, self.thinned)

    @torch.no_grad()
    def _compared(self, masked: nn.Module, thinned: nn.Module) -> str:
        images = self.images(NUM_IMAGES)
        logits, found = masked(images), thinned(images)
        spread, error = difference(logits, logits.mean(0)), difference(found, logits)
        if error <= min(TOLERANCE, SHARE * spread):
            return short(error)
        exact = difference(*(deepcopy(net).double()(images.double()) for net in (thinned, masked)))
        must(exact <= SHARE * spread, f"it differs by {exact:.1e} between nets, but by {spread:.1e} between images")
        return judged(error, exact)

    def reloads(self) -> str:
        fresh, images = self.fresh(), self.images(2)
        replay_(fresh, self.recipe.surgeries)
        fresh.load_state_dict(self.thinned.state_dict())
        with torch.no_grad():
            must(torch.equal(fresh(images), self.thinned(images)), "the net that takes its weights has other logits")
        return "same bits"

    def trains(self) -> str:
        net = deepcopy(self.thinned).train()
        net(self.images(2)).square().mean().backward()
        bad = [key for key, each in net.named_parameters() if each.grad is not None and not each.grad.isfinite().all()]
        must(not bad, f"the gradient of {bad[:1]} is not finite")
        return "finite"

    def gradients(self) -> str:
        error = self._gradient_error(torch.float32)
        if error <= TOLERANCE:
            return short(error)
        return judged(error, self._gradient_error(torch.float64))

    def _gradient_error(self, dtype: torch.dtype) -> float:
        """The largest difference of a gradient between masked and thinned net, as a share of the largest gradient."""
        masked, thinned = deepcopy(self.masked).to(dtype).train(), deepcopy(self.thinned).to(dtype).train()
        images, labels = self.images(8).to(dtype), torch.arange(8)
        images *= 1.5 ** torch.arange(8).view(-1, 1, 1, 1)  # so that their logits differ
        for net in (masked, thinned):
            torch.manual_seed(3)
            with SameDropout():
                F.cross_entropy(net(images), labels).backward()
        whole = {key: parameter.grad for key, parameter in masked.net.named_parameters()}
        largest = max(float(grad.abs().max()) for grad in whole.values() if grad is not None)
        error = 0.0
        for key, parameter in thinned.named_parameters():
            must((parameter.grad is None) == (whole[key] is None), f"one of the nets has no gradient of {key}")
            if parameter.grad is not None and (grad := whole[key]) is not None:
                expected = sliced(grad, self.plan.slices.get(key, []))
                error = max(error, float((parameter.grad - expected).abs().max()) / largest)
        return error

    def second_round(self) -> str:
        _, masked, twice = pair(self.thinned, self.choose(self.thinned), self.shape)
        return self._compared(masked, twice)

    # -- its files ----------------------------------------------------------------------------------------------------

    def onnx(self) -> str:
        path, images = self.folder / "model.onnx", self.images(NUM_IMAGES)
        error = self._exported(self.thinned, "onnx", path)
        if error <= FILE_TOLERANCE["onnx"]:
            return short(error)
        with torch.no_grad():
            exact, own = deepcopy(self.thinned).double()(images.double()), self.thinned(images)
        errors = [difference(found, exact) for found in (ModelFile(path).logits(images), own)]
        text = "from those in double precision its logits differ by {:.1e} of the largest, the net's by {:.1e}"
        must(errors[0] <= 2 * errors[1], text.format(*errors))
        return text.format(*errors)

    def int8(self) -> str:
        fp32 = self.folder / "model.onnx"
        error = self._exported(self.thinned, "onnx-int8", self.folder / "int8.onnx", fp32 if fp32.is_file() else None)
        if error <= FILE_TOLERANCE["onnx-int8"]:
            return short(error)
        whole = self._exported(self.masked.net, "onnx-int8", self.folder / "whole.onnx")
        text = f"its logits differ by {error:.1e} of the largest, those of the whole net by {whole:.1e}"
        must(error <= 2 * whole, text)
        return text

    def _exported(self, net: nn.Module, format: Format, path: Path, fp32: Path | None = None) -> float:
        """Write a file. Returns how much its logits differ from the net's, as a share of the largest logit."""
        images, inf = self.images(NUM_IMAGES), math.inf
        written = export(net, path, self.metadata, images, format=format, calibration=images, tolerance=inf, fp32=fp32)
        return written.difference

    def packed(self) -> str:
        path, images = self.folder / "model.packed", self.images(NUM_IMAGES)
        write_packed(self.thinned, self.metadata, self.recipe, path)
        net = ModelFile(path, self.recipe.modules).net
        assert net is not None
        found, wanted = net.state_dict(), self.thinned.state_dict()
        same = found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
        must(same, "the file holds other weights than the net")
        net.to(memory_format=torch.contiguous_format)
        with torch.no_grad():
            must(torch.equal(net(images), self.thinned(images)), "the file's net gives other logits")
        return f"{path.stat().st_size} bytes, exact"


CHECKS = {
    "same": "masked = thinned",
    "reloads": "reloads",
    "trains": "trains",
    "gradients": "gradients",
    "second_round": "second round",
    "onnx": "ONNX",
    "int8": "int8",
    "packed": "packed",
}
"""The methods of :class:`Thinned` that check a law, each with its name on the page."""
