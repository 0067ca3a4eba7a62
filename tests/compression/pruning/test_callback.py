"""The course of a pruning run: what is zero when, what restarts, what is kept, and what two processes agree on."""

import csv
import subprocess
import sys
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.pruning_run import (
    NUM_PRUNED,
    PRUNED,
    STEPS,
    DigitsOnce,
    TinyNet,
    Watch,
    differences,
    fit,
    masked,
    num_zeros,
    pruning,
    sgd,
    weights_of,
)
from helpers.slow import fast
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, StochasticWeightAveraging, Timer

from project.callbacks import EMA, BestAndLast, IterativeMagnitudePruning, LowRank, XNORNet
from project.compression import Gradual, Iterative, OneShot, Pruner, QualityFactors, Sparsities
from project.compression.pruning.schedules import share_to_take
from project.compression.thinning.carry import thin_state
from project.frame.verbs import Trainer
from project.learning.checkpoints import load_net
from project.metrics.complexity import count_macs
from project.models import Classifier
from project.models.surgery import from_plain

ROOT = Path(__file__).resolve().parents[3]


def rounds(fraction: float = 0.4, number: int = 2) -> Iterative:
    return Iterative(fraction, number)


def gone_after(fraction: float, number: int) -> list[int]:
    """Zeros after each round, level 0 included."""
    gone = [0]
    for _ in range(number):
        gone.append(gone[-1] + round(fraction * (NUM_PRUNED - gone[-1])))
    return gone


def columns(path: Path, name: str) -> list[float]:
    with path.open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def round_starts(epochs: int = 2, length: int = 2, number: int = 2) -> list[int]:
    """The first steps of the rounds."""
    return [STEPS * (epochs + length * index) for index in range(number)]


