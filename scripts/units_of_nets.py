"""What is left of nets of torchvision and timm when half of all units that can go are removed: docs/unit_removal.md.

Each net has random weights, scales and shifts, and ten classes. Its running statistics are those of the masked net on
eight random images, so that its logits depend on the image. Its last layer keeps its units. Of every group of coupled
units the half goes whose weights have the smallest squares. Beside it stands Torch-Pruning, if it is installed: its
magnitude pruner with the same share, with the numbers of heads where it asks for them.

    python scripts/units_of_nets.py --workers 2

Columns: what is left of the multiply-accumulates and of the parameters; the largest difference between the logits of
the thinned and of the masked net, as a share of the largest logit; what holds; and what stays, with the reason. The
difference is at most 1e-5, and at most a hundredth of how much a logit differs between images. Where the rounding of
float32 alone is larger, it is at most 1e-9 in double precision.

- reloads: a fresh net with the same surgery takes the weights and gives the same logits, to the bit.
- trains: a training step gives finite gradients.
- gradients: a training step gives the gradients of the masked net, up to 1e-5 of the largest. Where the rounding of
  float32 alone is larger, up to 1e-9 in double precision. Dropout draws one number for each image, the same in both.
- second round: half of the units that are left are removed, and the logits are again those of the masked net.
- ONNX: ONNX Runtime gives the logits of the fp32 file, up to 1e-4 of the largest. Where the rounding of float32 alone
  is larger, they differ from those in double precision at most twice as much as the net's own.
- int8: ONNX Runtime gives the logits of the file from post-training quantization, up to 0.25 of the largest, which
  project export accepts by default. If the difference is larger, because a net with random weights quantizes badly, it
  is at most twice that of the int8 file of the whole net.
- packed: the packed file gives the net back with the same weights and logits, to the bit.

A check that fails is **in bold**. One that the package refuses has the reason.
"""

import argparse
import json
import platform
import shlex
import signal
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from any_net_cells import Cell, judge
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from units_files import CHECKS, Shape, Thinned

from project.compression.thinning.units import look_at_units, units_of
from project.deployment.recipe import Recipe
from project.frame.paths import write_whole

PAGE = Path(__file__).resolve().parents[1] / "docs" / "unit_removal.md"
SECONDS = 100
"""After these seconds of processor time Torch-Pruning is stopped: it may loop, and its memory grows."""

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
    """One line of the table.

    Args:
        name: name of the net.
        macs, parameters: share of them that is left, from 0 to 1.
        theirs: what Torch-Pruning leaves, or how it fails.
        checks: what each check has told; the first compares the logits of the masked and of the thinned net.
        stays: reasons, by the name of the layer whose units stay.
        failure: why the net was not thinned.
        seconds: processor time of all this.
    """

    name: str
    macs: float = 1
    parameters: float = 1
    theirs: str = "not installed"
    checks: list[Cell] = field(default_factory=list)
    stays: dict[str, str] = field(default_factory=dict)
    failure: str = ""
    seconds: float = 0

    def line(self) -> str:
        """The row in Markdown."""
        if self.failure:
            return f"| {self.name} | fails: {self.failure} | {self.theirs} | | | |"
        law, *others = self.checks
        same = law.text if law.status == "works" else f"**{law.text}**"
        ours = f"{self.macs:.2f} ({self.parameters:.2f})"
        holds = ", ".join(map(word_of, others))
        return f"| {self.name} | {ours} | {self.theirs} | {same} | {holds} | {stays(self.stays)} |"

    def log(self) -> str:
        """The row and the numbers of its checks."""
        numbers = (
            f"\n    {CHECKS[cell.name]} {cell.status}: {cell.text} ({cell.seconds:.0f} s)" for cell in self.checks
        )
        peak = max((cell.peak_mb for cell in self.checks), default=0)
        return f"{self.line()}{''.join(numbers)}\n    {self.seconds:.0f} s of processor time, peak {peak:.0f} MB"


def word_of(cell: Cell) -> str:
    """A check on the page."""
    name = CHECKS[cell.name]
    refused = f"{name} refused: {cell.text.replace('|', '/')}"
    return {"works": name, "failed": f"**not {name}**", "refused": refused}[cell.status]


