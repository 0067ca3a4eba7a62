"""A layer keeps its best weight, however much is pruned, and the user is told once."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.nets import build, images_for
from helpers.pruning_run import NUM_PRUNED, assert_same_runs, fit, num_zeros, pruning, weights_of
from helpers.slow import fast
from helpers.stop_after import StopAfter
from torch import Tensor, nn

from project.callbacks import EMA
from project.compression import Gradual, Iterative, OneShot, Pruner, QualityFactors, apply_masks_

SMALL, ROUNDS = "1.weight", 4


def three_layers() -> nn.Sequential:
    """1.weight [4, 64] has the least weights, so that a global ranking would take all of them first."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, 200), nn.ReLU(), nn.Linear(200, 10))
    with torch.no_grad():
        net[1].weight.mul_(1e-3)
    return net


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The layers that a warning names, and it has a remedy."""
    messages = [record.getMessage() for record in caplog.records if "one weight left" in record.getMessage()]
    assert all("to exclude" in message for message in messages)
    return [message.split()[0] for message in messages]


@pytest.mark.parametrize(
    ("pruner", "amount"),
    [
        (Pruner(), 0.4),
        (Pruner(criterion="gradient"), 0.6),
        (Pruner(scope="layer", rates={"^1$": 3.0}), 0.4),
        (Pruner(scope="deviation", rates={"^1$": 100.0}), 0.4),
        (Pruner(budget="effective"), 0.4),
        (Pruner(budget="effective", scope="layer", rates={"^1$": 3.0}), 0.4),
    ],
    ids=["global", "gradient", "layer", "deviation", "effective", "effective layer"],
)
def test_a_layer_keeps_its_best_weight_through_all_rounds_and_is_named_once(pruner, amount, caplog):
    net = three_layers()
    groups, masks = pruner.groups(net, (1, 8, 8)), {}
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.randn(8, 1, 8, 8, generator=generator), torch.arange(8)
    for _ in range(ROUNDS):
        before = masks
        masks = pruner.prune(net, groups, masks, amount, images=images, labels=labels)
        assert all((masks[name] <= mask).all() for name, mask in before.items())
    assert masks[SMALL].sum() == 1
    if pruner.criterion == "magnitude" and pruner.budget == "count":
        assert masks[SMALL].flatten().argmax() == net[1].weight.abs().flatten().argmax()
    assert told(caplog) == ["1"]


def test_the_count_is_exact_although_layers_keep_a_weight():
    net, pruner, masks = three_layers(), Pruner(), {}
    groups, left = pruner.groups(net, (1, 8, 8)), 4 * 64 + 4 * 200
    for amount in (0.3, 0.3, 0.9):
        masks = pruner.prune(net, groups, masks, amount)
        left -= round(amount * left)
        assert sum(int(mask.sum()) for mask in masks.values()) == left
    assert masks[SMALL].sum() == 1


def test_a_layer_that_keeps_more_than_one_is_not_named(caplog):
    Pruner(keep=0.02).prune(net := three_layers(), Pruner().groups(net, (1, 8, 8)), {}, 0.4)
    assert not told(caplog)


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("name", ["LeNet5-28x19", "SmallInception-28", "normed vectors"])
def test_the_last_weights_are_no_dead_ends(name, scope):
    """Almost all is pruned, but the logits still depend on the image."""
    torch.manual_seed(0)
    net, images = build(name).eval(), images_for(name)
    shape = tuple(images.shape[1:])
    pruner = Pruner(budget="effective", criterion="random", scope=scope, exclude=[])
    groups = pruner.groups(net, shape)
    most = pruner.most(net, groups, shape)
    masks: dict[str, Tensor] = {}
    for _ in range(3):
        masks = pruner.prune(net, groups, masks, 1 - (1 - most) ** (1 / 3))
        assert all(masks[group.parameters[0]].any() for group in groups)
    apply_masks_(net, masks)
    with torch.no_grad():  # no ReLU and no shift of a norm hides what passes
        for parameter in net.parameters():
            parameter.abs_()
    images = images.abs().requires_grad_()
    net(images).sum().backward()
    assert images.grad is not None and images.grad.any()


# -- runs ------------------------------------------------------------------------------------------------------------


RUNS: dict[str, Callable[[], list[Any]]] = {
    "rounds": lambda: [pruning(schedule=Iterative(0.7, 4), after="rewind", epochs_per_round=1), EMA(0.8)],
    "dead ends": lambda: [pruning(schedule=Iterative(0.7, 4), pruner=Pruner(budget="effective"), epochs_per_round=1)],
    "gradual": lambda: [pruning(schedule=Gradual(0.99, 0.5, 5.0, every_n_steps=4))],
    "deviation": lambda: [
        pruning(
            schedule=QualityFactors([2.0] * 4),
            pruner=Pruner(scope="deviation", rates={"conv2": 9.0}),
            epochs_per_round=1,
        )
    ],
}


@pytest.mark.parametrize("callbacks", fast(RUNS))
def test_a_run_ends_well_and_resumes_to_the_same_bits(tmp_path: Path, caplog, callbacks):
    epochs = 6 if callbacks == "gradual" else 2
    with caplog.at_level(logging.WARNING, "project"):
        whole = fit(tmp_path / "whole", *RUNS[callbacks](), epochs=epochs).run
    assert told(caplog) == (["conv1.conv", "conv2.conv"] if callbacks == "dead ends" else ["conv2.conv"])
    assert (weights_of(whole.best_checkpoint)["conv2.conv.weight"] != 0).sum() == 1
    if callbacks in ("rounds", "gradual"):
        assert num_zeros(weights_of(whole.best_checkpoint)) == pytest.approx(
            NUM_PRUNED * (0.99 if callbacks == "gradual" else 1 - 0.3**4), abs=2
        )
    run = None
    for number, stop in enumerate((3, 5, 99)):
        run = fit(tmp_path / "resumed", *RUNS[callbacks](), StopAfter(stop), epochs=epochs, seed=number, resume=run).run
    assert run is not None
    assert_same_runs(run, whole)


def test_more_than_all_but_one_weight_a_layer_is_refused_before_the_first_step(tmp_path):
    with pytest.raises(ValueError, match=r"at least one weight a layer the layers .* 99[.]8366 % at most: prune less"):
        fit(tmp_path, pruning(schedule=OneShot(0.999)))
    assert not list(tmp_path.rglob("*.ckpt"))


def test_rounding_in_earlier_rounds_does_not_end_the_last_one():
    """Eight rounds leave 6 of 60 weights, which is what ``keep`` protects, but seven of them have rounded to 7."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(15, 2), nn.Linear(2, 15), nn.Linear(15, 1))
    pruner, schedule, masks = Pruner(keep=0.1), Iterative(1 - 0.1**0.125, 8), {}
    groups = pruner.groups(net, (1, 3, 5))
    assert schedule.level(-1) <= pruner.most(net, groups) + 1e-9
    for amount in schedule.amounts():
        masks = pruner.prune(net, groups, masks, amount)
    assert [int(mask.sum()) for mask in masks.values()] == [3, 3]
