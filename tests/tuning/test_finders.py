"""The learning-rate finder and the batch-size finder."""

import math
import re

import pytest

from project.tuning.finders import smooth, steepest, unsmoothed


def test_losses_are_taken_back_from_lightnings_average():
    losses = [2.5, 2.0, 7.0, 1.0, 0.5]
    average, reported = 0.0, []
    for step, loss in enumerate(losses, 1):  # as lightning.pytorch.tuner.lr_finder._LRCallback has it
        average = 0.98 * average + 0.02 * loss
        reported.append(average / (1 - 0.98 ** (step + 1)))
    assert unsmoothed(reported) == pytest.approx(losses)
    assert smooth([3.0] * 20) == pytest.approx([3.0] * 20)


def test_the_steepest_fall_is_found_on_the_logarithm_of_the_rate():
    rates = [10 ** (-5 + 6 * step / 99) for step in range(100)]
    losses = [2 - 1 / (1 + math.exp(-3 * (math.log10(rate) + 2))) for rate in rates]  # falls around 1e-2
    assert steepest(rates, losses) == pytest.approx(1e-2, rel=0.15)
    with pytest.raises(ValueError, match="falls nowhere"):
        steepest(rates, [1 + rate for rate in rates])
    with pytest.raises(ValueError, match="lower min_lr"):
        steepest(rates[:5], losses[:5])


@pytest.mark.slow
def test_both_finders_propose_options_that_a_run_takes(command, digits, logs):
    status, out, err = command("find_lr", *digits)
    assert status == 0, err
    rate = re.search(r"take it +(--model.optimizer.init_args.lr) (\S+)", out)
    assert rate is not None and 1e-3 < float(rate[2]) < 1
    assert (logs / "digits" / "learning_rate.png").is_file() and not list(logs.glob("*/version_*"))
    status, scaled, err = command("find_lr", *digits, "--model.base_batch_size", "64")
    assert status == 0, err  # batches of 128: the rate that is asked for is half of the one that is taken
    half = re.search(r"take it +(--model.optimizer.init_args.lr) (\S+)", scaled)
    assert half is not None and float(half[2]) == pytest.approx(float(rate[2]) / 2, rel=1e-2)
    status, out, err = command("find_batch_size", *digits, "--first", "128")
    assert status == 0, err
    size = re.search(r"take it +(--data.init_args.batch_size) (\S+)", out)
    assert size is not None and int(size[2]) <= 1318
    options = ["--trainer.max_epochs", "1", "--trainer.test_after_fit", "false"]
    status, _, err = command("fit", *digits, rate[1], rate[2], size[1], size[2], *options)
    assert status == 0, err