# -- levels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [None, 1])
def test_sparsity_after_each_round(tmp_path, length):
    watch, callback = Watch(), pruning(schedule=rounds(0.4, 3), epochs_per_round=length)
    outcome = fit(tmp_path, callback, watch)
    length = length or 2
    gone = gone_after(0.4, 3)
    assert len(watch.after) == STEPS * (2 + 3 * length)
    for step, moment in watch.after.items():
        level = max(0, (step // STEPS - 2) // length + 1)
        assert num_zeros(moment.weights) == gone[level], step
    assert callback.round == 3
    expected = [zeros / NUM_PRUNED for zeros in gone]
    assert [level["sparsity"] for level in callback.levels] == pytest.approx(expected)
    logged = columns(outcome.run.metrics, "pruning/sparsity")
    assert sorted(set(logged)) == pytest.approx(expected, abs=1e-4)
    assert outcome.trainer.max_epochs == 2  # for the next fit


@pytest.mark.parametrize("ema", [False, True])
def test_each_level_is_kept_with_its_sparsity_and_its_best_score(tmp_path, ema):
    callback = pruning(schedule=Sparsities([0.5, 0.9]))
    run = fit(tmp_path, callback, *([EMA(0.8)] if ema else []), epochs=3).run
    assert sorted(path.name for path in run.checkpoints.glob("*")) == [
        "best.ckpt",
        "last.ckpt",
        "level_0.ckpt",
        "level_1.ckpt",
        "level_2.ckpt",
    ]
    for number, level in enumerate([0, 0.5, 0.9]):
        weights = weights_of(run.level_checkpoint(number))
        assert num_zeros(weights) / NUM_PRUNED == pytest.approx(level, abs=1 / NUM_PRUNED)
        content = torch.load(run.level_checkpoint(number), weights_only=True)
        assert content["callbacks"][callback.state_key]["round"] == number
        assert 3 * number <= content["epoch"] < 3 * number + 3
    assert not differences(weights_of(run.best_checkpoint), weights_of(run.level_checkpoint(2)))
    scores = columns(run.metrics, "val/accuracy")
    assert [level["score"] for level in callback.levels] == pytest.approx(
        [max(scores[3 * number : 3 * number + 3]) for number in range(3)], abs=1e-4
    )


def test_dead_ends_stay_zero_with_their_norms_and_the_next_round_takes_so_much_less(tmp_path, monkeypatch):
    pruner, asked = Pruner(exclude=[], budget="effective", keep=0.02), []
    prune = pruner.prune
    monkeypatch.setattr(pruner, "prune", lambda *args, **options: asked.append(args[3]) or prune(*args, **options))
    watch, callback = Watch(), pruning(schedule=Sparsities([0.95, 0.97]), pruner=pruner)
    run = fit(tmp_path, callback, watch).run
    gone = callback.levels[1]["sparsity"]
    assert gone > 0.951 and asked == pytest.approx([0.95, share_to_take(gone, 0.97)])
    dead = [name for name, mask in callback.masks.items() if mask.dim() == 1 and not mask.all()]
    assert "conv2.norm.weight" in dead and "conv2.norm.bias" in dead
    for weights in (watch.after[max(watch.after)].weights, weights_of(run.best_checkpoint)):
        for name, mask in callback.masks.items():
            assert not weights[name][mask.expand_as(weights[name]) == 0].any(), name
        assert all(weights[name].any() for name in dead)


class Accuracy(Callback):
    """Has validation find that the first epochs were by far the best."""

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # type: ignore[override]
        pl_module.log("val/wished", 1.0 - 0.1 * trainer.current_epoch)


@pytest.mark.parametrize("schedule", [Sparsities([0.5, 0.8]), Gradual(0.8, 0.5, 2.5, every_n_steps=2)])
def test_best_is_of_the_last_level_even_if_all_before_were_better(tmp_path, schedule):
    callbacks = [pruning(schedule=schedule), Accuracy(), BestAndLast("val/wished")]
    run = fit(tmp_path, *callbacks, epochs=4).run
    assert num_zeros(weights_of(run.best_checkpoint)) == round(0.8 * NUM_PRUNED)
    kept = [torch.load(path, weights_only=True)["epoch"] for path in sorted(run.checkpoints.glob("level_*.ckpt"))]
    assert kept == ([2] if isinstance(schedule, Gradual) else [0, 4, 8])  # the first after each pruning is the best


@pytest.mark.parametrize(
    ("schedule", "checkpoint", "options"),
    [
        (Sparsities([0.5, 0.8, 0.9]), BestAndLast(every_n_epochs=2), {}),
        (Sparsities([0.5, 0.8, 0.9]), BestAndLast(), {"check_val_every_n_epoch": 2}),
        (Gradual(0.8, 0, 2.5), BestAndLast(every_n_epochs=2), {}),
    ],
)
def test_a_level_that_would_have_no_checkpoint_of_its_own_is_refused(tmp_path, schedule, checkpoint, options):
    with pytest.raises(ValueError, match="checkpoint") as error:
        rounds = {} if isinstance(schedule, Gradual) else {"epochs_per_round": 1}
        fit(tmp_path, pruning(schedule=schedule, **rounds), checkpoint, epochs=3, **options)
    assert "\n" not in str(error.value)


def test_without_validation_the_last_epoch_is_the_level(tmp_path):
    watch, callback = Watch(), pruning(schedule=Sparsities([0.5]))
    run = fit(tmp_path, callback, watch, limit_val_batches=0).run
    assert not differences(weights_of(run.level_checkpoint(0)), watch.after[2 * STEPS - 1].weights)
    assert not differences(weights_of(run.level_checkpoint(1)), watch.after[4 * STEPS - 1].weights)


# -- zeros ---------------------------------------------------------------------------------------------------------


class AveragesOf(Callback):
    """Keeps EMA's averages after each step."""

    def __init__(self, ema: EMA) -> None:
        self.ema, self.seen = ema, []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:  # type: ignore[override]
        self.seen.append({name.removeprefix("net."): value.clone() for name, value in self.ema.averages.items()})


OPTIMIZERS = {
    "sgd": sgd,
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
    "fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1, fused=True),
}


@pytest.mark.parametrize(
    ("optimizer", "after"),
    [
        *[("sgd", after) for after in ("finetune", "rewind_lr", "rewind", "reinit")],
        ("adamw", "rewind_lr"),
        ("fused", "finetune"),
    ],
)
def test_zeros_stay_zero_in_weights_averages_and_checkpoints(tmp_path, optimizer, after):
    ema, watch = EMA(0.8), Watch()
    averages = AveragesOf(ema)
    seen = []

    class Masks(Callback):
        def on_train_batch_end(self, *_):
            seen.append(dict(callback.masks))

    pruner = Pruner(exclude=["fc"])
    callback = pruning(schedule=rounds(0.4, 2), pruner=pruner, after=after, epochs_per_round=1)
    callbacks = [ema, callback, watch, averages, Masks()]  # in an order that is not the YAML's
    run = fit(tmp_path, *callbacks, optimizer=OPTIMIZERS[optimizer]).run
    num_parameters = 2
    assert [len(masks) for masks in seen] == [0] * 2 * STEPS + [num_parameters] * 2 * STEPS
    for step, masks in enumerate(seen):
        for name, mask in masks.items():
            assert (watch.after[step].weights[name] * (1 - mask) == 0).all(), (step, name)
            assert (averages.seen[step][name] * (1 - mask) == 0).all(), (step, name)
    kept = {path.stem: torch.load(path, weights_only=True) for path in run.checkpoints.glob("*.ckpt")}
    for name, content in kept.items():
        masks = content["callbacks"][callback.state_key]["masks"]
        assert len(masks) == (0 if name == "level_0" else num_parameters)
        for parameter, mask in masks.items():
            for key in ("state_dict", "ema_raw_weights"):
                assert (content[key][f"net.{parameter}"] * ~mask == 0).all(), (name, key, parameter)
    assert all(torch.equal(kept["last"]["callbacks"][callback.state_key]["masks"][name], mask != 0)
               for name, mask in callback.masks.items())  # fmt: skip


def of_units(**options):
    return Pruner("units", round_to=1, **options)


def of_round(weights, model, number):
    """Weights without the units that the surgery of a round has removed."""
    return thin_state(weights, from_plain(model.surgeries[number]))


@pytest.mark.parametrize("optimizer", fast(["adamw", "sgd", "fused"]))
@pytest.mark.parametrize("after", ["finetune", "rewind_lr", "rewind"])
def test_units_leave_the_net_at_the_round_and_all_that_belongs_to_it_follows(tmp_path, optimizer, after):
    ema, watch = EMA(0.8), Watch()
    averages = AveragesOf(ema)
    options = {"rewind_to": "5it"} if after == "rewind" else {}
    callback = pruning(schedule=rounds(0.4, 2), pruner=of_units(), after=after, **options)
    outcome = fit(tmp_path, ema, callback, watch, averages, optimizer=OPTIMIZERS[optimizer])
    assert not callback.masks and len(outcome.model.surgeries) == 2
    before = 5
    for number, start in enumerate(round_starts()):
        then = watch.after[start - 1].weights
        if after == "rewind":
            then, before = watch.before[5].weights, before
            for earlier in range(number):
                then = of_round(then, outcome.model, earlier)
        assert not differences(watch.before[start].weights, of_round(then, outcome.model, number))
        assert {name: value.shape for name, value in averages.seen[start].items()} == {
            name: value.shape for name, value in watch.after[start].weights.items() if value.is_floating_point()
        }
        if after != "rewind":  # EMA goes on: d = (1 + t) / (10 + t) is below 0.8
            old = of_round(averages.seen[start - 1], outcome.model, number)
            decay = min(0.8, (1 + start) / (10 + start))
            for name, value in averages.seen[start].items():
                expected = decay * old[name] + (1 - decay) * watch.after[start].weights[name]
                torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    sizes = [load_net(Classifier(TinyNet(), 10, (1, 8, 8)), outcome.run.level_checkpoint(level)).conv2.conv.out_channels
             for level in range(3)]  # fmt: skip
    assert sizes[0] == 16 and sizes[0] > sizes[1] > sizes[2] == outcome.model.net.conv2.conv.out_channels
    first, last = (callback.levels[number]["sparsity"] for number in (0, 2))
    weights = sum(p.numel() for p in outcome.model.net.parameters() if p.dim() > 1)
    assert first == 0 and last == 1 - weights / (72 + 1152 + 160)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_optimizer_goes_on_where_units_leave_within_an_epoch(tmp_path, optimizer):
    watch = Watch()
    callback = pruning(schedule=Gradual(0.5, 0.5, 1.5, every_n_steps=3), pruner=of_units())
    outcome = fit(tmp_path, callback, watch, optimizer=OPTIMIZERS[optimizer])
    names_by_id = {id(parameter): name for name, parameter in outcome.model.net.named_parameters()}
    groups = outcome.trainer.optimizers[0].param_groups
    names, number = [names_by_id[id(parameter)] for group in groups for parameter in group["params"]], 0
    for step in range(1, 2 * STEPS):
        was, now = watch.after[step - 1], watch.before[step]
        if {n: v.shape for n, v in was.weights.items()} == {n: v.shape for n, v in now.weights.items()}:
            continue
        plan = from_plain(outcome.model.surgeries[number])
        number += 1
        assert not differences(now.weights, thin_state(was.weights, plan))
        for key in was.state[0]:
            old = {name: was.state[place][key] for place, name in enumerate(names)}
            new = {name: now.state[place][key] for place, name in enumerate(names)}
            expected = old if old[names[0]].dim() == 0 else thin_state(old, plan)
            assert not differences(new, expected), key
        assert now.lr != 0
    assert number == len(outcome.model.surgeries) >= 2


# -- what follows a pruning ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rewind_to", ["0", "5it", "1ep"])
def test_rewinding_restores_the_exact_weights_and_rate_of_that_step(tmp_path, rewind_to):
    step = {"0": 0, "5it": 5, "1ep": STEPS}[rewind_to]
    watch, callback = Watch(), pruning(schedule=rounds(), after="rewind", rewind_to=rewind_to)
    fit(tmp_path, callback, watch)
    starts = round_starts(length=1 if rewind_to == "1ep" else 2)
    assert len(watch.after) == starts[-1] + starts[1] - starts[0]
    for number, start in enumerate(starts, 1):
        begun, masks = watch.before[start], masks_of(watch.before[start].weights)
        assert sum(int((mask == 0).sum()) for mask in masks.values()) == gone_after(0.4, 2)[number]
        assert not differences(begun.weights, masked(watch.before[step].weights, masks))  # batch norm's statistics too
        for later in range(2 * STEPS - step):
            assert watch.before[start + later].lr == watch.before[step + later].lr
        rest = range(2 * STEPS - step, starts[1] - starts[0])
        last = watch.before[2 * STEPS - 1].lr
        assert last > 0 and all(watch.before[start + later].lr == last for later in rest)  # the schedule has ended


def masks_of(weights):
    return {name: (weights[name] != 0).to(weights[name].dtype) for name in PRUNED}


@pytest.mark.parametrize(("after", "factor"), [("rewind_lr", 1.0), ("finetune", 0.1), ("finetune", 0.3)])
def test_the_rate_restarts_and_the_weights_go_on(tmp_path, after, factor):
    options = {"finetune_lr": factor} if factor == 0.3 else {}
    watch, callback = Watch(), pruning(schedule=rounds(), after=after, **options)
    fit(tmp_path, callback, watch)
    for start in round_starts():
        begun = watch.before[start].weights
        assert not differences(begun, masked(watch.after[start - 1].weights, masks_of(begun)))
        rates = [watch.before[start + step].lr for step in range(2 * STEPS)]
        assert rates == pytest.approx([factor * watch.before[step].lr for step in range(2 * STEPS)], rel=1e-12)
    assert len({watch.before[step].lr for step in range(2 * STEPS)}) == 2 * STEPS


def test_a_schedule_is_stretched_over_its_round(tmp_path):
    watch = Watch()
    fit(tmp_path, pruning(schedule=OneShot(0.5), after="rewind_lr", epochs_per_round=1), watch)
    dense, round_ = ([watch.before[step].lr for step in steps] for steps in (range(12), range(12, 18)))
    assert round_ == pytest.approx(dense[::2], abs=1e-12)


def test_reinit_is_new_weights_that_repeat(tmp_path):
    runs = []
    for number in range(2):
        torch.rand(number)  # other draws before the run
        runs.append(Watch())
        fit(tmp_path / str(number), pruning(schedule=rounds(), after="reinit"), runs[-1])
    first, again = ([run.before[start].weights for start in round_starts()] for run in runs)
    initial = runs[0].before[0].weights
    for number, start in enumerate(round_starts()):
        assert not differences(first[number], again[number])
        kept = [first[number][name] != 0 for name in PRUNED]
        for other in (initial, runs[0].after[start - 1].weights, first[1 - number]):
            for name, mask in zip(PRUNED, kept, strict=True):
                both = mask & (other[name] != 0)
                assert (first[number][name] != other[name])[both].all(), name
        assert torch.equal(first[number]["conv1.norm.weight"], torch.ones(8))
        assert torch.equal(first[number]["conv1.norm.running_mean"], torch.zeros(8))
        assert first[number]["conv1.norm.num_batches_tracked"] == 0
        weight = first[number]["conv2.conv.weight"]
        assert float(weight[weight != 0].std()) == pytest.approx((2 / 72) ** 0.5, rel=0.15)  # Kaiming, 8 * 3 * 3 inputs


def test_reinit_draws_nothing_from_the_global_generator(tmp_path):
    states = []

    class States(Callback):
        def on_train_epoch_start(self, *_):
            states.append(torch.get_rng_state())

    before = States()
    fit(tmp_path, before, pruning(schedule=OneShot(0.5), after="reinit"), States())
    assert all(torch.equal(*pair) for pair in zip(states[::2], states[1::2], strict=True))


@pytest.mark.parametrize(
    ("after", "optimizer"),
    [("finetune", "sgd"), ("rewind_lr", "adamw"), ("rewind", "sgd"), ("reinit", "adamw")],
)
def test_the_optimizers_state_restarts(tmp_path, after, optimizer):
    watch = Watch()
    callback = pruning(schedule=rounds(), after=after, epochs_per_round=1)
    fit(tmp_path, callback, watch, optimizer=OPTIMIZERS[optimizer])
    fresh = [step for step, moment in watch.before.items() if not moment.state]
    assert fresh == [0, *round_starts(length=1)]


@pytest.mark.parametrize("after", ["rewind", "reinit", "rewind_lr"])
def test_averages_restart_with_new_weights_and_go_on_with_the_old(tmp_path, after):
    ema, watch = EMA(0.8), Watch()
    averages = AveragesOf(ema)
    fit(tmp_path, pruning(schedule=OneShot(0.5), after=after), ema, watch, averages)
    start = round_starts(number=1)[0]
    first = {name: value for name, value in watch.after[start].weights.items() if value.is_floating_point()}
    assert (not differences(averages.seen[start], first)) == (after != "rewind_lr")
    assert differences(averages.seen[start + 1], {name: watch.after[start + 1].weights[name] for name in first})


# -- gradually -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ema", [False, True])
def test_gradual_follows_its_formula_and_best_has_the_final_sparsity(tmp_path, ema):
    watch, schedule = Watch(), Gradual(0.9, begin_epoch=0.5, end_epoch=3, every_n_steps=4, initial=0.2)
    callback = pruning(schedule=schedule)
    run = fit(tmp_path, callback, *([EMA(0.8)] if ema else []), watch, epochs=5).run
    assert len(watch.after) == 5 * STEPS
    target = 0.0
    for step, moment in watch.after.items():
        now = schedule.sparsity_at(step, STEPS)
        target = target if now is None else now
        # each pruning takes a whole number of weights, and starts from what is there
        assert num_zeros(moment.weights) == pytest.approx(target * NUM_PRUNED, abs=1), step
    assert num_zeros(weights_of(run.best_checkpoint)) == round(0.9 * NUM_PRUNED)
    assert num_zeros(weights_of(run.level_checkpoint(0))) == round(0.9 * NUM_PRUNED)
    zeros = [{(name, *at) for name in PRUNED for at in (moment.weights[name] == 0).nonzero().tolist()}
             for moment in watch.after.values()]  # fmt: skip
    assert all(before <= after for before, after in pairwise(zeros))
    assert [moment.lr for moment in watch.before.values()] == pytest.approx([0.1 * (1 - s / 30) for s in range(30)])


def test_gradual_that_ends_after_the_training_is_refused(tmp_path):
    with pytest.raises(ValueError, match="end_epoch is 2") as error:
        fit(tmp_path, pruning(schedule=Gradual(0.9, 0, 2)), epochs=2)
    assert "\n" not in str(error.value)


# -- a budget of multiply-accumulates ------------------------------------------------------------------------------


def thinned_share(run, level):
    """The multiply-accumulates that are left in the net of a level, by running it."""
    net = load_net(Classifier(TinyNet(), 10, (1, 8, 8)), run.level_checkpoint(level))
    return count_macs(net, (1, 8, 8)) / count_macs(TinyNet(), (1, 8, 8))


def of_macs(round_to):
    """Both convolutions of the net; :class:`TinyNet` has 8 and 16 units there."""
    return Pruner("units", "magnitude", budget="macs", exclude=["fc"], round_to=round_to)


@pytest.mark.parametrize("round_to", [1, 4])
def test_levels_are_shares_of_the_thinned_nets_macs(tmp_path, round_to):
    """A round that takes too much, for the sake of round widths, leaves less to the next."""
    wanted = [0.15, 0.3, 0.45, 0.6]
    callback = pruning(schedule=Sparsities(wanted), pruner=of_macs(round_to), epochs_per_round=1)
    outcome = fit(tmp_path, callback, epochs=1)
    reached = [1 - thinned_share(outcome.run, number) for number in range(5)]
    assert [level["macs_gone"] for level in callback.levels] == pytest.approx(reached, rel=1e-12)
    largest = 0.14 * round_to  # a unit of the first layer, of the dense net
    for before, now, level in zip(reached, reached[1:], wanted, strict=False):
        assert now == before if before >= level else level <= now < level + largest


def test_a_layer_keeps_its_share_of_the_units_that_it_had_at_first(tmp_path):
    """Rounds that begin with a smaller net protect as many units as the first one, in steps of as many."""
    schedule = Sparsities([0.3, 0.5, 0.66])
    callback = pruning(schedule=schedule, pruner=Pruner("units", "random", keep=0.25, round_to=4), epochs_per_round=1)
    outcome = fit(tmp_path, callback, epochs=1)
    assert (outcome.model.net.conv1.conv.out_channels, outcome.model.net.conv2.conv.out_channels) == (4, 4)


def test_gradual_reaches_its_share_of_the_macs(tmp_path):
    callback = pruning(schedule=Gradual(0.5, 0, 1.5, every_n_steps=1), pruner=of_macs(1))
    outcome = fit(tmp_path, callback)
    assert 0.5 <= 1 - thinned_share(outcome.run, 0) < 0.64
    assert callback.levels[0]["macs_gone"] == pytest.approx(1 - thinned_share(outcome.run, 0), rel=1e-12)


@pytest.mark.parametrize("schedule", [Sparsities([0.5, 0.95]), Gradual(0.95, 0, 1), Iterative(0.8, 2), OneShot(0.95)])
@pytest.mark.parametrize("pruner", [of_macs(4), Pruner("units", keep=0.3, round_to=1), Pruner(keep=0.1)])
def test_what_can_not_be_reached_is_refused_before_the_training(tmp_path, schedule, pruner):
    watch = Watch()
    with pytest.raises(ValueError, match=rf"9[56] % of the {pruner.counted} gone, but with keep .* at most") as error:
        fit(tmp_path, pruning(schedule=schedule, pruner=pruner), watch)
    assert "\n" not in str(error.value)
    assert not watch.after and not list(tmp_path.glob("*/version_*"))


# -- runs that end early -------------------------------------------------------------------------------------------


def test_a_run_out_of_time_says_so_and_ends_as_if_it_had_not(tmp_path, caplog):
    """Its report waits: a level half trained is no result."""
    options = {"schedule": Sparsities([0.3]), "pruner": of_macs(4), "epochs_per_round": 2}
    out_of_time, in_time = (
        Timer(duration=timedelta(microseconds=duration), interval="epoch") for duration in (1, 10**9)
    )
    with caplog.at_level("WARNING", "project"):
        stopped = fit(tmp_path, pruning(**options), out_of_time, epochs=1).run
    (message,) = (record.getMessage() for record in caplog.records if "stopped" in record.getMessage())
    assert "after epoch 1 of 3" in message and str(stopped.folder) in message and "larger max_time" in message
    assert not stopped.level_checkpoint(0).is_file() and stopped.best_checkpoint.is_file()
    caplog.clear()
    with caplog.at_level("WARNING", "project"):
        fit(tmp_path, pruning(**options), in_time, epochs=1, resume=stopped)
        whole = fit(tmp_path, pruning(**options), epochs=1).run
    assert not [record for record in caplog.records if "stopped" in record.getMessage()]
    small = load_net(Classifier(TinyNet(), 10, (1, 8, 8)), stopped.best_checkpoint)
    assert count_macs(small, (1, 8, 8)) <= 0.7 * count_macs(TinyNet(), (1, 8, 8))
    assert not differences(weights_of(stopped.best_checkpoint), weights_of(whole.best_checkpoint))


# -- several processes ---------------------------------------------------------------------------------------------

CONFIG = """
model:
  net: helpers.pruning_run.TinyNet
trainer:
  callbacks:
    - class_path: project.callbacks.IterativeMagnitudePruning
      init_args:
        schedule: {class_path: project.compression.Iterative, init_args: {fraction: 0.4, rounds: 2}}
        pruner:
          class_path: project.compression.Pruner
          init_args: {criterion: gradient, structure: STRUCTURE}
        after: rewind_lr
        report: false
    - class_path: project.callbacks.EMA
    - class_path: helpers.pruning_run.SaveMasks
"""


@pytest.mark.slow
@pytest.mark.parametrize("structure", ["weights", "units"])
def test_two_processes_prune_the_same(logs, monkeypatch, structure):
    """Gradients are taken at batch-norm statistics of a process's own, so that the masks must come from one of them."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    logs.parent.joinpath("pruning.yaml").write_text(
        CONFIG.replace("STRUCTURE", structure if structure == "weights" else "units, scope: layer")
    )
    options = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.accelerator=cpu", "--trainer.max_epochs=2"]
    options += [f"--config={logs.parent / 'pruning.yaml'}", "--trainer.observe=false", "--trainer.test_after_fit=false"]
    command = [sys.executable, "-m", "project", "fit", "--config", str(ROOT / "configs/digits.yaml"), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    folder = logs / "digits/version_0"
    first, second = (torch.load(folder / f"process_{rank}.pt", weights_only=True) for rank in range(2))
    if structure == "weights":
        assert sum(int((mask == 0).sum()) for mask in first["masks"].values()) == gone_after(0.4, 2)[-1]
    else:
        assert first["masks"] == {} and len(first["weights"]["conv2.conv.weight"]) < 16
    assert not differences(first["masks"], second["masks"])
    trained = [name for name in first["weights"] if "running" not in name and "tracked" not in name]
    assert not differences(*({name: each["weights"][name] for name in trained} for each in (first, second)))
    levels = sorted(path.name for path in (folder / "checkpoints").glob("*"))
    assert levels == ["best.ckpt", "last.ckpt", "level_0.ckpt", "level_1.ckpt", "level_2.ckpt"]


# -- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"rewind_to": "5it"},
        {"rewind_to": "1ep", "after": "rewind_lr"},
        {"rewind_to": "5", "after": "rewind"},
        {"rewind_to": "half", "after": "rewind"},
        {"epochs_per_round": 0},
        {"finetune_lr": 0.0},
        {"after": "rewind", "schedule": Gradual(0.9, 0, 2)},
        {"epochs_per_round": 3, "schedule": Gradual(0.9, 0, 2)},
        {"finetune_lr": 0.5, "schedule": Gradual(0.9, 0, 2)},
        {"scope": "deviation"},
        {"schedule": QualityFactors([1.0])},
    ],
)
def test_arguments_that_do_not_fit_are_refused_in_one_sentence(options):
    argument = next(iter(options))
    if argument == "scope":
        options = {"pruner": Pruner(scope="deviation")}
    with pytest.raises(ValueError, match="scope: deviation" if "sc" in argument else rf"{argument} (is )?") as error:
        IterativeMagnitudePruning(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("callback", "options", "message"),
    [
        ({}, {"epochs": None, "max_steps": 9}, "set trainer.max_epochs"),
        ({}, {"epochs": 2, "max_steps": 9}, "leave max_steps out"),
        ({"pruner": Pruner(include=["conv9"])}, {}, "include has 'conv9'"),
        ({"after": "rewind", "rewind_to": "2ep"}, {}, "rewind_to is "),
        ({"after": "rewind", "rewind_to": "12it"}, {}, "rewind_to is "),
    ],
)
def test_what_does_not_fit_the_run_is_refused_before_the_first_step(tmp_path, callback, options, message):
    watch = Watch()
    with pytest.raises(ValueError, match=message) as error:
        fit(tmp_path, pruning(**callback), watch, **options)
    assert "\n" not in str(error.value)
    assert not watch.after and not list(tmp_path.glob("*/version_*"))


def test_early_stopping_is_refused_before_the_first_step(tmp_path):
    with pytest.raises(ValueError, match="callbacks hold IterativeMagnitudePruning and EarlyStopping") as error:
        fit(tmp_path, pruning(), EarlyStopping("val/loss"))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("*/version_*"))


@pytest.mark.parametrize("average", [lambda: EMAWeightAveraging(decay=0.9), lambda: StochasticWeightAveraging(0.1)])
@pytest.mark.parametrize("technique", [pruning, lambda: LowRank(1), lambda: XNORNet(1)])
def test_averages_that_do_not_follow_the_net_are_refused_before_the_first_step(tmp_path, technique, average):
    with pytest.raises(ValueError, match=r"average.*: use project\.callbacks\.EMA"):
        fit(tmp_path, technique(), average(), epochs=3)
    assert not list(tmp_path.glob("*/version_*"))


@pytest.mark.parametrize(
    "options", [{}, {"after": "rewind", "rewind_to": "2ep"}, {"schedule": Gradual(0.9, 0, 1.5, every_n_steps=1)}]
)
def test_a_fast_run_of_one_batch_passes_through(tmp_path, options):
    callback = pruning(**options)
    trainer = Trainer(callbacks=[callback], fast_dev_run=True, accelerator="cpu", logs_dir=str(tmp_path))
    trainer.fit(Classifier(TinyNet(), 10, (1, 8, 8), optimizer=sgd), datamodule=DigitsOnce(batch_size=64))
    assert trainer.state.finished and not callback.masks


def test_other_models_and_data_are_refused(tmp_path):
    class Other(LightningModule):
        pass

    trainer = Trainer(callbacks=[pruning()], max_epochs=1, accelerator="cpu", logs_dir=str(tmp_path))
    with pytest.raises(ValueError, match="the model is a Other"):
        pruning().setup(trainer, Other(), "fit")
    options = {"accelerator": "cpu", "max_epochs": 1, "limit_train_batches": 2, "observe": False, "logger": False}
    trainer = Trainer(callbacks=[pruning(pruner=Pruner(criterion="gradient"))], logs_dir=str(tmp_path), **options)
    loader = [(torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.long))] * 2
    with pytest.raises(ValueError, match="there is no ImageDataModule") as error:
        trainer.fit(Classifier(TinyNet(), 10, (1, 8, 8)), loader, loader)
    assert "\n" not in str(error.value)


def test_runs_of_neighbouring_seeds_draw_from_other_seeds_at_each_step():
    seeds, pruner = [], Pruner(criterion="random")
    pruner.prune = lambda *_, seed, **__: seeds.append(seed) or {}
    callback = pruning(pruner=pruner)
    callback._groups, callback.hold = {}, lambda *_: None
    for seed in range(4):
        data = DigitsOnce(seed=seed)
        for step in range(4):
            strategy = SimpleNamespace(broadcast=lambda masks: masks)
            trainer = SimpleNamespace(
                datamodule=data, global_step=step, strategy=strategy, callbacks=[], is_global_zero=False
            )
            callback._prune(trainer, SimpleNamespace(net=None, image_shape=None), 0.5)
    assert len(set(seeds)) == 16 and max(seeds) < 2**32 and min(seeds) >= 0
