"""What Lightning's ``ModelPruning`` (2.6.6) does wrong, and ours does not: the same run with each of them.

Each test raises :class:`Defect` for its defect alone; whatever else goes wrong fails with both callbacks. Lightning's
is expected to raise it: a release that mends one makes its test fail here (``strict``).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.pruning_run import PRUNED, STEPS, Outcome, TinyNet, Watch, differences, fit, pruning, state_of, weights_of
from helpers.stop_after import StopAfter
from lightning.pytorch.callbacks import Callback, ModelPruning
from torch import Tensor, nn

from project.compression import Iterative, Pruner


class Defect(Exception):  # noqa: N818
    """What the test is about has happened."""


class OfConvolutions(ModelPruning):
    """Prunes what ours does, since its defaults are a test of their own."""

    def filter_parameters_to_prune(self, parameters_to_prune: Any = ()) -> Any:
        return [(module, name) for module, name in parameters_to_prune if isinstance(module, nn.Conv2d)]


def fit_lightnings(
    folder: Path,
    *callbacks: Callback,
    rounds: int,
    epochs: int,
    rewind: bool = False,
    defaults: bool = False,
    permanent: bool = True,
    **options: Any,
) -> Outcome:
    """``epochs`` epochs; after each of the first ``rounds`` half of what is left goes."""
    callback = (ModelPruning if defaults else OfConvolutions)(
        "l1_unstructured",
        use_global_unstructured=not defaults,
        amount=0.5,
        apply_pruning=lambda epoch: epoch < rounds,
        use_lottery_ticket_hypothesis=rewind,
        make_pruning_permanent=permanent,
    )
    # torch's global pruning raises for channels-last weights
    return fit(folder, callback, *callbacks, epochs=epochs, channels_last=False, **options)


def fit_ours(
    folder: Path,
    *callbacks: Callback,
    rounds: int,
    epochs: int,
    rewind: bool = False,
    defaults: bool = False,
    permanent: bool = True,
    **options: Any,
) -> Outcome:
    callback = pruning(
        schedule=Iterative(0.5, rounds),
        pruner=Pruner(scope="layer" if defaults else "global"),
        after="rewind" if rewind else "rewind_lr",
        epochs_per_round=(epochs - 1) // rounds,
    )
    return fit(folder, callback, *callbacks, epochs=1, **options)


Fit = Callable[..., Outcome]
of_both = pytest.mark.parametrize(
    "fit_with",
    [
        pytest.param(fit_lightnings, id="lightning", marks=pytest.mark.xfail(strict=True, raises=Defect)),
        pytest.param(fit_ours, id="ours"),
    ],
)


def convolutions(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their weights, of ``torch.nn.utils.prune`` the originals times their masks."""
    return {
        name: weights[name] if name in weights else weights[f"{name}_orig"] * weights[f"{name}_mask"] for name in PRUNED
    }


def share_of_zeros(weights: dict[str, Tensor]) -> float:
    return float(torch.cat([value.flatten() == 0 for value in convolutions(weights).values()]).float().mean())


def is_masked(weights: dict[str, Tensor], of: dict[str, Tensor]) -> bool:
    """Whether the weights that are not zero are those ``of`` another moment."""
    weights, of = convolutions(weights), convolutions(of)
    return not differences(weights, {name: of[name] * (weights[name] != 0) for name in PRUNED})


@of_both
def test_a_resumed_run_stays_sparse(fit_with: Fit, tmp_path: Path) -> None:
    """Lightning's writes permanent zeros into the checkpoint and no masks: what follows fills them up again."""
    stopped = fit_with(tmp_path, StopAfter(2), rounds=1, epochs=3).run
    assert share_of_zeros(weights_of(stopped.last_checkpoint)) == 0.5
    whole = fit_with(tmp_path, rounds=1, epochs=3)
    assert share_of_zeros(state_of(whole.model.net)) == 0.5
    resumed = fit_with(tmp_path, rounds=1, epochs=3, resume=stopped)
    assert resumed.trainer.global_step == whole.trainer.global_step == 3 * STEPS
    if share_of_zeros(state_of(resumed.model.net)) < 0.01:
        raise Defect("sparsity 0.5 -> 0")
    assert not differences(state_of(resumed.model.net), state_of(whole.model.net))


