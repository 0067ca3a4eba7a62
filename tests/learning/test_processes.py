"""The law of several processes: two of them end where one ends that has the whole batch, up to the order of sums.

In float64 that order is worth about 1e-14 here, so that any image, draw or statistic in the wrong place shows.
"""

import pytest
import torch
from helpers.processes import NUM_VAL, distance, fit
from torch import nn

from project.callbacks import (
    EMA,
    DistillFrom,
    IterativeMagnitudePruning,
    QuantizationAwareTraining,
    TernaryWeights,
    WeightSharing,
)
from project.compression import Gradual, Iterative, Pruner
from project.data import MixUp
from project.learning.optimizers import Muon
from project.losses import CrossEntropy, MaxNorm, Penalties
from project.models.layers import MaxPool

ROUNDING = 1e-11
"""A thousand times what was measured, a ten-thousandth of what float32 does."""


@pytest.fixture(autouse=True)
def seed(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")


def pruning(**options):
    schedule = Iterative(fraction=0.4, rounds=1)
    return IterativeMagnitudePruning(**{"schedule": schedule, "epochs_per_round": 1, "report": False, **options})


def assert_equal(pair, one, bound=ROUNDING):
    first, second = pair
    assert distance(first["net"], one["net"]) < bound
    assert distance(first["net"], second["net"]) == 0
    assert distance(first["metrics"], one["metrics"]) < 1e-5, "torchmetrics adds up in float32"
    assert first["num_val_images"] + second["num_val_images"] == one["num_val_images"] == NUM_VAL
    for name, mask in one["masks"].items():
        assert all(torch.equal(each["masks"][name], mask) for each in pair), name


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(tmp_path):
    """With all that looks at a batch: norms, three dropouts, MixUp, clipping; and Muon, max-norm, penalties, EMA."""
    options = {
        "data": {"mix": MixUp(0.4)},
        "model": {
            "optimizer": lambda parameters: Muon(parameters, weight_decay=0.1),
            "max_norm": MaxNorm(conv=1.0, fc=1.0),
            "penalties": Penalties(l1_conv=1e-4, l2_fc=1e-3),
            "loss": CrossEntropy(0.1),
        },
        "gradient_clip_val": 1.0,
    }
    (one,) = fit(tmp_path, 1, EMA(), **options)
    assert_equal(fit(tmp_path, 2, EMA(), **options), one)


def test_in_float32_two_processes_are_as_near_to_float64_as_one(tmp_path):
    for name in ("exact", "single", "apart"):
        (tmp_path / name).mkdir()
    (exact,) = fit(tmp_path / "exact", 1)
    # The reference is torch's own rounding. The C kernels, which run in one process alone, add blocks in double,
    # and their error is 5 to 10 times smaller. Over 12 seeds two processes had 0.01 to 0.98 times the error of torch.
    (one,) = fit(tmp_path / "single", 1, precision="32-true", kernels="off")
    pair = fit(tmp_path / "single", 2, precision="32-true", kernels="off")
    assert distance(pair[0]["net"], exact["net"]) < 2 * distance(one["net"], exact["net"])
    apart = fit(tmp_path / "apart", 2, sync_batchnorm=False)
    assert distance(apart[0]["net"], exact["net"]) > 1e-3, "statistics of half a batch"


@pytest.mark.parametrize(
    ("options", "num_masks"),
    [
        ({"schedule": Iterative(fraction=0.4, rounds=2), "after": "rewind", "rewind_to": "3it"}, 2),
        pytest.param({"pruner": Pruner(structure="units", criterion="gradient")}, 0, marks=pytest.mark.slow),
        pytest.param({"pruner": Pruner(criterion="random"), "after": "reinit"}, 2, marks=pytest.mark.slow),
        pytest.param(
            {"schedule": Gradual(0.5, 0, 2), "epochs_per_round": None}, 2, id="gradual", marks=pytest.mark.slow
        ),
    ],
)
def test_two_processes_have_the_masks_of_one(tmp_path, options, num_masks):
    (one,) = fit(tmp_path, 1, pruning(**options))
    assert len(one["masks"]) == num_masks and all(0 < float(mask.float().mean()) < 1 for mask in one["masks"].values())
    pair = fit(tmp_path, 2, pruning(**options))
    assert_equal(pair, one)
    checkpoints = [sorted(path.name for path in (tmp_path / each).rglob("*.ckpt")) for each in ("pair", "one")]
    assert checkpoints[0] == checkpoints[1] and "level_0.ckpt" in checkpoints[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("callbacks", "pool"),
    [
        (
            lambda: [pruning(pruner=Pruner(structure="units"), report=True, latency=False), DistillFrom(), EMA()],
            MaxPool,
        ),
        (lambda: [WeightSharing(epochs=1, num_images=300, latency=False)], MaxPool),
        (lambda: [TernaryWeights("ttq", begin_epoch=1, include=["conv.conv"])], nn.AvgPool2d),
        (lambda: [TernaryWeights("bwn", freeze=[0.5, 1.0], include=["conv.conv"])], MaxPool),
        (lambda: [QuantizationAwareTraining(begin_epoch=1)], nn.AvgPool2d),
    ],
    ids=["thinned, own teacher", "shared", "ttq", "frozen binary", "int8"],
)
def test_two_processes_make_the_same_net_small(tmp_path, callbacks, pool):
    """Sums of products of integers are often equal: which of two such pixels max pooling takes is up to the last bit of
    each sum, and so to the size of the batch. Rounded nets are compared with average pooling for that.
    """
    (one,) = fit(tmp_path, 1, *callbacks(), pool=pool)
    assert_equal(fit(tmp_path, 2, *callbacks(), pool=pool), one)
    files = [
        {str(path.relative_to(tmp_path / each)) for path in (tmp_path / each).rglob("*.*")} for each in ("one", "pair")
    ]
    assert files[1] - files[0] == {"process_1.pt"} and not files[0] - files[1], "the first process alone writes"
    for path in (tmp_path / "one").rglob("*.ckpt"):
        first, second = (
            torch.load(each, weights_only=True)["state_dict"]
            for each in (path, tmp_path / "pair" / path.relative_to(tmp_path / "one"))
        )
        nets = [{name: each[name] for name in each if name.startswith("net.")} for each in (first, second)]
        assert distance(*nets) < ROUNDING, path.name
