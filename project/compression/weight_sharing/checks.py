"""What weight sharing does not go together with, said before the first step."""

import math

from lightning.pytorch import Callback, LightningModule, Trainer

from project.callbacks.checkpoint import BestAndLast
from project.compression.company import Company, check_company
from project.learning.classifier import Classifier

_INTEGERS = (
    "integers with a scale per channel replace a layer's few values by others, so that both losses add up and nothing "
    "is saved: drop one"
)
COMPANY = Company(
    never={
        "early stopping": "it would end the run before or amid weight sharing: leave it out and choose a smaller "
        "max_epochs",
        "low rank": "both end a run with their best net: share in a second run, fit --ckpt_path checkpoints/best.ckpt "
        "of the first with trainer.max_epochs 0",
        "integer training": _INTEGERS,
        "integer file": _INTEGERS,
        "units removed at the end": "pruning removes units at the end of the run, after the weights were shared: set "
        "thin: false, or share in a second run: fit --ckpt_path with the first one's best.ckpt and "
        "--trainer.max_epochs 0",
    },
    after={"pruning": "what is pruned after it was given a value in vain: put the pruning first"},
    before={
        "own teacher": "teacher is null: the run's own net is kept when sharing begins, so put DistillFrom after it"
    },
)


def check_sharing(trainer: Trainer, module: LightningModule, sharing: Callback, epochs: int) -> None:
    """A Classifier, epochs that nothing cuts short, a checkpoint of each part, and no callback that undoes another.

    Args:
        trainer: its ``max_epochs`` is what comes before sharing.
        module: the model.
        sharing: the callback itself, for its place in the list.
        epochs: with shared weights.

    Raises:
        ValueError: otherwise.
    """
    if not isinstance(module, Classifier):
        raise ValueError(f"the model is a {type(module).__name__}, but weights are shared in a Classifier's net.")
    steps = trainer.max_steps > 0 and not trainer.fast_dev_run  # type: ignore[attr-defined]
    if trainer.max_epochs is None or trainer.max_epochs < 0 or steps:
        raise ValueError("weight sharing counts in epochs: set trainer.max_epochs, and leave max_steps out.")
    if module.max_norm.conv is not None or module.max_norm.fc is not None:
        raise ValueError("max_norm is set, but it would make shared values of different units different: drop it.")
    if trainer.precision == "16-mixed":
        raise ValueError(
            "precision is 16-mixed, whose overflowing gradients only the run's optimizer knows to skip: choose "
            "bf16-mixed or 32-true."
        )
    check_company(trainer.callbacks, sharing)
    best = next((c for c in trainer.checkpoint_callbacks if isinstance(c, BestAndLast)), None)
    every = 1 if best is None else math.lcm(best._every_n_epochs, trainer.check_val_every_n_epoch or 1)
    if epochs < every and not trainer.fast_dev_run:
        raise ValueError(
            f"checkpoints are written every {every} epochs, but weight sharing trains for {epochs}: write them more "
            "often, or raise its epochs."
        )
