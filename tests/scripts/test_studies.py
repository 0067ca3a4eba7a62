"""The studies: verdicts from numbers, grids that continue, the page and the index, two studies in miniature."""

import argparse
import importlib
import math
import os
import re
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import batch_norm
import bottlenecks
import evidence
import pages
import pytest
import search
import torch
import yaml
from evidence import Study, Trained, best_of, by, options
from helpers.small_data import write_small_data
from plain_nets import BlockNet, ConvThenLinear, PlainStack
from torch import nn
from verdicts import Claim, clearly, spread, verdict

from project.tuning.dimension import read_dimension

ROOT = Path(__file__).parents[2]
SCRIPTS = {path.stem for path in (ROOT / "scripts/studies").glob("*.py")} - {*pages.HELPERS}
STUDIES = sorted(SCRIPTS - {*pages.FURTHER})
NAN = math.nan


@pytest.mark.parametrize(
    ("larger", "smaller", "sign"),
    [
        ([3.0, 4.0, 5.0], [1.0, 2.0, 3.0], 1),
        ([1.0, 2.0, 3.0], [3.0, 4.0, 5.0], -1),
        ([1.0, 2.0, 3.0], [1.1, 1.9, 3.0], 0),
        ([1.0, 5.0], [1.0, 1.0], 0),  # 2 is the mean difference, and its standard error is 2
        ([2.0, 2.1, NAN], [1.0, 1.0, 1.0], 1),
        ([2.0], [1.0], 0),  # one seed decides nothing
        ([2.0, NAN], [1.0, 1.0], 0),
    ],
)
def test_a_difference_is_clear_beyond_two_standard_errors(larger, smaller, sign):
    assert clearly(larger, smaller) == sign


@pytest.mark.parametrize(
    ("signs", "answer"),
    [
        ([1, 1], "reproduced"),
        ([1, 0], "mixed"),
        ([1, -1], "mixed"),
        ([0, 0], "not reproduced"),
        ([-1], "not reproduced"),
        ([], "not reproduced"),
    ],
)
def test_a_verdict_needs_all_decisive_settings(signs, answer):
    assert verdict(signs) == answer


def test_runs_that_diverged_are_counted_and_not_averaged():
    assert spread([0.5, 0.7, NAN], 1, 100) == "60.0 ± 14.1 (1 of 3 diverged)"
    assert spread([NAN, NAN]) == "diverged"
    assert spread([2.0]) == "2.00"


def test_two_arms_are_apart_at_the_steps_where_their_logarithms_are():
    higher = [[10.0, 1.0], [11.0, 2.0], [12.0, 0.5]]
    lower = [[1.0, 1.0], [1.1, 0.5], [1.2, 2.0]]
    share, factor = batch_norm.separation(higher, lower)
    assert share == 0.5
    assert factor == pytest.approx(5.5, rel=0.01)


def test_the_arithmetic_of_block_3a_is_that_of_the_paper():
    """Szegedy et al. 2014, table 1: 159K parameters (163,328 weights) and 128M operations; 387,072 weights without."""
    study = Study("s", "S", options("", ["--seeds", "0", "1"]))
    bottlenecks.arithmetic(study)
    bottlenecks.shapes(study)
    assert [finding.answer for finding in study.findings] == ["reproduced", "reproduced"]
    assert "163,328 weights against 387,072 (2.37 times)" in study.findings[0].because
    assert "12.4 million multiply-accumulates against 120.4 million (9.68 times)" in study.findings[0].because
    assert "192 to 64" in study.findings[1].because


def test_equal_costs_are_equal():
    from project.metrics import count_macs, count_parameters

    net = bottlenecks.net_of(True, 1.0)
    for cost in (count_parameters, lambda net: count_macs(net, bottlenecks.SHAPE)):
        other = bottlenecks.net_of(False, bottlenecks.equal_width(cost, cost(net)))
        assert cost(other) == pytest.approx(cost(net), rel=0.04)


