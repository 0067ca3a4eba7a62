"""The learning-rate finder and the batch-size finder."""

import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.versioned_net import Versioned
from torch import nn

from project.learning import Linear, Plateau
from project.models import Classifier
from project.tuning.batch_size import attempt, failure_of, find_batch_size, largest_that_fits
from project.tuning.finders import find_lr, smooth, steepest, unsmoothed


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


# -- batch size -------------------------------------------------------------------------------------------------------

SHORT = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 99999999999 bytes."


class Narrow(nn.Module):
    """A net that runs out of memory, hangs or dies above some number of images in training."""

    def __init__(self, num_classes: int = 10, limit: int = 40, how: str = "error", pixels: int = 64) -> None:
        super().__init__()
        self.fc, self.limit, self.how = nn.Linear(pixels, num_classes), limit, how
        self.tried: list[int] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.training and len(images) not in self.tried:
            self.tried.append(len(images))
        if self.training and len(images) > self.limit:
            if self.how == "hang":
                time.sleep(600)
            if self.how == "die":
                os.abort()
            raise RuntimeError(SHORT if self.how == "error" else "shapes do not fit")
        return self.fc(images.flatten(1))


@pytest.mark.parametrize("mode", ["power", "binsearch"])
def test_each_proposed_size_was_tried(mode):
    for limit in (1, 2, 13, 31, 32, 33, 40, 41, 63, 64, 65, 100):
        for first in (1, 7, 16, 64):
            for largest in (64, 65, 99):
                fitted = []

                def trial(size, fitted=fitted, limit=limit):
                    assert size >= 1
                    if size > limit:
                        return failure_of(RuntimeError(SHORT))
                    return fitted.append(size)

                size = largest_that_fits(trial, mode, first, largest)
                assert size in fitted and size == max(fitted) <= largest and len(set(fitted)) == len(fitted)
                assert mode == "power" or size == min(limit, largest)
                assert mode != "power" or 2 * size > min(limit, largest)


@pytest.mark.parametrize(
    ("mode", "limit", "largest", "size"),
    [
        ("power", 40, None, 32),
        ("binsearch", 40, None, 40),
        ("power", 40, 38, 38),
        ("power", 35, 40, 32),
        ("power", 40, 9, 9),
    ],
)
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_net_that_is_short_of_memory_gets_the_size_that_it_was_trained_with(tiny, mode, limit, largest, size):
    data, net = tiny.data(batch_size=7), Narrow(limit=limit)
    data.train_data = range(96)
    model = Classifier(net, 10, (1, 8, 8), schedule=Plateau())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = find_batch_size(tiny.trainer(max_epochs=1), model, data, mode=mode, first=16, largest=largest)
    assert found == size and size in net.tried
    assert data.batch_size == 7 and isinstance(model.schedule, Plateau)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_an_error_that_is_not_of_memory_is_told(tiny):
    data, net = tiny.data(), Narrow(limit=0, how="wrong")
    data.train_data = range(96)
    model = Classifier(net, 10, (1, 8, 8))
    with pytest.raises(ValueError, match="largest is 0: choose a batch size of 1 or more"):
        find_batch_size(tiny.trainer(), model, data, mode="power", first=16, largest=0)
    with pytest.raises(ValueError, match="batch size of 16 fails: shapes do not fit"):
        find_batch_size(tiny.trainer(), model, data, mode="power", first=16, largest=None)
    net.limit = 20
    assert find_batch_size(tiny.trainer(), model, data, mode="binsearch", first=16, largest=None) == 20
    net.how, net.limit = "error", 0
    with pytest.raises(ValueError, match="batch size of 1 fails: DefaultCPUAllocator"):
        find_batch_size(tiny.trainer(), model, data, mode="power", first=16, largest=None)


def test_a_step_takes_place_with_accumulated_gradients_too(tiny):
    steps = []

    class Counted(torch.optim.SGD):
        def step(self, closure=None):
            steps.append(super().step(closure))

    model = Classifier(Narrow(), 10, (1, 8, 8), schedule=Linear(), optimizer=lambda weights: Counted(weights, lr=0.1))
    trainer = tiny.trainer(accumulate_grad_batches=2)
    assert attempt(trainer, model, tiny.data(), 40) is None and len(steps) == 3