@of_both
def test_checkpoints_hold_the_nets_own_keys(fit_with: Fit, tmp_path: Path) -> None:
    """Lightning's, told to keep its masks, saves ``weight_orig`` and ``weight_mask``, which no fresh net has."""
    run = fit_with(tmp_path, rounds=1, epochs=2, permanent=False).run
    weights = weights_of(run.last_checkpoint)
    assert share_of_zeros(weights) == 0.5
    try:
        TinyNet().load_state_dict(weights)
    except RuntimeError as error:
        assert "conv1.conv.weight_orig" in str(error)
        raise Defect("Unexpected key(s)") from error


@of_both
def test_every_rewinding_rewinds(fit_with: Fit, tmp_path: Path) -> None:
    """Lightning's gives the net the saved tensors themselves, which training then changes."""
    watch = Watch()
    fit_with(tmp_path, watch, rounds=2, epochs=3, rewind=True)
    start, first, second = (watch.before[STEPS * epoch].weights for epoch in range(3))
    assert (share_of_zeros(first), share_of_zeros(second)) == (0.5, 0.75)
    assert is_masked(first, of=start)
    if is_masked(second, of=watch.after[2 * STEPS - 1].weights):
        raise Defect("the second rewinding did nothing")
    assert is_masked(second, of=start)


@of_both
def test_a_resumed_run_rewinds_to_the_weights_of_its_own_start(fit_with: Fit, tmp_path: Path) -> None:
    """Lightning's copies the weights in ``setup``, before a checkpoint is loaded: those of the new process's net."""
    first, then = Watch(), Watch()
    run = fit_with(tmp_path, first, StopAfter(1), rounds=2, epochs=3, rewind=True, seed=0).run
    fit_with(tmp_path, then, rounds=2, epochs=3, rewind=True, seed=1, resume=run)
    torch.manual_seed(1)
    if is_masked(then.before[2 * STEPS].weights, of=TinyNet().state_dict()):
        raise Defect("rewound to the random weights of the process that resumed")
    assert is_masked(then.before[2 * STEPS].weights, of=first.before[0].weights)


@of_both
@pytest.mark.parametrize("what", ["conv1.norm.weight", "conv1.norm.bias", "fc.weight", "fc.bias"])
def test_defaults_leave_norms_biases_and_the_head_alone(fit_with: Fit, what: str, tmp_path: Path) -> None:
    """Of Lightning's, whatever is called weight or bias is pruned."""
    weights = weights_of(fit_with(tmp_path, rounds=1, epochs=2, defaults=True).run.last_checkpoint)
    assert share_of_zeros(weights) == 0.5
    share = float((weights[what] == 0).float().mean())
    if share == 0.5:
        raise Defect(f"half of {what} is gone")
    assert share == 0


@of_both
@pytest.mark.parametrize("what", ["momentum", "schedule"])
def test_the_optimizer_is_rewound_with_the_weights(fit_with: Fit, what: str, tmp_path: Path) -> None:
    """Lightning's rewinds the weights alone."""
    watch = Watch()
    fit_with(tmp_path, watch, rounds=1, epochs=2, rewind=True)
    start, rewound = watch.before[0], watch.before[STEPS]
    assert is_masked(rewound.weights, of=start.weights) and not start.state
    if what == "momentum" and any(float(each["momentum_buffer"].abs().sum()) > 0 for each in rewound.state.values()):
        raise Defect("the momentum of the weights that were")
    if what == "schedule" and rewound.lr < start.lr:
        raise Defect(f"the rate goes on at {rewound.lr}, from {start.lr} at the start")
    assert rewound.lr == start.lr or what == "momentum"