@pytest.mark.parametrize(
    "net",
    [
        PlainStack(10, (1, 28, 28), depth=5, width=8),
        PlainStack(10, (3, 16, 16), depth=2, width=4, activation=nn.Sigmoid),
        ConvThenLinear(10, (1, 28, 28), conv_dropout=0.1, fc_dropout=0.2),
        BlockNet(10, (1, 28, 28), bottleneck=True, width=0.5),
        BlockNet(10, (1, 28, 28), bottleneck=False, width=0.3),
    ],
)
def test_the_nets_of_studies_give_logits(net):
    shape = (3, 16, 16) if next(net.parameters()).shape[1] == 3 else (1, 28, 28)
    assert net.eval()(torch.randn(2, *shape)).shape == (2, 10)


def made_up(folder: Path, number: int) -> Study:
    study = Study(f"study_{number}", f"Study {number}", options("", ["--seeds", "0", "1", "--output", str(folder)]))
    study.find(Claim("water is wet", "Nobody 1900, sec. 1"), "reproduced", "it is\n   wet: 1.00")
    study.find(Claim("fire is cold", "Nobody 1900, sec. 2"), "not reproduced", "it is hot: 0.00")
    study.head("Numbers")
    study.say("A sentence.")
    study.show(["a", "b"], [["1", "2"]])
    study.table.append({"part": "p", "seed": 0, "test_accuracy": 0.987654321})
    study.write(lambda figure: figure.subplots().plot([1, 2]), "A line.")
    return study


def test_a_page_has_verdicts_picture_and_numbers_and_the_index_has_all_studies(tmp_path):
    for number in (2, 1, 2):  # one is written twice
        made_up(tmp_path, number)
    page = (tmp_path / "study_1.md").read_text()
    assert "| 1 | water is wet | **reproduced** | it is wet: 1.00 | Nobody 1900, sec. 1 |" in page
    assert "`python scripts/studies/study_1.py --seeds 0 1` made this page: 2 seeds (0, 1)" in page
    assert "![A line.](study_1.png)" in page and (tmp_path / "study_1.png").stat().st_size < 50_000
    assert (tmp_path / "study_1.csv").read_text() == "part,seed,test_accuracy\np,0,0.987654\n"
    index = (tmp_path / "README.md").read_text()
    assert index.count("| 2 | fire is cold | **not reproduced** | it is hot: 0.00 |") == 2
    assert index.index("[Study 1](study_1.md)") < index.index("[Study 2](study_2.md)")


def of(runs: list[Trained]) -> list[tuple[dict[str, Any], int, float]]:
    return [(dict(run.params), run.seed, run.measured()) for run in runs]


DIGITS = {
    "data": {"class_path": "project.data.Digits"},
    "model": {"net": {"class_path": "plain_nets.PlainStack", "init_args": {"depth": 2, "width": 4}}},
    "trainer": {"observe": False},
}


@pytest.mark.slow
def test_a_grid_has_every_point_and_seed_names_its_values_and_is_not_run_twice(tmp_path, monkeypatch):
    monkeypatch.setenv("PROJECT_LOGS_DIR", str(tmp_path))
    study = Study("s", "S", options("", ["--seeds", "0", "3", "--miniature", "--workers", "1"]))
    nets = {
        f"depth {depth}": {"class_path": "plain_nets.PlainStack", "init_args": {"depth": depth, "width": 4}}
        for depth in (2, 3)
    }
    space = {"model.net": nets, "model.optimizer.init_args.lr": [0.1, 1e9]}
    runs = study.grid("arm", DIGITS, space)
    assert sorted((run.params["model.net"], run.params["model.optimizer.init_args.lr"], run.seed) for run in runs) == [
        (f"depth {depth}", lr, seed) for depth in (2, 3) for lr in (0.1, 1e9) for seed in (0, 3)
    ]
    good = [run for run in runs if run.params["model.optimizer.init_args.lr"] == 0.1]
    assert all(0 <= run.measured() <= 1 and run.seconds > 0 and run.series("val/accuracy")[1] for run in good)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("it trains again"))
    assert str(of(study.grid("arm", DIGITS, space))) == str(of(runs))