def stays(reasons: Mapping[str, str]) -> str:
    """What stays, in short: for each reason the number of layers, and the first."""
    layers = defaultdict(list)
    for layer, reason in reasons.items():
        if not reason.startswith("it gives the net's output"):
            layers[reason.split("(")[0].replace("|", "/").strip()].append(layer)
    most = sorted(layers.items(), key=lambda item: -len(item[1]))
    texts = [f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {why}" for why, names in most]
    return "; ".join(texts[:2]) + (f"; {len(texts) - 2} more reasons" if len(texts) > 2 else "")


def recipe_of(name: str) -> Recipe:
    """The description of a net."""
    if name in TORCHVISION:
        return Recipe(
            {"class_path": f"torchvision.models.{name}", "init_args": {"num_classes": 10, **TORCHVISION[name]}}
        )
    arguments = {"model_name": name, "num_classes": 10, **TIMM[name]}
    return Recipe({"class_path": "timm.create_model", "init_args": arguments})


def shape_of(name: str) -> Shape:
    """The shape (C, H, W) of an image."""
    return (3, 224, 224) if name in LARGE else (3, 64, 64)


def build(name: str) -> nn.Module:
    """A net with lively weights in eval mode."""
    torch.manual_seed(0)
    recipe = recipe_of(name)
    net = recipe.build(recipe.modules, device="cpu")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() <= 1 or (parameter == parameter.flatten()[0]).all():
                parameter.add_(0.2 + 0.3 * torch.rand(parameter.shape, generator=generator))
        last_layer(net).weight.normal_(0, 0.05, generator=generator)
    return net


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


def smallest_half(net: nn.Module, shape: Shape) -> dict[str, list[int]]:
    """For each group the outputs of the half of its units whose parameters have the smallest squares."""
    head = next(name for name, module in net.named_modules() if module is last_layer(net))
    removed: dict[str, list[int]] = {}
    for of in units_of(net, shape).values():
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
    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
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
        signal.setitimer(signal.ITIMER_PROF, 0)


def begin_process() -> None:
    """Settings of a process that looks at nets."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.backends.mha.set_fastpath_enabled(False)


def look(name: str, peer: bool = True) -> Row:
    """Thin a net, and check it.

    Args:
        name: one of the nets.
        peer: whether Torch-Pruning tries it, too.
    """
    row, start = Row(name), time.process_time()
    try:
        with tempfile.TemporaryDirectory() as folder:
            check(row, Path(folder))
    except Exception as error:
        row.failure = f"{type(error).__name__}: {error}".splitlines()[0][:150]
    if peer:
        row.theirs = torch_pruning(build(name), torch.randn(2, *shape_of(name)))
    row.seconds = time.process_time() - start
    return row


def check(row: Row, folder: Path) -> None:
    """Thin the net of a row, and fill in the row."""
    shape = shape_of(row.name)
    fresh, choose = partial(build, row.name), partial(smallest_half, shape=shape)
    work = Thinned(recipe_of(row.name), fresh, choose, shape, folder)
    images = work.images(2)
    row.stays = look_at_units(work.net, shape)[1]
    row.macs = macs(work.thinned, images) / macs(work.net, images)
    row.parameters = num_parameters(work.thinned) / num_parameters(work.net)
    row.checks = [judge(work, name) for name in CHECKS]


def kept_row(name: str, keep: Path | None) -> Row:
    """The row of a net, from its file in the folder ``keep`` if it is there; else it is made and kept."""
    file = keep and keep / f"{name}.json"
    if file and file.is_file():
        found = json.loads(file.read_text(encoding="utf-8"))
        return Row(**found | {"checks": [Cell(**cell) for cell in found["checks"]]})
    row = look(name)
    if file:
        write_whole(file, lambda part: part.write_text(json.dumps(asdict(row), indent=1), encoding="utf-8"))
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
    parser.add_argument("--keep", type=Path, help="a folder for the rows of single nets; those in it are not run again")
    parser.add_argument("--output", type=Path, default=PAGE, help="Markdown file to write")
    args = parser.parse_args()
    names = args.nets or [*TORCHVISION, *TIMM]
    if unknown := [name for name in names if name not in {*TORCHVISION, *TIMM}]:
        parser.error(f"nets has {unknown[0]}, which is none of: {', '.join([*TORCHVISION, *TIMM])}.")
    if args.workers < 1:
        parser.error(f"--workers is {args.workers}: give 1 or more.")
    rows, begin = [], time.monotonic()
    with ProcessPoolExecutor(args.workers, initializer=begin_process) as pool:
        for row in pool.map(partial(kept_row, keep=args.keep), names):
            rows.append(row)
            print(f"{time.monotonic() - begin:.0f} s", row.log(), flush=True)  # noqa: T201
    args.output.write_text(page(rows, shlex.join(["python", "scripts/units_of_nets.py", *args.nets])), encoding="utf-8")


if __name__ == "__main__":
    main()
