"""What all studies share: grids of ordinary runs with several seeds, verdicts, the page with its table and picture.

A study asks whether advice from the literature holds on small nets and data. Its runs are those of ``project tune``
with ``sampler: grid``: each point and each seed is one ordinary run in ``logs/studies``. So a study may be killed at
any time, and the same command continues it. Several machines that share the folder of logs share the runs.

A page is made by code alone from the runs. It has no dates and no numbers that somebody typed.
"""

import argparse
import csv
import hashlib
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from project.callbacks.places import run_of
from project.compression.report import accuracy
from project.deployment.table import markdown_line
from project.frame.environment import cpu_abilities, cpu_model
from project.frame.paths import Paths, Run, write_whole
from project.frame.plots import figure_to_image
from project.tuning.dimension import read_dimension

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs/studies"
ROOMS = "tuning, compression, deployment"
"""Optional folders of the package that all studies need."""
Answer = Literal["reproduced", "mixed", "not reproduced"]
"""A verdict on a claim."""


class MeasureAtEnd(Callback):
    """Writes the accuracy of the last net on test and validation images into ``measured.json``.

    Of the validation images it takes the first five batches: a study that trains on few images leaves 57,000 of them.
    Studies choose by the validation accuracy, and report the test accuracy.
    """

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data, run = trainer.datamodule, run_of(trainer)  # type: ignore[attr-defined]
        if run is None:  # a trial run, which leaves no files
            return
        net: Any = pl_module.net
        was_training = net.training
        net.eval()
        with torch.no_grad():
            test, val = accuracy(net, data, "test"), accuracy(net, data, "val", limit_batches=5)
        net.train(was_training)
        measured = {"test_accuracy": test, "val_accuracy": val}
        write_whole(run.folder / "measured.json", lambda part: part.write_text(json.dumps(measured)))


@dataclass(frozen=True)
class Trained:
    """A run of a grid that has ended.

    Args:
        params: value of each searched key, by its dotted name. A class is named by its label.
        seed: seed of the run; any int.
        folder: folder of the run. ``None`` if the run could not be trained, such as one whose loss became NaN.
    """

    params: Mapping[str, Any]
    seed: int
    folder: Path | None

    @cached_property
    def rows(self) -> list[dict[str, str]]:
        """The rows of ``metrics.csv``."""
        if self.folder is None:
            return []
        with Run(self.folder).metrics.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def series(self, metric: str) -> tuple[list[int], list[float]]:
        """The steps and values of a logged metric, in their order. Both are empty if the run has none."""
        found = [(int(row["step"]), float(row[metric])) for row in self.rows if row.get(metric)]
        return [step for step, _ in found], [value for _, value in found]

    def last(self, metric: str) -> float:
        """The last value of a logged metric; NaN if the run has none."""
        return next(reversed(self.series(metric)[1]), math.nan)

    def measured(self, name: str = "test_accuracy") -> float:
        """A number that :class:`MeasureAtEnd` wrote; NaN for a run without result."""
        if self.folder is None:
            return math.nan
        return float(json.loads((self.folder / "measured.json").read_text())[name])

    def has(self, name: str) -> bool:
        """Whether the run's folder has a file of this name."""
        return self.folder is not None and (self.folder / name).is_file()

    @property
    def seconds(self) -> float:
        """The time of the training epochs in seconds, without validation; NaN for a run without result."""
        if self.folder is None:
            return math.nan
        return float(json.loads(Run(self.folder).summary.read_text())["train_seconds"])


@dataclass(frozen=True)
class Claim:
    """A sentence of advice.

    Args:
        text: the claim, as practitioners say it.
        source: paper and section.
    """

    text: str
    source: str


@dataclass(frozen=True)
class Finding:
    """A verdict on one claim.

    Args:
        claim: the claim.
        answer: the verdict.
        because: the numbers that decide it, as one or two sentences.
    """

    claim: Claim
    answer: Answer
    because: str


