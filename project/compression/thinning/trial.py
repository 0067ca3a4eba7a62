"""Try a plan: the thinned copy of a net must compute what the masked copy computes."""

import numpy as np
import torch
from torch import Tensor, nn

from project.compression.plain_layers import copy_of
from project.compression.thinning.couplings import Couplings
from project.compression.thinning.cuts import note_uses_, unused
from project.compression.thinning.plan import Gone, cuts_of, masked_of
from project.compression.thinning.thin import Thin

_TOLERANCE = 1e-3
"""Allowed change of the logits in float32, as a share of the largest logit. Some nets make rounding errors large."""

_ROUNDING, _EXACT = 1e-6, 1e-9
"""A change above the first in float32 must be below the second in double precision."""


class DiffersError(Exception):
    """A thinned copy of a net computes something else than the masked one; the message says what."""


def try_out(
    plan: Thin,
    net: nn.Module,
    c: Couplings,
    gone: Gone,
    image_shape: tuple[int, int, int],
) -> dict[str, int]:
    """Compare a masked and a thinned copy of the net on random images.

    Returns:
        The new width of each block whose attribute ``out_channels`` must change.

    Raises:
        DiffersError: if the thinned copy does not run, or if its logits differ from those of the masked copy.
    """
    with torch.inference_mode(False), torch.no_grad():
        copy = evaluated_copy(net)
        try:
            images, expected, widths = _run_small(masked_of(copy, c, gone), copy, image_shape)
            plan.apply_(copy)  # the parts that go are zero in it, and the others are those of the net
            note_uses_(copy)
            logits, new_widths = _run(copy, copy, images)
            error = _largest_change(logits, expected)
        except Exception as failure:  # whatever the net raises at another width
            raise DiffersError(f"it no longer runs ({failure})") from failure
    # If the parts lose the same channels, a net may compute the sizes, as in x.split(x.shape[1] // 2, 1).
    free = [each for each in c.cuts if len({(*np.sort(c.root[part]),) for part in each[1].parts if len(part)}) > 1]
    for name in (name for name, cuts in unused(copy, cuts_of(free, gone)).items() if cuts):
        raise DiffersError(f"{name or 'the net'} computes the sizes of the parts that it takes")
    large = error > _ROUNDING and _exact_change(plan, net, c, gone, images) > _EXACT
    if not error <= _TOLERANCE or large:
        raise DiffersError(f"its logits change by {error:.1e} of the largest")
    # Training may run layers that the trace in eval mode has not seen, such as an auxiliary head.
    if (why := _failure_in_training(copy, images)) and not _failure_in_training(evaluated_copy(net), images):
        raise DiffersError(f"it no longer runs in training ({why})")
    # Only blocks whose stated width was the width of their output: others mean something else by `out_channels`.
    return {
        name: new for name, new in new_widths.items() if new != widths[name] == net.get_submodule(name).out_channels
    }


def _largest_change(logits: Tensor, expected: Tensor) -> float:
    return float((logits - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def _exact_change(plan: Thin, net: nn.Module, c: Couplings, gone: Gone, images: Tensor) -> float:
    """The change of the logits in double precision; 0 if the net does not run in it."""
    with torch.inference_mode(False), torch.no_grad():
        copy = evaluated_copy(net).double()
        try:
            expected = masked_of(copy, c, gone)(images.double())
            plan.apply_(copy)
            return _largest_change(copy(images.double()), expected)
        except Exception:  # a net may ask for float32
            return 0.0


def evaluated_copy(net: nn.Module) -> nn.Module:
    """A copy in eval mode, in float32, on the CPU.

    Args:
        net: any net; it is not changed.
    """
    return copy_of(net).cpu().float().eval()


def _run_small(
    net: nn.Module, blocks: nn.Module, image_shape: tuple[int, int, int]
) -> tuple[Tensor, Tensor, dict[str, int]]:
    """Two random images, small ones if the net takes them, and the results of :func:`_run`.

    No global random number is drawn.
    """
    channels, height, width = image_shape
    generator = torch.Generator().manual_seed(0)
    if min(height, width) >= 128:
        small = torch.randn(2, channels, height // 4, width // 4, generator=generator)
        try:
            logits, widths = _run(net, blocks, small)
            if logits.isfinite().all():
                return small, logits, widths
        except Exception:  # the net wants images of one size
            pass
    images = torch.randn(2, *image_shape, generator=generator)
    return images, *_run(net, blocks, images)


def _failure_in_training(net: nn.Module, images: Tensor) -> Exception | None:
    """What a forward pass in train mode raises; ``None`` if it runs. The running statistics of ``net`` change."""
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            net.train()(images)
    except Exception as failure:  # whatever the net raises at another width
        return failure
    return None


def _run(net: nn.Module, blocks: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, int]]:
    """The logits, and the width of the output of each block that has children and an attribute ``out_channels``."""
    widths: dict[str, int] = {}
    handles = [
        block.register_forward_hook(lambda block, args, output, name=name: widths.update({name: output.shape[1]}))
        for name, block in blocks.named_modules()
        if isinstance(vars(block).get("out_channels"), int) and next(block.children(), None) is not None
    ]
    try:
        return net(images), widths
    finally:
        for handle in handles:
            handle.remove()