STUDY = """
from evidence import Study, accuracies, by, options
from verdicts import Claim, clearly, spread, verdict

RATE = "model.optimizer.init_args.lr"
study = Study("tiny", "A tiny study", options("", None))
runs = study.grid("rates", {config!r}, {{RATE: [0.01, 0.1, 0.3]}})
groups = by(runs, RATE)
signs = [clearly(accuracies(groups[0.1,]), accuracies(groups[0.01,]))]
study.find(Claim("0.1 is better than 0.01", "nobody"), verdict(signs), spread(accuracies(groups[0.1,])))
study.show(["rate", "accuracy"], [[f"{{rate}}", spread(accuracies(each), 4)] for (rate,), each in groups.items()])
study.write(lambda figure: figure.subplots().plot([run.measured() for run in runs]), "Accuracies.")
"""


@pytest.mark.slow
def test_a_study_that_was_killed_ends_with_the_same_page(tmp_path):
    script = tmp_path / "tiny.py"
    script.write_text(STUDY.format(config=DIGITS))
    pages = []
    for kill in (False, True):
        logs, output = tmp_path / f"logs_{kill}", tmp_path / f"docs_{kill}"
        command = [sys.executable, str(script), "--miniature", "--seeds", "0", "1", "--output", str(output)]
        paths = os.pathsep.join([str(ROOT / "scripts/studies"), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PROJECT_LOGS_DIR": str(logs), "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
        if kill:
            process = subprocess.Popen(command, env=environment, start_new_session=True)
            while not list(logs.glob("studies/tiny/*/version_2/*")):
                assert process.poll() is None
                time.sleep(0.05)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            assert not output.exists()
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        pages.append(((output / "tiny.md").read_text(), (output / "tiny.png").read_bytes()))
    assert pages[0] == pages[1]


@pytest.fixture(scope="module")
def small_data(tmp_path_factory) -> Path:
    """As many training images as Fashion-MNIST has, so that a study's shares of them are batches."""
    root = tmp_path_factory.mktemp("data")
    write_small_data(root, 60_000, 100)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", ["batch_norm_savings", "regularization"])  # the others take minutes also in miniature
def test_a_study_writes_its_page(name, command, logs, small_data, tmp_path, monkeypatch):
    """A run of two steps stands for all points and seeds of a grid; of ``trainer`` each value has a run of its own."""

    def tune(study: Study, arm: str, base: dict[str, Any], options: dict[str, Any], workers: int = 1) -> list[Trained]:
        space, is_grid = options["space"], all(isinstance(values, list) for values in options["space"].values())
        if is_grid:
            change = {"space": {key: values if key == "trainer" else values[:1] for key, values in space.items()}}
        else:
            change = {"sampler": "random", "trials": 1}
        config = evidence._merged({"seed_everything": 0, **evidence._SHARED}, base)
        config = {**evidence._merged(config, evidence._MINIATURE), **options, **change}
        path = tmp_path / f"{arm}.yaml"
        path.write_text(yaml.safe_dump(config, sort_keys=False))
        status, _, err = command("tune", "--config", path, "--study", arm)
        assert status == 0, err
        runs = list(evidence._read_trials(logs / arm / "trials.csv", list(space)))
        if not is_grid:
            return runs
        labels = [[evidence._value(str(label)) for label in read_dimension(*each).choices] for each in space.items()]
        folders = {run.params.get("trainer"): run.folder for run in runs}
        points = [dict(zip(space, point, strict=True)) for point in product(*labels)]
        return [Trained(point, int(point["seed_everything"]), folders[point.get("trainer")]) for point in points]

    monkeypatch.setattr(Study, "tune", tune)
    monkeypatch.setenv("PROJECT_DATA_DIR", str(small_data))
    script = importlib.import_module(name)
    script.main(["--miniature", "--workers", "1", "--seeds", "0", "1", "--output", str(tmp_path / "docs")])
    page, kept = ((folder / f"{name}.md").read_text() for folder in (tmp_path / "docs", ROOT / "docs/studies"))
    assert re.findall(r"^## (.*)", page, re.MULTILINE) == re.findall(r"^## (.*)", kept, re.MULTILINE)
    claims = re.compile(r"^\| \d+ \| ([^|]*) \| \*\*", re.MULTILINE)
    assert claims.findall(page) == claims.findall(kept) and claims.findall(page)
    assert all((tmp_path / f"docs/{name}.{end}").is_file() for end in ("csv", "png"))


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_has_its_page_and_its_line_in_the_index(name):
    text = (ROOT / f"docs/studies/{name}.md").read_text(encoding="utf-8")
    index = (ROOT / "docs/studies/README.md").read_text(encoding="utf-8")
    assert f"`python scripts/studies/{name}.py` made this page" in text
    assert f"]({name}.md)" in index
    assert all((ROOT / f"docs/studies/{name}.{end}").is_file() for end in ("csv", "png"))


@pytest.mark.parametrize("name", pages.FURTHER)
def test_the_index_has_the_further_studies(name):
    index = (ROOT / "docs/studies/README.md").read_text(encoding="utf-8")
    assert f"](../{name}.md): `python scripts/studies/{name}.py`" in index
    assert f"python scripts/studies/{name}.py" in (ROOT / f"docs/{name}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--seeds", "0"], "--seeds is 0: give two or more different ones"),
        (["--seeds", "1", "1"], "--seeds is 1 1: give two or more different ones"),
        (["--workers", "0"], "--workers is 0: give 1 or more."),
    ],
)
def test_options_that_make_no_sense_are_refused_in_a_sentence(words, sentence, capsys):
    with pytest.raises(SystemExit):
        options("", words)
    assert sentence in capsys.readouterr().err


