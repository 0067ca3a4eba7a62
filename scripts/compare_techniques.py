"""Every technique on one net: accuracy, multiply-accumulates, bytes, latency; one table and two pictures.

Each technique is its fragment of configs/compression, run by ``project fit`` as the fragment says: from the first epoch
on and for as long as the dense net, or on from the dense net's last checkpoint. ``project export`` packs each net and
makes the int8 file, and ``project benchmark --compare`` times all of a seed together, in interleaved rounds.

    python scripts/compare_techniques.py --config configs/fashion_mnist.yaml --seeds 0

What is finished is not run again: runs land in <logs>/techniques/<configuration>. Writes techniques.csv, techniques.md
and two pictures into the output folder. One thread is used, so that runs can be repeated and latencies compared.
"""

import argparse
import csv
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import yaml
from technique_report import TechniqueRow, draw_techniques, to_markdown

from project.compression.report import accuracy
from project.deployment.model_file import ModelFile
from project.deployment.table import write_csv
from project.frame.cli import CLI
from project.frame.environment import describe_environment
from project.frame.paths import Paths, Run
from project.learning.checkpoints import load_net

ROOT = Path(__file__).resolve().parent.parent
QUIET = "--trainer.callbacks.latency=false"
"""Reports of single runs need no clock."""
DENSE, INT8 = "dense", "int8"
NOTES = """![accuracy against bytes](techniques_bytes.png) ![accuracy against latency](techniques_latency.png)

Each row is a fragment of configs/compression, trained for the epochs in the table. The smallest file is `model.packed`,
and the ONNX file for int8. "Times smaller" is over the dense net's fp32 ONNX file. Multiply-accumulates are those that
run: zeros, shared values and signs are multiplied like any other number. Latencies are medians (5th to 95th percentile)
of interleaved rounds in torch (channels-last) or ONNX Runtime, whichever is faster. Speedups are over the dense net.
Pruned, shared, ternary and binary weights make the file smaller, not faster. XNOR-Net makes it smaller and slower: its
norms and signs take more time, and no engine here has a kernel that counts bits.
"""


@dataclass(frozen=True)
class Technique:
    """A fragment, what the fit starts from, and its options; ``{dense}`` and ``{all}`` are the numbers of epochs."""

    fragment: str
    start: str = "scratch"
    options: tuple[str, ...] = ("--trainer.max_epochs={dense}",)


ON = ("--trainer.max_epochs={all}",)
TECHNIQUES = {
    "weights pruned": Technique("pruning", options=("--trainer.max_epochs={dense}", QUIET)),
    "units pruned": Technique("unit_pruning", options=("--trainer.max_epochs={dense}", QUIET)),
    "weights shared": Technique("weight_sharing", DENSE, ("--trainer.max_epochs={dense}", QUIET)),
    INT8: Technique("int8", DENSE),
    "low rank": Technique("low_rank", DENSE, (*ON, "--trainer.callbacks.begin_epoch={dense}", QUIET)),
    "ternary": Technique("ternary"),
    "binary": Technique("binary"),
    "XNOR": Technique("xnor"),
    "Winograd": Technique("winograd", options=("--trainer.max_epochs={dense}", QUIET)),  # the dense net again
}


