"""A quick test before a search: a learning rate range test, with Lightning's tuner.

Smith 2017, Cyclical learning rates for training neural networks (arXiv:1506.01186, sec. 3.3). The rate
rises step by step in one short run. The test proposes the rate at which the loss falls most steeply. All parameters get
this one rate.

Lightning 2.6 smooths over 50 of 100 steps. It halves the first losses, because its correction counts one step too many.
It takes the slope over the rates instead of their logarithms. On digits it proposed 0.00126, but the loss falls most
steeply at 0.0912 (`project find_lr --config configs/digits.yaml`). So this module takes Lightning's losses, undoes
their smoothing, and finds the steepest point itself.
"""

import itertools
import logging
import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.tuner import Tuner

from project.frame.paths import write_whole
from project.tuning.batch_size import borrowed, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)


def find_lr(
    trainer: pl.Trainer, model: Any, datamodule: Any, folder: Path, *, min_lr: float, max_lr: float, num_steps: int
) -> float:
    """Propose a value of the optimizer's ``lr``, and write a picture of the loss over the rates into ``folder``.

    Args:
        trainer: trainer whose device, precision and gradient settings are used; nothing is saved in its run.
        model: classifier that is trained; its weights are restored.
        datamodule: data module that gives the training images.
        folder: folder that the picture ``learning_rate.png`` is written to.
        min_lr: learning rate of the first step; above 0.
        max_lr: learning rate of the last step; any number above ``min_lr``.
        num_steps: number of training steps; 20 or more.

    Returns:
        The proposed ``lr``, for the base batch size if the classifier has one.

    Raises:
        ValueError: if a number is outside its range, or the loss falls nowhere between the two rates.
    """
    if not 0 < min_lr < max_lr:
        raise ValueError(f"min_lr is {min_lr} and max_lr is {max_lr}: choose 0 < min_lr < max_lr.")
    if num_steps < 20:
        raise ValueError(f"num_steps is {num_steps}, but the loss of a few steps is too noisy: choose 20 or more.")
    with tempfile.TemporaryDirectory() as scratch:
        # The test takes its own number of steps, whatever the trainer's epochs are, and needs no validation.
        tuner = Tuner(plain(trainer, scratch, check_val_every_n_epoch=10**9))
        options: dict[str, Any] = {"min_lr": min_lr, "max_lr": max_lr, "num_training": num_steps}
        with borrowed(model):
            finder = tuner.lr_find(model, datamodule=datamodule, update_attr=False, **options)
        scale = model._lr_scale() if model.base_batch_size else 1.0
    assert finder is not None
    rates, losses = finder.results["lr"], smooth(unsmoothed(finder.results["loss"]))
    rate = steepest(rates, losses)
    path = folder / "learning_rate.png"
    figure = plot_rates(rates, losses, rate)
    write_whole(path, lambda part: figure.savefig(part, dpi=110))
    log.info("picture        %s", path)
    log.info("learning rate  %.3g, where the loss falls most steeply", rate)
    log.info("take it        --model.optimizer.init_args.lr %.3g", rate / scale)
    return rate / scale


def unsmoothed(losses: list[float], beta: float = 0.98) -> list[float]:
    """The losses before Lightning's moving average: its inverse."""
    sums = [0.0, *(loss * (1 - beta ** (step + 2)) for step, loss in enumerate(losses))]
    return [(new - beta * old) / (1 - beta) for old, new in itertools.pairwise(sums)]


def smooth(losses: list[float], beta: float = 0.9) -> list[float]:
    """The exponential moving average over about ``1 / (1 - beta)`` steps, corrected because it begins at 0."""
    average, smoothed = 0.0, []
    for step, loss in enumerate(losses, 1):
        average = beta * average + (1 - beta) * loss
        smoothed.append(average / (1 - beta**step))
    return smoothed


def steepest(rates: list[float], losses: list[float], skip: int = 10) -> float:
    """The rate at which the loss falls most steeply over the logarithm of the rate. The first ``skip`` steps do not
    count, because they are noisy.

    Raises:
        ValueError: if fewer than three finite losses are left, or the loss falls nowhere.
    """
    pairs = [(math.log(rate), loss) for rate, loss in zip(rates, losses, strict=False) if math.isfinite(loss)][skip:]
    if len(pairs) < 3:
        raise ValueError(f"the loss grows within the first {len(losses)} steps: lower min_lr.")
    x, y = torch.tensor(pairs, dtype=torch.float64).T
    slopes = torch.gradient(y, spacing=(x,))[0]
    if slopes.min() >= 0:
        raise ValueError(
            f"the loss falls nowhere from {rates[0]:.3g} to {rates[-1]:.3g}: lower min_lr, or take more steps."
        )
    return math.exp(float(x[slopes.argmin()]))


def plot_rates(rates: list[float], losses: list[float], proposed: float) -> "Figure":
    """Plot the loss over the rates, up to twice its smallest value."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(rates, losses, linewidth=1.5)
    axes.axvline(proposed, color="#D55E00", linewidth=1.2, label=f"steepest: {proposed:.3g}")
    axes.set_xscale("log")
    low = min(losses)
    axes.set_ylim(low - 0.1 * abs(low), max(2 * low, losses[0] * 1.2))
    axes.set(xlabel="learning rate", ylabel="training loss, smoothed")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure
