"""What all studies share: grids of ordinary runs with several seeds.

A study asks whether advice from the literature holds on small nets and data. Its runs are those of ``project tune``
with ``sampler: grid``: each point and each seed is one ordinary run in ``logs/studies``. So a study may be killed at
any time, and the same command continues it. Several machines that share the folder of logs share the runs.
"""

import argparse
import csv
import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from pages import DOCS, ROOT, Page, read_csv

from project.callbacks.places import run_of
from project.compression.report import accuracy
from project.frame.paths import Paths, Run, write_whole
from project.tuning.dimension import read_dimension


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


class Study(Page):
    """One study: its runs, and the page that they make."""

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


# -- runs -------------------------------------------------------------------------------------------------------------


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


# -- files ------------------------------------------------------------------------------------------------------------


def _read_trials(path: Path, keys: Sequence[str]) -> Iterable[Trained]:
    for row in sorted(read_csv(path), key=lambda row: int(row["trial"])):
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