def run_verb(*arguments: str | Path) -> None:
    """The command line, in a process of its own."""
    done = subprocess.run([sys.executable, "-m", "project", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"project {' '.join(map(str, arguments))}\n{done.stderr.strip()[-2000:]}")


def fit(experiment: str, *arguments: str | Path) -> Run:
    """The finished run of an experiment, trained if it is not there."""
    runs = [Run(folder) for folder in sorted((Paths().logs / experiment).glob("version_*"))]
    finished = [run for run in runs if (run.folder / "finished").is_file()]
    if finished:
        return finished[-1]
    options = ("--trainer.experiment", experiment, "--trainer.test_after_fit=false", "--trainer.observe=false")
    run_verb("fit", *arguments, *options)
    run = Run.find(Paths().logs / experiment)
    (run.folder / "finished").touch()
    say(f"{experiment}: trained")
    return run


def train(config: Path, seed: int, dense: Run | None, finetune_epochs: int) -> dict[str, Run]:
    """The dense run of a seed and each technique's; of int8 the dense one, which holds the file."""
    base = ("--config", config, "--seed_everything", str(seed))
    place = f"techniques/{config.stem}"
    runs = {DENSE: dense or fit(f"{place}/dense_seed_{seed}", *base)}
    epochs = int(yaml.safe_load(config.read_text())["trainer"]["max_epochs"])
    for name, technique in TECHNIQUES.items():
        fragment = ROOT / f"configs/compression/{technique.fragment}.yaml"
        if not fragment.is_file():
            say(f"{name}: skipped, there is no {fragment.relative_to(ROOT)}")
            continue
        if name == INT8:
            runs[name] = runs[DENSE]
            export(runs[DENSE], "onnx-int8")
            continue
        options = [option.format(dense=epochs, all=epochs + finetune_epochs) for option in technique.options]
        if technique.start == DENSE:
            options += ["--ckpt_path", str(runs[DENSE].last_checkpoint)]
        runs[name] = fit(f"{place}/{technique.fragment}_seed_{seed}", *base, "--config", fragment, *options)
    for run in runs.values():
        export(run, "packed")
    return runs


def export(run: Run, format: str) -> None:
    if not run.model_file(format).is_file():
        run_verb("export", "--run", run.folder, "--format", format)


def benchmark(runs: dict[str, Run], rounds: int) -> list[dict[str, str]]:
    """The lines of the dense run's ``benchmark.csv``, measured anew where a run is not in it or a file is newer."""
    dense, others = runs[DENSE], [run for run in runs.values() if run != runs[DENSE]]
    path = dense.benchmark("csv")
    lines = read(path)
    known = all(any(is_of(line, run) for line in lines) for run in runs.values())
    newest = max(file.stat().st_mtime for run in runs.values() for file in run.model_files)
    if not known or path.stat().st_mtime < newest:
        compare = ["--compare", *(str(run.folder) for run in others)] if others else []
        engines = ("--engines", "eager", "onnxruntime", "--memory", "false")
        run_verb("benchmark", "--run", dense.folder, *compare, *engines, "--rounds", str(rounds), "--budget_s", "300")
        say(f"{dense.folder.parent.name}: {len(runs)} techniques measured")
        lines = read(path)
    return lines


def is_of(line: dict[str, str], run: Run) -> bool:
    """Whether a line is of a run, which it names by the last folders of its path."""
    return f"/{run.folder.resolve()}".endswith(f"/{line['run']}")


def read(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def row_of(name: str, seed: int, run: Run, lines: Sequence[dict[str, str]], val_accuracy: float) -> TechniqueRow:
    """What the benchmark says of a technique: of int8 its file, of the others the checkpoint's net on both engines."""
    own = [line for line in lines if is_of(line, run)]
    file = run.model_file("onnx-int8").name if name == INT8 else ""
    timed = [line for line in own if line["file"] == file and line["latency_ms_batch64"]]
    first, many = (min(timed, key=lambda line: float(line[f"latency_ms_batch{size}"])) for size in (1, 64))
    onnx = next(line for line in timed if line["engine"] == "onnxruntime")
    latencies: dict[str, Any] = {}
    for size, line in ((1, first), (64, many)):
        names = [f"latency_ms_batch{size}{part}" for part in ("", "_p05", "_p95")] + [f"speedup_batch{size}"]
        latencies |= {name: float(line[name]) for name in names}
    return TechniqueRow(
        technique=name,
        seed=seed,
        val_accuracy=val_accuracy,
        test_accuracy=float(many["test_accuracy"]),
        macs=int(many["macs"]),
        num_parameters=int(many["num_parameters"]),
        num_nonzero=int(many["num_nonzero"]),
        packed_bytes=None if file else run.model_file("packed").stat().st_size,
        onnx_bytes=int(onnx["file_bytes"]),
        engine=", ".join(dict.fromkeys([first["engine"], many["engine"]])),
        **latencies,
    )


def validate(name: str, run: Run) -> float:
    """Accuracy on the validation images, of the net or of the int8 file."""
    values = yaml.safe_load(run.config.read_text())
    cli = CLI({key: values[key] for key in ("model", "data")}, run=False)
    net = ModelFile(run.model_file("onnx-int8")).logits if name == INT8 else load_net(cli.model, run.best_or_last)
    cli.datamodule.prepare_data()
    found = accuracy(net, cli.datamodule, "val")
    assert found is not None
    return found


def say(text: str) -> None:
    print(text, flush=True)  # noqa: T201


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/fashion_mnist.yaml"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--dense", nargs="+", help="folders of dense runs, one a seed; without, they are trained")
    parser.add_argument("--finetune_epochs", type=int, default=5, help="of what goes on from the dense net")
    parser.add_argument("--rounds", type=int, default=50, help="timed calls of each engine and batch size")
    parser.add_argument("--output", type=Path, default=Path("docs"), help="an existing folder")
    args = parser.parse_args()
    command = shlex.join(["python", "scripts/compare_techniques.py", *sys.argv[1:]])
    if args.dense and len(args.dense) != len(args.seeds):
        parser.error(f"--dense names {len(args.dense)} runs, --seeds {len(args.seeds)}: give one for each.")
    os.environ["OMP_NUM_THREADS"] = "1"
    rows = []
    for number, seed in enumerate(args.seeds):
        dense = Run.find(args.dense[number], "dense") if args.dense else None
        runs = train(args.config, seed, dense, args.finetune_epochs)
        lines = benchmark(runs, args.rounds)
        rows += [row_of(name, seed, run, lines, validate(name, run)) for name, run in runs.items()]
    write(rows, command, args.config, args.finetune_epochs, args.output)


def write(rows: Sequence[TechniqueRow], command: str, config: Path, finetune_epochs: int, folder: Path) -> None:
    epochs = int(yaml.safe_load(config.read_text())["trainer"]["max_epochs"])
    on = {"weights shared": "dense, then 2 epochs", INT8: "dense, not trained"}
    trained = {DENSE: f"{epochs} epochs"} | {
        name: f"{epochs} epochs" if each.start != DENSE else on.get(name, f"dense, then {finetune_epochs} epochs")
        for name, each in TECHNIQUES.items()
    }
    machine = describe_environment()
    versions = ", ".join(f"{name} {machine['packages'][name]}" for name in ("torch", "onnxruntime"))
    text = f"""<!-- room: compression, deployment -->
# Techniques on one net

`{command}`, {date.today()}, {machine["cpu"]}, one thread, {versions}.

{to_markdown(rows, trained)}
{NOTES}"""
    write_csv(rows, TechniqueRow, folder / "techniques.csv")
    (folder / "techniques.md").write_text(text, encoding="utf-8")
    draw_techniques(rows, folder)


if __name__ == "__main__":
    main()
