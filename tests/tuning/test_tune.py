"""``project tune`` as a user types it, on small runs: what it leaves, goes on with, reproduces and refuses."""

import csv
import os
import signal
import warnings
from pathlib import Path

import optuna
import pytest
import yaml
from lightning.pytorch import Callback
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from project.frame.paths import Run
from project.frame.rooms import needed
from project.tuning.plan import Plan
from project.tuning.study import tune

needed("models.zoo.lenet", "LeNet300100")  # the net of these studies, which trains in a moment
ROOT = Path(__file__).resolve().parents[2]
LR = "model.optimizer.init_args.lr"
DEGREES = "data.init_args.augment.0.init_args.degrees"
TINY = {
    "model": {"net": "project.models.LeNet300100"},
    "data": {"init_args": {"batch_size": 128}},
    "trainer": {"max_epochs": 1, "observe": False, "callbacks": ["project.callbacks.HParams"]},
}

BREAKS = """
from lightning.pytorch import Callback

class Break(Callback):
    def on_train_start(self, trainer, module):
        if not trainer.fast_dev_run:
            raise KeyError("a bug of mine")
"""


@pytest.fixture
def fragment(tmp_path, logs):
    """``fragment({…})`` -> options of a tiny study ``s`` with this search."""

    def write(search: dict) -> list[str]:
        file = tmp_path / "search.yaml"
        file.write_text(yaml.safe_dump({**TINY, **search}))
        return ["--config", str(ROOT / "configs/digits.yaml"), "--config", str(file), "--study", "s"]

    return write


