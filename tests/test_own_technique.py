"""A technique in a file outside the package, in a chain with the package's own; no file of the package knows it."""

import json

import pytest

from project.frame.paths import Run

TECHNIQUE = '''
import torch

from project.compression.after_fit import AfterFit
from project.compression.company import Company, check_company
from project.compression.report import Step, add_step_row
from project.frame.paths import write_whole
from project.learning.checkpoints import fresh_checkpoint, load_with_weights


class FewDigits(AfterFit):
    """Rounds each weight to a multiple of 1/64."""

    stages = ("smaller net", "few digits")
    company = Company(
        never={"few digits": "weights are rounded once: leave one out"},
        after={"pruning": "it rounds what pruning leaves: give it after"},
    )

    def setup(self, trainer, pl_module, stage):
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            check_company(trainer.callbacks, self)

    def after_fit(self, trainer, module, run, source):
        small, checkpoint = load_with_weights(module, source)
        for parameter in small.net.parameters():
            parameter.data = (parameter.data * 64).round() / 64
        write_whole(run.best_checkpoint, lambda part: torch.save(fresh_checkpoint(small, checkpoint), part))
        add_step_row(trainer, module, Step("few digits", run.best_checkpoint), latency=False)
'''
PRUNING = {
    "class_path": "project.callbacks.IterativeMagnitudePruning",
    "init_args": {
        "schedule": {"class_path": "project.compression.Sparsities", "init_args": {"levels": [0.5]}},
        "epochs_per_round": 1,
        "latency": False,
    },
}
OWN = {"class_path": "my_technique.FewDigits"}
PACKING = {"class_path": "project.callbacks.Packing"}


@pytest.fixture
def fit(command, digits, logs, tmp_path, monkeypatch):
    """``fit(callbacks)`` in a working directory that holds the technique."""
    (tmp_path / "my_technique.py").write_text(TECHNIQUE)
    monkeypatch.chdir(tmp_path)

    def run(callbacks):
        return command("fit", *digits, "--trainer.max_epochs=1", f"--trainer.callbacks={json.dumps(callbacks)}")

    return run


@pytest.mark.slow
def test_it_stands_between_pruning_and_packing(fit, logs):
    status, _, err = fit([PRUNING, OWN, PACKING])
    assert status == 0, err
    steps = [line.partition(",")[0] for line in Run.find(logs / "digits").report.read_text().splitlines()]
    assert steps[-2:] == ["few digits", "packed"]


@pytest.mark.parametrize(
    ("callbacks", "words"),
    [
        ([OWN, PRUNING], "FewDigits stands before IterativeMagnitudePruning, but it rounds what pruning leaves"),
        ([PACKING, OWN], "Packing stands before FewDigits, but it packs the net that the other makes"),
        ([OWN, OWN], "weights are rounded once"),
    ],
)
def test_the_order_is_refused_in_one_sentence(callbacks, words, fit):
    status, _, err = fit(callbacks)
    assert status == 2 and words in err and err.count("\n") == 1
