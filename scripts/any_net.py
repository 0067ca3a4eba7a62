"""Nets of torchvision and timm through every technique: what works, with its numbers, and what is refused, and why.

Each net is named in a configuration, as a user names it, and trained on scikit-learn's digits in colour. Each technique
then starts from this one fit. A cell works if its law holds: the thinned net computes what the masked one did, a packed
file holds the exact weights, a file gives the net's logits, a resumed run has the same bits as one without a stop. A
cell is refused if the program says in one sentence, before the first step, which layer or net it cannot do and what to
do instead. Anything else is a failure, and the command then ends with status 1.

    python scripts/any_net.py

Each net has a process of its own. It first trains and exports a small net, so that most libraries are loaded, and at
the end again, so that the last run is this one. The memory that the process holds is compared between the two. Both are
the resident memory after garbage collection, when the C library has given free pages back (``malloc_trim``). One thread
is used.
"""

import argparse
import ctypes
import gc
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from any_net_cells import CELLS, SETTINGS, Cell, Work, run_cell
from any_net_page import Row, to_markdown

ROOT = Path(__file__).resolve().parents[1]


def torchvision(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": f"torchvision.models.{name}", "init_args": arguments}


def timm(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": "timm.create_model", "init_args": {"model_name": name, **arguments}}


VIT = {"image_size": 32, "patch_size": 4, "num_layers": 3, "num_heads": 4, "hidden_dim": 48, "mlp_dim": 96}
STAGES = [(16, 32, 1), (32, 64, 1), (64, 96, 2), (96, None, 1)]
CONVNEXT = [dict(zip(("input_channels", "out_channels", "num_layers"), stage, strict=True)) for stage in STAGES]
BLOCK = "torchvision.models.convnext.CNBlockConfig"
NETS: dict[str, dict[str, Any]] = {
    "resnet18": torchvision("resnet18"),
    "googlenet": torchvision("googlenet", aux_logits=False, init_weights=False),
    "inception_v3": torchvision("inception_v3", aux_logits=False, init_weights=False),
    "densenet121": torchvision("DenseNet", growth_rate=8, block_config=[6, 12, 24, 16], num_init_features=16),
    "mobilenet_v2": torchvision("mobilenet_v2", width_mult=0.5),
    "mobilenet_v3_small": torchvision("mobilenet_v3_small", width_mult=0.5, norm_layer="torch.nn.BatchNorm2d"),
    "efficientnet_b0": torchvision("efficientnet_b0", stochastic_depth_prob=0.0),
    "shufflenet_v2_x0_5": torchvision("shufflenet_v2_x0_5"),
    "squeezenet1_1": torchvision("squeezenet1_1"),
    "regnet_y_400mf": torchvision("regnet_y_400mf"),
    "convnext (4 stages)": torchvision(
        "ConvNeXt", block_setting=[{"class_path": BLOCK, "init_args": stage} for stage in CONVNEXT]
    ),
    "vit (3 layers)": torchvision("VisionTransformer", **VIT),
    "tf_efficientnet_lite0": timm("tf_efficientnet_lite0"),
    "resnetv2_50x1_bit": timm("resnetv2_50x1_bit", channels=[128, 128, 256, 256]),
    "test_nfnet": timm("test_nfnet"),
    "ghostnet_050": timm("ghostnet_050"),
}
"""The nets, as ``model.net`` of a configuration has them; two with the arguments of the fragments in configs/nets."""
LARGE = ("inception_v3",)
WARM_UP = {"class_path": "project.models.SmallInception", "init_args": {"width": 0.25, "stem": [16], "stages": [[32]]}}

EPOCHS = SETTINGS["trainer"]["max_epochs"]


WARMING = ("fit", "onnx", "pt2", "units", "four_bits")
"""The cells that a small net goes through first. They load all libraries."""


def resident_mb() -> float:
    """The memory of this process after garbage collection, when the C library has given free pages back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def run_small_net(cells: Sequence[str], folder: Path) -> None:
    """Train and export a small net, so that most libraries are loaded, and nothing else is kept than this net."""
    folder.mkdir()
    work = Work("small", WARM_UP, folder, batches=1, epochs=1)
    for cell in WARMING:
        if cell in cells:
            run_cell(work, cell)


def run_net(name: str, cells: Sequence[str], folder: Path, batches: int, epochs: int) -> None:
    """Run the cells of one net, and print a line of JSON for each, and one for the memory."""
    for logger in ("lightning.pytorch", "lightning.fabric", "project"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    run_small_net(cells, folder / "first")
    before = resident_mb()
    work = Work(name, NETS[name], folder, batches, epochs, large=name in LARGE)
    for cell in cells:
        say({"begin": cell})
        say(asdict(run_cell(work, cell)))
    parameters = sum(parameter.numel() for parameter in work.model.net.parameters())
    shape = work.data.image_shape
    del work
    run_small_net(cells, folder / "last")  # jsonargparse keeps the last run
    say({"parameters": parameters, "shape": shape, "before_mb": before, "after_mb": resident_mb()})


def say(line: Any) -> None:
    text = line if isinstance(line, str) else f"{MARK}{json.dumps(line)}"
    print(text, flush=True)  # noqa: T201


MARK = "any_net: "


def row_of(name: str, cells: Sequence[str], options: Sequence[str]) -> Row:
    """Run a net in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PROJECT_LOGS_DIR": f"{folder}/logs"}
        command = [sys.executable, __file__, "--nets", name, "--cells", *cells, "--within", folder, *options]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = [json.loads(line.removeprefix(MARK)) for line in done.stdout.splitlines() if line.startswith(MARK)]
    row = Row(name, [Cell(**line) for line in lines if "status" in line])
    if lines and "before_mb" in lines[-1]:
        vars(row).update(lines[-1])
    else:
        begun = next((line["begin"] for line in reversed(lines) if "begin" in line), cells[0])
        last = next(iter(done.stderr.strip().splitlines()[-1:]), "")
        how = "it took too long" if done.returncode == -signal.SIGPROF else f"exit status {done.returncode}, {last}"
        row.cells = [cell for cell in row.cells if cell.name != begun] + [Cell(begun, "failed", f"it ended: {how}")]
    if any(row.failures):
        say(done.stderr.strip())
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS), metavar="NET")
    parser.add_argument(
        "--cells", nargs="+", choices=CELLS, default=list(CELLS), metavar="CELL", help="fit is the first"
    )
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of the fit")
    parser.add_argument("--batches", type=int, default=10, help="in an epoch of a technique")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/any_net.md", help="the page")
    parser.add_argument(
        "--keep", type=Path, help="a folder for the results of single nets; those in it are not run again"
    )
    parser.add_argument("--within", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    cells = ["fit", *(cell for cell in CELLS if cell in args.cells and cell != "fit")]
    if args.within:
        run_net(args.nets[0], cells, args.within, args.batches, args.epochs)
        return
    rows, start = [], time.perf_counter()
    for name in args.nets:
        kept = args.keep and args.keep / f"{name}.json"
        if kept and kept.is_file():
            found = json.loads(kept.read_text(encoding="utf-8"))
            rows.append(Row(**found | {"cells": [Cell(**cell) for cell in found["cells"]]}))
            continue
        rows.append(row_of(name, cells, [f"--epochs={args.epochs}", f"--batches={args.batches}"]))
        if kept:
            args.keep.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(asdict(rows[-1]), indent=1), encoding="utf-8")
        say(f"{time.perf_counter() - start:5.0f} s  {name}: {', '.join(cell.status for cell in rows[-1].cells)}")
    words = ["python", "scripts/any_net.py"]  # without the places of files
    for option in ("nets", "cells", "epochs", "batches"):
        value = getattr(args, option)
        if value != parser.get_default(option):
            words += [f"--{option}", *map(str, value if isinstance(value, list) else [value])]
    command = shlex.join(words)
    args.output.write_text(to_markdown(rows, cells, command), encoding="utf-8")
    failures = [failure for row in rows for failure in row.failures]
    say("\n".join(failures) or f"no failure: {args.output}")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
