"""Checks before the first training step: which settings and callbacks weight sharing cannot be combined with."""

from lightning.pytorch import Callback, LightningModule, Trainer

from project.compression.company import Company, check_company
from project.compression.saved_epochs import epochs_between_checkpoints
from project.learning.classifier import Classifier
from project.losses.penalties import MaxNorm

_INTEGERS = (
    "integers with a scale per channel replace the shared values of a layer, so that the accuracy suffers twice and no "
    "bytes are saved: remove one of the two"
)
COMPANY = Company(
    never={
        "early stopping": "it would end the run before or during weight sharing: remove it and choose a smaller "
        "trainer.max_epochs",
        "low rank": "both end a run with a best.ckpt of their own: share the weights in a second run, which is fit "
        "with --ckpt_path set to the first run's checkpoints/best.ckpt and --trainer.max_epochs 0",
        "integer training": _INTEGERS,
        "integer file": _INTEGERS,
    },
    after={"pruning": "weights must be pruned before they are shared: put the pruning first"},
    before={
        "own teacher": "a DistillFrom without a teacher learns from the net that is kept when weight sharing begins: "
        "put DistillFrom after it"
    },
)


def check_sharing(trainer: Trainer, module: LightningModule, sharing: Callback, epochs: int) -> None:
    """Check that the run can share weights.

    The model must be a ``Classifier``, nothing may end the run early, each part of the run must write a checkpoint, and
    no callback may undo the work of another.

    Args:
        trainer: trainer of the run. Its ``max_epochs`` counts the epochs before sharing.
        module: model of the run.
        sharing: the weight sharing callback itself; its position among the callbacks is checked.
        epochs: number of epochs with shared weights; 1 or more.

    Raises:
        ValueError: if one of these conditions is not met.
    """
    if not isinstance(module, Classifier):
        raise ValueError(f"the model is a {type(module).__name__}, but WeightSharing needs a Classifier.")
    steps = trainer.max_steps > 0 and not trainer.fast_dev_run  # type: ignore[attr-defined]
    if trainer.max_epochs is None or trainer.max_epochs < 0 or steps:
        raise ValueError("weight sharing counts epochs, not steps: set trainer.max_epochs, and leave max_steps out.")
    limit = module.max_norm
    if type(limit) is not MaxNorm or limit.conv is not None or limit.fc is not None:
        raise ValueError(
            "max_norm is set, but it scales each unit by itself, so that units no longer share values: remove max_norm."
        )
    if trainer.precision == "16-mixed":
        raise ValueError(
            "precision is 16-mixed, but only the run's own optimizer skips steps with overflowing gradients, and the "
            "shared values have another one: choose bf16-mixed or 32-true."
        )
    check_company(trainer.callbacks, sharing)  # type: ignore[attr-defined]
    every = epochs_between_checkpoints(trainer)
    if epochs < every and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        raise ValueError(
            f"checkpoints are written every {every} epochs, but weight sharing trains for {epochs}: write checkpoints "
            "more often, or choose a larger number of epochs for WeightSharing."
        )