def metrics(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        rows = [
            {key: value for key, value in row.items() if not key.startswith("test/")} for row in csv.DictReader(file)
        ]
    return [row for row in rows if row.get("val/loss") or row.get("train/loss")]


def hparams(run: Path) -> dict[str, float]:
    """What TensorBoard's HParams tab shows of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    events = EventAccumulator(str(run))
    events.Reload()
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    values = HParamsPluginData.FromString(content).session_start_info.hparams
    return {name: value.number_value for name, value in values.items()}


@pytest.mark.slow
def test_a_study_goes_on_and_its_best_run_is_repeated_to_the_digit(command, fragment, logs):
    space = {LR: {"log_uniform": [0.01, 0.5]}, DEGREES: {"uniform": [0, 20]}}
    options = fragment({"space": space, "sampler": "random", "search_seed": 3})
    status, out, err = command("tune", *options, "--trials", "2")
    assert status == 0, err
    assert "study s: 0 of 2 trials done" in out and "2/2 trial 1" in out
    status, out, err = command("tune", *options, "--trials", "3", "--data.batch_size", "64")
    assert status == 2 and "another base.data.init_args.batch_size" in err
    status, out, err = command("tune", *options, "--trials", "3")
    assert status == 0, err
    assert "study s: 2 of 3 trials done" in out and "3/3" in out and "1/3" not in out
    folder = logs / "s"
    with (folder / "trials.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({row[LR] for row in rows}) == 3
    assert all((folder / name).is_file() for name in ("history.png", "slices.png", "parallel.png"))

    scores = [float(row["val/accuracy"]) for row in rows]
    best = scores.index(max(scores))
    status, _, err = command("fit", "--config", str(folder / "best.yaml"))
    assert status == 0, err
    assert metrics(Run.find(logs / "best").folder) == metrics(folder / f"version_{best}")
    last = folder / "version_2"  # after others in the same process
    assert command("fit", "--config", str(last / "config.yaml"), "--trainer.experiment", "alone")[0] == 0
    assert metrics(Run.find(logs / "alone").folder) == metrics(last)
    assert hparams(last)[DEGREES] == float(rows[2][DEGREES])


def test_a_point_that_cannot_be_trained_counts_as_the_worst(command, fragment, logs):
    rates = {"choices": [0.1, 1.0e30], "when": {"data.init_args.batch_size": 128}}
    search = {"space": {"data.init_args.batch_size": [128, 5000], LR: rates}, "sampler": "grid"}
    status, out, err = command("tune", *fragment(search))
    assert status == 0, err
    assert "batch_size is 5000" in out and "3 of 3 trials done" in out
    with (logs / "s" / "trials.csv").open(newline="") as file:
        states = {(row["data.init_args.batch_size"], row[LR]): row["state"] for row in csv.DictReader(file)}
    assert states == {("128", "0.1"): "complete", ("128", "1e+30"): "pruned", ("5000", ""): "pruned"}


def test_a_trial_without_a_validation_or_with_a_nan_counts_as_not_trained(command, fragment, logs):
    rates = {"choices": [0.1, 1.0e30], "when": {"trainer.max_epochs": 2}}
    search = {"space": {"trainer.max_epochs": [2, 1], LR: rates}, "sampler": "grid", "objective": "val/loss"}
    more = ["--trainer.check_val_every_n_epoch=2", "--trainer.limit_train_batches=1", "--trainer.callbacks=[]"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Encountered `nan` values")
        status, out, err = command("tune", *fragment(search), *more)
    assert status == 0, err
    assert "val/loss is missing, so the trial has no result" in out and "3 of 3 trials done" in out
    with (logs / "s" / "trials.csv").open(newline="") as file:
        states = {(row["trainer.max_epochs"], row[LR]): row["state"] for row in csv.DictReader(file)}
    assert states == {("2", "0.1"): "complete", ("2", "1e+30"): "pruned", ("1", ""): "pruned"}


@pytest.mark.slow
def test_workers_that_end_with_an_error_end_the_command_with_one(command, fragment, logs, monkeypatch, tmp_path):
    (tmp_path / "own_break.py").write_text(BREAKS)
    monkeypatch.chdir(tmp_path)
    search = {"space": {LR: [0.1, 0.2]}, "sampler": "grid"}
    options = ["--workers=2", "--trainer.callbacks+=own_break.Break", "--trainer.fast_dev_run=false"]
    status, _, _ = command("tune", *fragment(search), *options)
    assert status == 2


@pytest.mark.slow
def test_two_objectives_and_two_seeds_make_a_front(command, fragment, logs):
    search = {
        "space": {"model.net": ["project.models.LeNet300100", "project.models.SmallInception"]},
        "objective": ["val/accuracy", "macs"],
        "sampler": "grid",
        "seeds": 2,
    }
    status, _, err = command("tune", *fragment(search))
    assert status == 0, err
    assert len(list((logs / "s").glob("version_*"))) == 4
    with (logs / "s" / "trials.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[0]["macs"]) == 64 * 300 + 300 * 100 + 100 * 10
    for row in rows:
        by_seed = yaml.safe_load(row["by_seed"])
        assert float(row["val/accuracy"]) == pytest.approx(sum(values[0] for values in by_seed) / 2)
    assert (logs / "s" / "front.png").is_file()
    assert (logs / "s" / "front_0.yaml").is_file()


@pytest.mark.slow
def test_the_pruner_ends_a_hopeless_run_like_a_finished_one(command, fragment, logs):
    search = {"space": {LR: [0.2] * 6 + [1.0e-7] * 2}, "sampler": "grid", "pruner": "median"}
    search["trainer"] = {**TINY["trainer"], "max_epochs": 4, "limit_train_batches": 3}
    status, _, err = command("tune", *fragment(search))
    assert status == 0, err
    with (logs / "s" / "trials.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    pruned = [row for row in rows if row["state"] == "pruned"]
    assert pruned and all(row[LR].startswith("1e-07") for row in pruned)
    run = Run(Path(yaml.safe_load(pruned[0]["runs"])[0]))
    assert len(metrics(run.folder)) < 8 and run.summary.is_file() and run.last_checkpoint.is_file()


MISTAKES = {
    "unknown key": ({"space": {"model.optimizer.init_args.momentm": [0.9]}}, [], "momentum"),
    "argument that a searched class lacks": (
        {"space": {"model.optimizer": ["torch.optim.Adam"], "model.optimizer.init_args.momentum": [0.9]}},
        [],
        "momentum",
    ),
    "value of a wrong type": ({"space": {"data.init_args.batch_size": ["many"]}}, [], "batch_size"),
    "metric that no run logs": ({"space": {LR: [0.1]}}, ["--objective", "val/acurracy"], "val/accuracy"),
    "database that is not there": ({"space": {LR: [0.1]}}, ["--storage", "sqlite:////nowhere/x.db"], "unable to open"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_one_sentence_before_the_first_trial(name, command, fragment, logs):
    search, options, expected = MISTAKES[name]
    status, out, err = command("tune", *fragment(search), *options)
    lines = err.strip().splitlines()
    assert status == 2, out
    assert len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) < 400, err
    assert expected in lines[0]
    assert not list(logs.glob("*/version_*"))


PLAN = {
    "base": {"trainer": {"max_epochs": 3, "devices": "auto", "num_nodes": 1, "logs_dir": None}},
    "spec": {LR: [0.1]},
    "objectives": ("val/accuracy",),
    "sampler": "tpe",
    "pruner": "none",
    "trials": None,
    "seeds": 1,
    "baseline": False,
    "study": "s",
    "storage": "",
    "search_seed": 0,
    "heartbeat_s": 1,
    "deadline": None,
}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"objectives": ("test/accuracy",)}, "choose by val/"),
        ({"objectives": ("val/accuracy", "macs"), "pruner": "median"}, "pruner none"),
        ({"objectives": ("val/accuracy", "macs"), "sampler": "cma-es"}, "cma-es"),
        ({"objectives": ("macs",), "pruner": "median"}, "objective of each epoch"),
        ({"objectives": ("macs", "macs")}, "each once"),
        ({"trials": 0}, "trials is 0"),
        ({"baseline": True, "sampler": "grid"}, "a grid has its own points"),
        ({"seeds": 0}, "seeds is 0"),
        ({"heartbeat_s": 0}, "heartbeat_s is 0"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(change, expected):
    Plan(**PLAN)
    with pytest.raises(ValueError, match=expected):
        Plan(**PLAN | change)


@pytest.mark.parametrize(
    ("devices", "workers", "expected"), [(2, 1, "set it to 1, and --workers"), ("auto", 0, "workers is 0")]
)
def test_processes_that_make_no_sense_are_refused(devices, workers, expected):
    base = {"trainer": {**PLAN["base"]["trainer"], "devices": devices}}
    with pytest.raises(ValueError, match=expected):
        tune(base, PLAN["spec"], study="s", workers=workers)


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_restart_draws_no_point_twice_and_workers_do_not_change_random_points(sampler):
    """Each trial's sampler has a seed of its own."""
    plan = Plan(**PLAN | {"spec": {"a": {"uniform": [0, 1]}, "b": {"int": [1, 9]}}, "sampler": sampler})

    def points(order):
        study = optuna.create_study(sampler=plan.make_sampler())
        drawn = {}
        for ticket in order:
            study.sampler = plan.make_sampler() if ticket % 2 else study.sampler  # a new process
            study.enqueue_trial({}, user_attrs={"ticket": ticket})
            trial = study.ask()
            drawn[ticket] = tuple(plan.space.suggest(trial).values())
            study.tell(trial, drawn[ticket][0])
        return drawn

    first, other = points(range(14)), points([3, 1, 0, 2])
    assert len(set(first.values())) == 14
    assert {ticket: first[ticket] for ticket in other} == other


@pytest.mark.slow
def test_a_trial_whose_process_has_died_is_given_on_with_its_values(command, fragment, logs):
    """A heartbeat that stops is noticed in the journal, and the ticket comes back with the same point."""
    search = {"space": {LR: {"log_uniform": [0.01, 0.5]}}, "trainer": {"max_epochs": 1, "limit_train_batches": 1}}
    options = [*fragment(search), "--heartbeat_s", "1"]
    assert command("tune", *options, "--trials", "1")[0] == 0
    storage = JournalStorage(JournalFileBackend(str(logs / "s" / "study.journal")))
    study = optuna.load_study(study_name="s", storage=storage)
    study.enqueue_trial({LR: 0.123}, user_attrs={"ticket": 1})
    study.ask().suggest_float(LR, 0.01, 0.5, log=True)  # and no more is heard of it
    status, out, err = command("tune", *options, "--trials", "2")
    assert status == 0, err
    assert "1 of 2 trials done, 1 running" in out and "2 of 2 trials done" in out
    assert [(trial.state.name, trial.params.get(LR)) for trial in study.trials[1:]] == [
        ("FAIL", 0.123),
        ("COMPLETE", 0.123),
    ]


class SignalOnce(Callback):
    """Sends this process a signal in the second batch of its first fit; the classes of callbacks are configured."""

    number = signal.SIGINT
    sent = False

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 1 and not trainer.fast_dev_run and not SignalOnce.sent:
            SignalOnce.sent = True
            os.kill(os.getpid(), SignalOnce.number)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_search_that_is_stopped_ends_with_the_signals_status_and_goes_on(
    number, status, command, fragment, logs, monkeypatch
):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores Ctrl-C
    monkeypatch.setattr(SignalOnce, "number", number)
    monkeypatch.setattr(SignalOnce, "sent", False)
    callbacks = {"trainer": {**TINY["trainer"], "callbacks": [f"{__name__}.SignalOnce"]}}
    options = fragment({"space": {LR: [0.1, 0.2]}, "sampler": "grid", **callbacks})
    try:
        got, out, err = command("tune", *options)
        assert (got, err) == (status, ""), err
        assert "the same command continues study s" in out
        got, out, err = command("tune", *options)
    finally:
        signal.signal(signal.SIGINT, before)
    assert got == 0, err
    assert "2 of 2 trials done" in out