@dataclass
class Study:
    """One study: its runs, and the page that it writes.

    Args:
        name: name of the study, and of its files in the output folder.
        title: heading of the page.
        args: options of the command, as :func:`options` gives them.
        rooms: optional folders of the package that the study needs beside :data:`ROOMS`, separated by commas.
    """

    name: str
    title: str
    args: argparse.Namespace
    rooms: str = ""
    lines: list[str] = field(default_factory=list)
    """The page so far, without its head and its verdicts."""
    findings: list[Finding] = field(default_factory=list)
    table: list[dict[str, Any]] = field(default_factory=list)
    """The rows of the CSV file."""

    def grid(
        self, arm: str, base: Mapping[str, Any], space: Mapping[str, Sequence[Any] | Mapping[str, Any]]
    ) -> list[Trained]:
        """Train every point of a grid with every seed, unless it is trained already.

        Args:
            arm: name of this grid within the study.
            base: configuration of a run, as in YAML.
            space: values of each searched key, by its dotted name: a list, or a mapping that names its values.

        Returns:
            All runs, in the order of the grid. Their parameters are the values, or the names of named values.
        """
        plain = {key: [*values.values()] if isinstance(values, Mapping) else [*values] for key, values in space.items()}
        seeds = list(self.args.seeds)
        runs = self.tune(arm, base, {"space": {**plain, "seed_everything": seeds}, "sampler": "grid"})
        order = {}
        for key, values in space.items():
            labels = [_value(str(label)) for label in read_dimension(key, plain[key]).choices]
            order[key] = {label: number for number, label in enumerate(labels)}
            if isinstance(values, Mapping):
                names = dict(zip(labels, values, strict=True))
                runs = [replace(run, params={**run.params, key: names[run.params[key]]}) for run in runs]
                order[key] = {name: number for number, name in enumerate(values)}
        # a run that was killed has got a later number, so that the numbers are not the order of the grid
        runs.sort(key=lambda run: ([order[key][run.params[key]] for key in space], seeds.index(run.seed)))
        return runs

    def tune(
        self, arm: str, base: Mapping[str, Any], tuning: Mapping[str, Any], workers: int | None = None
    ) -> list[Trained]:
        """Run ``project tune``, or read its results if it has ended before.

        Args:
            arm: name of this search within the study.
            base: configuration of a run, as in YAML.
            tuning: options of the search, as in YAML: space, sampler, trials and others.
            workers: number of trials at the same time; ``None`` takes that of the command line. A sampler that learns
                from earlier trials repeats its points only with 1.

        Returns:
            All trials with a result, and those that could not be trained, in the order of their numbers.
        """
        config = _merged({"seed_everything": 0, **_SHARED}, base)
        if self.args.miniature:
            config = _merged(config, _MINIATURE)
        text = yaml.safe_dump({**config, **tuning}, sort_keys=False)
        study = f"studies/{self.name}/{arm}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        folder = Paths().logs / study
        if not (folder / "done").is_file():
            print(f"{self.name}: {arm}", flush=True)  # noqa: T201
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / "tune.yaml", lambda part: part.write_text(text, encoding="utf-8"))
            command = [sys.executable, "-m", "project", "tune", "--config", str(folder / "tune.yaml"), "--study", study]
            path = os.pathsep.join([str(Path(__file__).parent), str(ROOT), os.environ.get("PYTHONPATH", "")])
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
            with (folder / "log.txt").open("a") as log:
                command += ["--workers", str(workers or self.args.workers)]
                done = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
            if done.returncode:
                sys.exit(f"{arm} ended with status {done.returncode}: see {folder / 'log.txt'}.")
            (folder / "done").touch()
        return list(_read_trials(folder / "trials.csv", list(tuning["space"])))

    def record(self, part: str, groups: Mapping[str, Sequence[Trained]]) -> None:
        """Add runs to the rows of the CSV file.

        Args:
            part: name of the part of the study.
            groups: runs by the name of their setting.
        """
        for name, runs in groups.items():
            for run in runs:
                row = {"part": part, "setting": name, "seed": run.seed, "test_accuracy": run.measured()}
                self.table.append({**row, "train_seconds": run.seconds})

    def note(self, part: str, setting: str, values: Sequence[float]) -> None:
        """Add numbers to the rows of the CSV file.

        Args:
            part: name of the part of the study.
            setting: name of the setting.
            values: one number a seed.
        """
        for seed, value in zip(self.args.seeds, values, strict=True):
            self.table.append({"part": part, "setting": setting, "seed": seed, "value": value})

    def say(self, text: str) -> None:
        """Add a paragraph to the page."""
        self.lines += ["", *textwrap.wrap(" ".join(text.split()), width=120, break_long_words=False)]

    def head(self, text: str) -> None:
        """Add a heading of the second level to the page."""
        self.lines += ["", f"## {text}"]

    def show(self, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Add a table to the page."""
        self.lines += ["", markdown_line(columns), markdown_line(["---"] * len(columns)), *map(markdown_line, rows)]

    def find(self, claim: Claim, answer: Answer, because: str) -> None:
        """Add a verdict."""
        self.findings.append(Finding(claim, answer, " ".join(because.split())))

    def write(self, draw: Callable[[Any], None], caption: str, size: tuple[float, float] = (9.0, 4.0)) -> None:
        """Write the page, the picture, the CSV file and the index.

        Args:
            draw: function that draws into an empty figure of matplotlib.
            caption: one sentence below the picture.
            size: width and height of the picture in inches.
        """
        folder = self.args.output
        folder.mkdir(parents=True, exist_ok=True)
        _write_picture(draw, folder / f"{self.name}.png", size)
        columns = list(dict.fromkeys(key for row in self.table for key in row))
        _write_csv(folder / f"{self.name}.csv", columns, self.table)
        words = ["python", f"scripts/studies/{self.name}.py", *self.args.changes]
        cpu, version = f"{cpu_model() or 'unknown processor'} ({cpu_abilities()})", torch.__version__.partition("+")[0]
        seeds = f"{len(self.args.seeds)} seeds ({', '.join(map(str, self.args.seeds))})"
        about = (
            f"`{shlex.join(words)}` made this page: {seeds}, {cpu}, one thread for each run, torch {version}. ± is the"
            f" standard deviation over the seeds. The numbers are in [{self.name}.csv]({self.name}.csv)."
        )
        page = [f"<!-- room: {_joined(ROOMS, self.rooms)} -->", f"# {self.title}", "", *textwrap.wrap(about, width=120)]
        page += ["", "| | claim | verdict | because | source |", "|---|---|---|---|---|"]
        page += [
            markdown_line([str(number), each.claim.text, f"**{each.answer}**", each.because, each.claim.source])
            for number, each in enumerate(self.findings, 1)
        ]
        page += ["", f"![{caption}]({self.name}.png)", "", *textwrap.wrap(caption, width=120), *self.lines]
        write_whole(folder / f"{self.name}.md", lambda part: part.write_text("\n".join(page) + "\n", encoding="utf-8"))
        self._write_index(folder)

    def _write_index(self, folder: Path) -> None:
        """Write the verdicts of this study into ``verdicts.csv``, and all verdicts into ``README.md``."""
        path = folder / "verdicts.csv"
        rows = [row for row in _read_csv(path) if row["study"] != self.name]
        for number, each in enumerate(self.findings, 1):
            rows.append(
                {
                    "study": self.name,
                    "title": self.title,
                    "rooms": _joined(ROOMS, self.rooms),
                    "number": str(number),
                    "claim": each.claim.text,
                    "verdict": each.answer,
                    "because": each.because,
                }
            )
        rows.sort(key=lambda row: (row["study"], int(row["number"])))
        _write_csv(path, ["study", "title", "rooms", "number", "claim", "verdict", "because"], rows)
        page = [f"<!-- room: {ROOMS} -->", "# Studies", "", *textwrap.wrap(_INDEX, width=120)]
        for study in dict.fromkeys(row["study"] for row in rows):
            mine = [row for row in rows if row["study"] == study]
            page += [
                "",
                f"<!-- room: {mine[0]['rooms']} -->",
                f"## [{mine[0]['title']}]({study}.md)",
                "",
                "| | claim | verdict | because |",
                "|---|---|---|---|",
            ]
            page += [
                markdown_line([row["number"], row["claim"], f"**{row['verdict']}**", row["because"]]) for row in mine
            ]
            page.append("<!-- /room -->")
        scripts = {path.stem for path in Path(__file__).parent.glob("*.py")} - {*HELPERS, *FURTHER}
        if waiting := sorted(scripts - {row["study"] for row in rows}):
            page += ["", "## Without a page", "", "These studies were not run for a page yet:", ""]
            page += [f"- `python scripts/studies/{name}.py`" for name in waiting]
        page += ["", "## Further studies", "", "These have pages of their own kind:", ""]
        page += [
            f"- [{title}](../{name}.md): `python scripts/studies/{name}.py` <!-- room: {rooms} -->"
            for name, (title, rooms) in FURTHER.items()
        ]
        write_whole(folder / "README.md", lambda part: part.write_text("\n".join(page) + "\n", encoding="utf-8"))


HELPERS = ("evidence", "foreign_nets", "plain_nets")
"""Files beside the studies that are no studies."""
FURTHER = {
    "lottery_ticket": (
        "Lottery tickets: what to do after pruning, level by level",
        "compression/pruning, models/zoo",
    ),
    "quantization": (
        "Int8 beside ONNX Runtime's quantizer and NNCF",
        "deployment/int8, deployment/benchmark, compression/pruning, compression/distillation, compression/qat",
    ),
}
"""Studies whose pages people write: the name, which is that of the page, the title, and the rooms that it needs."""

_INDEX = """Each study is one command, and its page is made by its code alone. A claim is *reproduced* if what it says
holds in each setting that decides, *mixed* if it holds in some of them, else *not reproduced*. A difference holds if it
is in the claimed direction by more than two standard errors over the seeds; where a page has another rule, it says so.
All nets and data are small: a verdict is about these settings, and each page says what was scaled down."""

_SHARED: dict[str, Any] = {"trainer": {"callbacks": [{"class_path": "evidence.MeasureAtEnd"}]}}
"""The part of the configuration that is the same in all runs of all studies."""
_MINIATURE: dict[str, Any] = {"trainer": {"max_epochs": 1, "limit_train_batches": 2, "limit_val_batches": 1}}
"""Changes for a run of a few steps, which shows only that a study works."""


def options(
    description: str | None, arguments: Sequence[str] | None = None, seeds: Sequence[int] = (0, 1, 2)
) -> argparse.Namespace:
    """The options that all studies have.

    Args:
        description: help text of the command, the docstring of its module.
        arguments: words of the command line; ``None`` takes those of this process.
        seeds: seeds if the command line gives none.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(seeds), help="two or more seeds, one run each")
    parser.add_argument("--workers", type=int, default=2, help="runs at the same time, one thread each")
    parser.add_argument("--output", type=Path, default=DOCS, help="folder of the pages")
    parser.add_argument("--miniature", action="store_true", help="a few steps a run, to try the study itself")
    args = parser.parse_args(arguments)
    if len(set(args.seeds)) < max(len(args.seeds), 2):
        given = " ".join(map(str, args.seeds))
        parser.error(f"--seeds is {given}: give two or more different ones, because a verdict needs their spread.")
    if args.workers < 1:
        parser.error(f"--workers is {args.workers}: give 1 or more.")
    # the options that change the page, for the command that it shows
    args.changes = [] if args.seeds == list(seeds) else ["--seeds", *map(str, args.seeds)]
    args.changes += ["--miniature"] if args.miniature else []
    return args


