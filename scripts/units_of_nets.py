"""What is left of nets of torchvision and timm when half of all units that can go are removed: docs/unit_removal.md.

Each net has random weights, scales, shifts and running statistics, and ten classes. Its last layer keeps its units. Of
every group of coupled units the half goes whose weights have the smallest squares. Beside it stands Torch-Pruning, if
it is installed: its magnitude pruner with the same share, with the numbers of heads where it asks for them.

    python scripts/units_of_nets.py --workers 2

Columns: what is left of the multiply-accumulates and of the parameters; the largest difference between the logits of
the thinned and of the masked net, as a share of the largest logit; whether a fresh net with the same surgery takes the
weights and gives the same logits, whether a training step gives finite gradients, and whether a second round holds the
same law; and what stays, with the reason.
"""

import argparse
import platform
import shlex
import signal
import time
import warnings
from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from project.compression import to_plain
from project.compression.thinning.units import Units, look_at_units, masked_net, plan_thinning
from project.models.surgery import replay_

PAGE = Path(__file__).resolve().parents[1] / "docs" / "unit_removal.md"
TOLERANCE = 1e-5
SECONDS = 100
"""After these seconds of a machine without other work Torch-Pruning is stopped: it may loop, and its memory grows."""

_PLAIN: tuple[str, ...] = (
    *("resnet18", "resnet50", "vgg16_bn", "squeezenet1_1", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0"),
    *("efficientnet_v2_s", "mnasnet1_0", "resnext50_32x4d", "regnet_y_400mf", "densenet121", "convnext_tiny"),
    *("shufflenet_v2_x1_0", "swin_t"),
)
TORCHVISION: dict[str, dict[str, Any]] = {name: {} for name in _PLAIN}
TORCHVISION |= {
    "googlenet": {"aux_logits": False, "init_weights": False},
    "vit_b_16": {"image_size": 64},
}
_PLAIN_TIMM: tuple[str, ...] = (
    *("ghostnet_050", "mobilevit_xxs", "repvgg_a0", "poolformer_s12", "hrnet_w18_small", "dla34", "cspdarknet53"),
    *("res2net50_26w_4s", "edgenext_xx_small", "ese_vovnet19b_slim", "eca_resnet33ts", "seresnet18", "skresnet18"),
    *("gernet_s", "regnetz_005", "dm_nfnet_f0", "pvt_v2_b0", "twins_svt_small", "mobilenetv4_conv_small"),
    *("fastvit_t8", "repvit_m0_9", "convnextv2_atto", "inception_next_atto", "mobileone_s0", "starnet_s1"),
    *("xception41", "convmixer_768_32", "tiny_vit_5m_224", "tf_efficientnet_lite0", "resnetv2_50x1_bit"),
)
_SMALL_TIMM: tuple[str, ...] = (
    *("coat_lite_tiny", "xcit_nano_12_p16_224", "swin_tiny_patch4_window7_224", "deit_tiny_patch16_224"),
    *("maxvit_rmlp_pico_rw_256", "volo_d1_224", "visformer_tiny", "cait_xxs24_224"),
)
TIMM: dict[str, dict[str, Any]] = {name: {} for name in _PLAIN_TIMM}
TIMM |= {name: {"img_size": 64} for name in _SMALL_TIMM}
TIMM |= {
    "beit_base_patch16_224": {"img_size": 64, "depth": 2},
    "mixer_s32_224": {"img_size": 64},
    "resmlp_12_224": {"img_size": 64},
    "levit_128s": {},
    "efficientformer_l1": {},
}
LARGE = ("levit_128s", "efficientformer_l1")
"""Nets that want images of 224 pixels; the others get 64."""


@dataclass
class Row:
    """One line of the table; shares are between 0 and 1."""

    name: str
    macs: float = 1
    parameters: float = 1
    theirs: str = "not installed"
    error: float = float("nan")
    checks: dict[str, bool] = field(default_factory=dict)
    stays: dict[str, str] = field(default_factory=dict)
    failure: str = ""

    def line(self) -> str:
        """The row in Markdown."""
        if self.failure:
            return f"| {self.name} | fails: {self.failure} | {self.theirs} | | | |"
        checks = ", ".join(key if good else f"**not {key}**" for key, good in self.checks.items())
        ours = f"{self.macs:.2f} ({self.parameters:.2f})"
        return f"| {self.name} | {ours} | {self.theirs} | {self.error:.0e} | {checks} | {stays(self.stays)} |"


def stays(reasons: Mapping[str, str]) -> str:
    """What stays, in short: for each reason the number of layers, and the first."""
    layers = defaultdict(list)
    for layer, reason in reasons.items():
        if not reason.startswith("it gives the net's output"):
            layers[reason.split("(")[0].replace("|", "/").strip()].append(layer)
    most = sorted(layers.items(), key=lambda item: -len(item[1]))
    texts = [f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {why}" for why, names in most]
    return "; ".join(texts[:2]) + (f"; {len(texts) - 2} more reasons" if len(texts) > 2 else "")


def build(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    """A net with lively weights in eval mode, and the shape of an image."""
    torch.manual_seed(0)
    if name in TORCHVISION:
        import torchvision

        net = getattr(torchvision.models, name)(weights=None, num_classes=10, **TORCHVISION[name])
    else:
        import timm

        net = timm.create_model(name, num_classes=10, **TIMM[name])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() <= 1 or (parameter == parameter.flatten()[0]).all():
                parameter.add_(0.2 + 0.3 * torch.rand(parameter.shape, generator=generator))
        for key, buffer in net.named_buffers():
            if "running" in key:
                buffer.add_(0.3 * torch.rand(buffer.shape, generator=generator))
        head = last_layer(net)
        head.weight.normal_(0, 0.05, generator=generator)
    return net.eval(), (3, 224, 224) if name in LARGE else (3, 64, 64)


def last_layer(net: nn.Module) -> Any:
    """The last convolution or linear layer."""
    return [module for module in net.modules() if isinstance(module, nn.Linear | nn.Conv2d)][-1]


def macs(net: nn.Module, x: Tensor) -> float:
    """Multiply-accumulates, by torch's counter."""
    net = deepcopy(net).requires_grad_(False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(x)
    return counter.get_total_flops() / 2


def num_parameters(net: nn.Module) -> int:
    """The number of parameters."""
    return sum(parameter.numel() for parameter in net.parameters())


def smallest_half(net: nn.Module, units: Mapping[str, Units]) -> dict[str, list[int]]:
    """For each group the outputs of the half of its units whose parameters have the smallest squares."""
    head = next(name for name, module in net.named_modules() if module is last_layer(net))
    removed: dict[str, list[int]] = {}
    for of in units.values():
        if head in of.layers:
            continue
        score = torch.zeros(of.num)
        for (name, dim), indices in of.slices.items():
            if name not in of.buffers:
                weight = net.get_parameter(name).detach().movedim(dim, 0)
                weight = weight.reshape(len(weight), -1)
                score += weight.square().sum(1)[indices].sum(1)
        removed.setdefault(of.layers[0], []).extend(of.outputs(score.argsort()[: of.num // 2].tolist()))
    return removed


def torch_pruning(net: nn.Module, x: Tensor) -> str:
    """What Torch-Pruning leaves of the multiply-accumulates and parameters, or how it fails."""
    try:
        import torch_pruning as tp
    except ImportError:
        return "not installed"

    def stop(*_: Any) -> None:
        raise TimeoutError

    whole = macs(net, x), num_parameters(net)
    net = deepcopy(net)
    attention: list[Any] = [m for m in net.modules() if hasattr(m, "qkv") and hasattr(m, "num_heads")]
    attention = [m for m in attention if isinstance(m.qkv, nn.Linear | nn.Conv2d)]
    heads: Any = {m: m.num_heads for m in net.modules() if isinstance(m, nn.MultiheadAttention)}
    heads |= {m.qkv: m.num_heads for m in attention}
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        pruner = tp.pruner.MagnitudePruner(
            net, x, importance=tp.importance.MagnitudeImportance(p=2), pruning_ratio=0.5,
            ignored_layers=[last_layer(net)], num_heads=heads, prune_head_dims=False, prune_num_heads=bool(heads),
            head_pruning_ratio=0.5,
        )  # fmt: skip
        pruner.step()
        for m in attention:
            if m.qkv in pruner.num_heads:
                m.num_heads = pruner.num_heads[m.qkv]
                m.head_dim = m.qkv.out_features // (3 * m.num_heads)
        net(x)
        return f"{macs(net, x) / whole[0]:.2f} ({num_parameters(net) / whole[1]:.2f})"
    except Exception as error:
        return f"fails ({type(error).__name__})"
    finally:
        signal.alarm(0)


def difference(net: nn.Module, thinned: nn.Module, removed: dict[str, list[int]], x: Tensor) -> float:
    """The largest difference between the logits of the masked and of the thinned net, as a share of the largest."""
    with torch.no_grad():
        expected = masked_net(net, removed, tuple(x.shape[1:]))(x)  # type: ignore[arg-type]
        return float((thinned(x) - expected).abs().max() / expected.abs().max())


def look(name: str, peer: bool = True) -> Row:
    """Thin a net, and check it.

    Args:
        name: one of the nets.
        peer: whether Torch-Pruning tries it, too.
    """
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.backends.mha.set_fastpath_enabled(False)
    row = Row(name)
    net, shape = build(name)
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(2))
    try:
        units, row.stays = look_at_units(net, shape)
        removed = smallest_half(net, units)
        thinned = deepcopy(net)
        plan = plan_thinning(net, removed, shape)
        plan.apply_(thinned)
        row.macs, row.parameters = macs(thinned, x) / macs(net, x), num_parameters(thinned) / num_parameters(net)
        row.error = difference(net, thinned, removed, x)

        fresh = build(name)[0]
        replay_(fresh, [to_plain(plan)])
        fresh.load_state_dict(thinned.state_dict())
        with torch.no_grad():
            row.checks["reloads"] = torch.equal(fresh.eval()(x), thinned(x))

        fresh.train()(x).square().mean().backward()
        row.checks["trains"] = all(p.grad is None or bool(p.grad.isfinite().all()) for p in fresh.parameters())

        again = smallest_half(thinned, look_at_units(thinned, shape)[0])
        twice = deepcopy(thinned)
        plan_thinning(thinned, again, shape).apply_(twice)
        row.checks["second round"] = difference(thinned, twice, again, x) <= TOLERANCE
    except Exception as error:
        row.failure = f"{type(error).__name__}: {error}".splitlines()[0][:150]
    if peer:
        row.theirs = torch_pruning(net, x)
    return row


def page(rows: list[Row], command: str) -> str:
    """The page in Markdown."""
    import timm
    import torchvision

    try:
        from importlib.metadata import version

        theirs = f"Torch-Pruning {version('torch-pruning')}"
    except ImportError:
        theirs = "Torch-Pruning is not installed"
    head = (__doc__ or "").split("\n    python")[0].split("\n", 2)[2].strip()
    columns = (__doc__ or "").split("--workers 2")[1].strip()
    lines = [
        "<!-- room: compression/thinning -->",
        "# Removing units from common nets",
        "",
        head,
        "",
        columns,
        "",
        f"Made by `{command}` with torch {torch.__version__}, torchvision {torchvision.__version__}, "
        f"timm {timm.__version__}, {theirs}, Python {platform.python_version()}.",
        "",
        "| net | ours: MACs (parameters) left | Torch-Pruning | masked = thinned | holds | stays |",
        "|---|---|---|---|---|---|",
        *(row.line() for row in rows),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Look at all nets and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nets", nargs="*", help="names of nets; all if none is given")
    parser.add_argument("--workers", type=int, default=1, help="number of processes, 1 or more")
    parser.add_argument("--output", type=Path, default=PAGE, help="Markdown file to write")
    args = parser.parse_args()
    names = args.nets or [*TORCHVISION, *TIMM]
    rows, begin = [], time.monotonic()
    with ProcessPoolExecutor(args.workers) as pool:
        for row in pool.map(look, names):
            rows.append(row)
            print(f"{time.monotonic() - begin:.0f} s", row.line(), flush=True)  # noqa: T201
    args.output.write_text(page(rows, shlex.join(["python", "scripts/units_of_nets.py", *args.nets])), encoding="utf-8")


if __name__ == "__main__":
    main()