def trained(folder: Path, seed: int, rate: float, val_accuracy: float | None) -> Trained:
    if val_accuracy is None:
        return Trained({"rate": rate}, seed, None)
    folder = folder / f"{rate}_{seed}"
    folder.mkdir()
    (folder / "measured.json").write_text(f'{{"val_accuracy": {val_accuracy}, "test_accuracy": 0.5}}')
    return Trained({"rate": rate}, seed, folder)


def test_groups_keep_the_order_of_the_seeds_and_the_best_has_a_result_of_every_seed(tmp_path):
    found = {(0.1, 2): 0.6, (0.1, 0): 0.7, (0.2, 2): 0.99, (0.2, 0): None, (0.3, 2): 0.4, (0.3, 0): 0.8}
    groups = by([trained(tmp_path, seed, rate, value) for (rate, seed), value in found.items()], "rate")
    assert [run.seed for run in groups[0.1,]] == [2, 0]
    assert best_of(groups) == (0.1,)


def test_a_search_pays_for_each_epoch_and_chooses_the_best_trial(tmp_path):
    curves = [[0.5, 0.9], [], [0.95], [0.7, 0.99]]  # the second could not be trained, the third was stopped early
    trials = []
    for number, curve in enumerate(curves):
        folder = tmp_path / str(number)
        folder.mkdir()
        rows = "".join(f"{step},{value}\n" for step, value in enumerate(curve))
        (folder / "metrics.csv").write_text(f"step,val/accuracy\n{rows}")
        if number != 2:
            (folder / "measured.json").write_text(f'{{"test_accuracy": {number / 10}}}')
        trials.append(Trained({}, 0, folder if curve else None))
    assert search.best_so_far(trials, 5) == ([0.5, 0.9, 0.9, 0.95, 0.95], 0.0)
    assert search.best_so_far(trials, 8) == ([0.5, 0.9, 0.9, 0.95, 0.95, 0.99, 0.99, 0.99], 0.3)


def test_the_page_shows_the_options_that_changed_it():
    assert options("", []).changes == []
    words = ["--seeds", "3", "1", "--miniature"]
    assert options("", ["--workers", "1", *words]).changes == words


def test_options_have_seeds_of_the_study():
    assert options("", [], seeds=(1, 2)).seeds == [1, 2]
    assert isinstance(options("", []), argparse.Namespace) and options("", []).output == pages.DOCS