# -- numbers ----------------------------------------------------------------------------------------------------------


def spread(values: Sequence[float], digits: int = 2, factor: float = 1.0) -> str:
    """Mean ± standard deviation as text; runs without a number are counted beside it.

    Args:
        values: one number a seed; NaN for a run without result.
        digits: number of digits after the point, 0 or more.
        factor: factor on all values, such as 100 for percent.
    """
    known = [factor * value for value in values if not math.isnan(value)]
    lost = len(values) - len(known)
    if not known:
        return "diverged"
    text = f"{statistics.fmean(known):.{digits}f}"
    text += f" ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{text} ({lost} of {len(values)} diverged)" if lost else text


def mean(values: Sequence[float]) -> float:
    """The mean of the numbers that are not NaN; NaN if there are none."""
    known = [value for value in values if not math.isnan(value)]
    return statistics.fmean(known) if known else math.nan


def clearly(larger: Sequence[float], smaller: Sequence[float]) -> int:
    """Whether the numbers of one arm are larger than those of another, seed by seed.

    Args:
        larger, smaller: one number a seed, in the same order of seeds.

    Returns:
        1 if the mean difference is above two of its standard errors, -1 if it is below minus two, else 0.
    """
    differences = [a - b for a, b in zip(larger, smaller, strict=True) if not math.isnan(a - b)]
    if len(differences) < 2:
        return 0
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    centre = statistics.fmean(differences)
    return (centre > 2 * error) - (centre < -2 * error)


