"""How the net is trained after each pruning, and for how long: fine-tuning, rewinding, or new weights."""

import re
from dataclasses import dataclass
from typing import Literal

from lightning.pytorch import Trainer

from project.learning.classifier import Phase

After = Literal["finetune", "rewind", "rewind_lr", "reinit"]


@dataclass
class RoundLengths:
    """Lengths of the dense training and of the rounds after it, in epochs and steps.

    Args:
        after, epochs_per_round, rewind_to, finetune_lr: the arguments of
            :class:`~project.compression.pruning.callback.IterativeMagnitudePruning` with these names.
        dense_epochs: number of epochs of the dense training, 1 or more; 0 until the trainer is known.

    Raises:
        ValueError: if an argument is outside its range, or if two arguments contradict each other.
    """

    after: After
    epochs_per_round: int | None
    rewind_to: str
    finetune_lr: float
    dense_epochs: int = 0

    def __post_init__(self) -> None:
        match = re.fullmatch(r"(\d+)(it|ep)?", str(self.rewind_to))
        if match is None or (match[2] is None and int(match[1])):
            raise ValueError(
                f"rewind_to is {self.rewind_to!r}, but it names a moment of the dense training: write 0, a step such "
                "as 500it, or an epoch such as 2ep."
            )
        self._number, self._unit = int(match[1]), match[2] or "it"
        if self._number and self.after != "rewind":
            raise ValueError(
                f"rewind_to is {self.rewind_to!r}, but after is {self.after!r}: set after: rewind, or leave rewind_to "
                "out."
            )
        if self.epochs_per_round is not None and self.epochs_per_round < 1:
            raise ValueError(
                f"epochs_per_round is {self.epochs_per_round}, but a round has at least one epoch: choose 1 or more, "
                "or null for the length of the dense training."
            )
        if self.finetune_lr <= 0:
            raise ValueError(
                f"finetune_lr is {self.finetune_lr}, but it multiplies the learning rate: choose a number above 0, "
                "such as 0.1."
            )

    @property
    def round_epochs(self) -> int:
        """Number of epochs of a round.

        Rounds have whole epochs. If ``rewind_to`` is a step within an epoch, the round is longer than the part of the
        dense training that it repeats. The steps that are over train at the schedule's last learning rate.
        """
        if self.epochs_per_round is not None:
            return self.epochs_per_round
        skipped = self._number if self._unit == "ep" else 0
        return max(self.dense_epochs - skipped, 1)

    def rewind_step(self, trainer: Trainer) -> int:
        """The optimizer step that ``rewind_to`` names, counted from 0."""
        return self._number if self._unit == "it" else round(self._number * steps_per_epoch(trainer))

    def reaches_rewind_point(self, trainer: Trainer) -> bool:
        """Whether the run is at the moment that ``rewind_to`` names, or after it.

        A resumed run may have other steps per epoch than before, so that an epoch is not a number of steps.
        """
        return (trainer.current_epoch if self._unit == "ep" else trainer.global_step) >= self._number

    def phase(self, number: int, rewound_at: float = 0.0) -> Phase:
        """The part of the run that a round is: its length, its first epoch and its learning rate.

        Args:
            number: number of the round, 0 or more; round 0 is the dense training.
            rewound_at: number of epochs, 0 or more, after which the dense net had the weights of a rewound round.
        """
        if number == 0:
            return Phase(self.dense_epochs)
        if self.after == "rewind":
            return Phase(self.dense_epochs, first_epoch=rewound_at)
        return Phase(self.round_epochs, lr_factor=self.finetune_lr if self.after == "finetune" else 1.0)


def steps_per_epoch(trainer: Trainer) -> float:
    """Number of optimizer steps in an epoch."""
    return trainer.estimated_stepping_batches / max(trainer.max_epochs or 1, 1)


def step_of(trainer: Trainer, batch_idx: int) -> int:
    """The step of a batch, counted as if all epochs had the steps of this one.

    A resumed run with another batch size has made other steps before, but its epochs mean the same.
    """
    return round(trainer.current_epoch * steps_per_epoch(trainer)) + batch_idx // trainer.accumulate_grad_batches