OUTSIDE = """
import os
import time
from pathlib import Path

from torch import nn


class Narrow(nn.Module):
    def __init__(self, num_classes: int = 10, how: str = "hang") -> None:
        super().__init__()
        self.fc, self.how = nn.Linear(64, num_classes), how

    def forward(self, images):
        if self.training and len(images) > 40:
            time.sleep(600) if self.how == "hang" else os._exit(137)
        return self.fc(images.flatten(1))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("how", "reason"), [("hang", "no answer within"), ("die", "the process died")])
def test_a_size_that_hangs_or_kills_the_process_does_not_fit(command, digits, logs, tmp_path, monkeypatch, how, reason):
    (tmp_path / "narrow_net.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(str(tmp_path))
    digits = [option for option in digits if "width" not in option]
    net = ["--model.net=narrow_net.Narrow", f"--model.net.init_args.how={how}", "--trainer.kernels=off"]
    began = time.perf_counter()
    status, out, err = command("find_batch_size", *digits, *net, "--patience_s=30")
    assert status == 0, err
    assert re.search(r"batch_size 32$", out, re.MULTILINE) and reason in out
    assert time.perf_counter() - began < 300, "the net sleeps for 600 seconds"
    assert not list(logs.glob("*/version_*"))


LIMITED = """
import resource
import sys
from pathlib import Path

from project.__main__ import main

limit = int(sys.argv.pop(1))
if limit:
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    main()
finally:
    print(*[line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmPeak")])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux alone tells the largest address space")
def test_a_limit_of_memory_is_found_in_a_run(digits, logs):
    """Neither process hangs where the address space is limited, as by ``ulimit -v``."""

    def run(limit, *options):
        arguments = [*digits, "--model.net.init_args.width=4", "--trainer.kernels=off", *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [sys.executable, "-c", LIMITED, str(limit), "find_batch_size", *arguments],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )

    free = run(0, "--largest=1")
    assert free.returncode == 0, free.stderr
    peak = 1024 * int(re.search(r"VmPeak:\s*(\d+) kB", free.stdout)[1])
    done = run(peak + (256 << 20), "--first=1")
    assert done.returncode == 0, done.stdout + done.stderr
    size = int(re.search(r"--data.init_args.batch_size (\d+)$", done.stdout, re.MULTILINE)[1])
    assert f"size {size} " in done.stdout and f"size {2 * size:<10} fails: " in done.stdout


# -- learning rate ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("max_epochs", "batch_size"), [(2, 16), (-1, 16), (1, 96)])
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_the_range_test_takes_all_its_steps(tiny, tmp_path, max_epochs, batch_size, monkeypatch):
    """96 images are one batch or six. Neither a few epochs nor a schedule without validations cuts the test short."""
    from project.tuning import finders

    seen = []
    monkeypatch.setattr(finders, "steepest", lambda rates, losses: seen.append(rates) or steepest(rates, losses))
    model = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), 10, (1, 8, 8), schedule=Plateau())
    trainer = tiny.trainer(max_epochs=max_epochs)
    data = tiny.data(batch_size=batch_size)
    proposed = find_lr(trainer, model, data, tmp_path, min_lr=1e-5, max_lr=0.5, num_steps=60)
    assert len(seen[0]) >= 59 and 1e-5 < proposed < 0.5
    assert isinstance(model.schedule, Plateau)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_net_that_asks_for_the_version_of_its_weights_gets_them_back(tiny):
    data, model = tiny.data(), Classifier(Versioned(), 10, (1, 8, 8))
    data.train_data = range(96)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert find_batch_size(tiny.trainer(max_epochs=1), model, data, mode="power", first=16, largest=32) == 32
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


LATE = """
from pathlib import Path
from project.data import Digits

class Late(Digits):
    def prepare_data(self):
        Path("ready").touch()

    def load(self, train):
        if not Path("ready").exists():
            raise ValueError("not prepared")
        return super().load(train)
"""


def test_data_are_prepared_before_they_are_read(command, logs, tmp_path, monkeypatch):
    (tmp_path / "own_late_data.py").write_text(LATE)
    monkeypatch.chdir(tmp_path)
    options = ["--data=own_late_data.Late", "--data.batch_size=16", "--model.net=project.models.SmallInception"]
    status, _, err = command("find_batch_size", *options, "--first=16", "--largest=16")
    assert status == 0, err