def verdict(signs: Sequence[int]) -> Answer:
    """The verdict from the signs of all decisive settings: all, some or none of them are 1."""
    if signs and all(sign == 1 for sign in signs):
        return "reproduced"
    return "mixed" if any(sign == 1 for sign in signs) else "not reproduced"


def accuracies(runs: Iterable[Trained]) -> list[float]:
    """The test accuracy of each run, 0 to 1; NaN for a run without result."""
    return [run.measured() for run in runs]


def best_of(groups: Mapping[Any, Sequence[Trained]]) -> Any:
    """The key of the group with the best mean validation accuracy, of those in which every run has a result."""

    def score(key: Any) -> float:
        values = [run.measured("val_accuracy") for run in groups[key]]
        return 0.0 if any(map(math.isnan, values)) else statistics.fmean(values)

    return max(groups, key=score)


def by(runs: Iterable[Trained], *keys: str) -> dict[tuple[Any, ...], list[Trained]]:
    """The runs of a grid in groups with equal values of some keys; each group has one run a seed, in their order."""
    groups: dict[tuple[Any, ...], list[Trained]] = {}
    for run in runs:
        groups.setdefault(tuple(run.params.get(key) for key in keys), []).append(run)
    return groups


# -- pictures ---------------------------------------------------------------------------------------------------------


def draw_seeds(axes: "Axes", x: Sequence[float], rows: Sequence[Sequence[float]], label: str, color: str) -> None:
    """Draw one faint line a seed, and their mean as a strong line.

    Args:
        axes: axes of matplotlib.
        x: positions of the points.
        rows: one row of values a seed.
        label: text of the legend.
        color: a colour of matplotlib, such as ``C0``.
    """
    for row in rows:
        axes.plot(x, row, color=color, linewidth=0.6, alpha=0.35)
    means = [mean(column) for column in zip(*rows, strict=True)]
    axes.plot(x, means, color=color, linewidth=1.6, label=label)


def _write_picture(draw: Callable[[Any], None], path: Path, size: tuple[float, float]) -> None:
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=size, layout="constrained")
    draw(figure)
    dpi = min(110, int(1200 / size[0]))  # as wide as a page shows it
    image = Image.fromarray(figure_to_image(figure, dpi=dpi)).quantize(64)  # a small file
    write_whole(path, lambda part: image.save(part, format="PNG", optimize=True))


# -- files ------------------------------------------------------------------------------------------------------------


def _read_trials(path: Path, keys: Sequence[str]) -> Iterable[Trained]:
    for row in sorted(_read_csv(path), key=lambda row: int(row["trial"])):
        if row["state"] not in ("complete", "pruned"):
            continue
        runs = yaml.safe_load(row["runs"]) if row["runs"] else []
        folder = Path(runs[0]) if runs and not row["error"] else None
        yield Trained({key: _value(row[key]) for key in keys}, int(row.get("seed_everything") or 0), folder)


def _value(text: str) -> Any:
    """The value of a cell: a number if it is one, else the text, with the last part of a class's name."""
    try:
        return float(text) if "." in text or "e" in text else int(text)
    except ValueError:
        return text.rpartition(".")[2] if text.replace(".", "").replace("_", "").isalnum() else text


def _merged(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a configuration with changes. Mappings are merged, lists under ``callbacks`` are joined."""
    merged = dict(base)
    for key, value in change.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = _merged(merged[key], value)
        elif key == "callbacks" and isinstance(merged.get(key), list):
            merged[key] = [*merged[key], *value]
        else:
            merged[key] = value
    return merged


def _joined(*names: str) -> str:
    return ", ".join(filter(None, names))


def _read_csv(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    def write(part: Path) -> None:
        with part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            for row in rows:
                writer.writerow({key: f"{v:.6g}" if isinstance(v, float) else v for key, v in row.items()})

    write_whole(path, write)
