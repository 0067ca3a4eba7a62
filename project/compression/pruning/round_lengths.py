"""What follows each pruning, and for how long: fine-tuning, rewinding, or new weights."""

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
        after, epochs_per_round, rewind_to, finetune_lr: see
            :class:`~project.compression.pruning.callback.IterativeMagnitudePruning`.
        dense_epochs: of the dense training.

    Raises:
        ValueError: for arguments out of their range, or that do not fit each other.
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
                f"rewind_to is {self.rewind_to!r}: write 0, a step such as 500it, or an epoch such as 2ep."
            )
        self._number, self._unit = int(match[1]), match[2] or "it"
        if self._number and self.after != "rewind":
            raise ValueError(
                f"rewind_to is {self.rewind_to!r}, but after is {self.after!r}: set after: rewind, or leave it out."
            )
        if self.epochs_per_round is not None and self.epochs_per_round < 1:
            raise ValueError(f"epochs_per_round is {self.epochs_per_round}: choose 1 or more, or null.")
        if self.finetune_lr <= 0:
            raise ValueError(
                f"finetune_lr is {self.finetune_lr}, but it multiplies the learning rate: choose about 0.1."
            )

    @property
    def round_epochs(self) -> int:
        """Epochs of a round. A rewound one that lasts as long as its part of the dense training ends in whole epochs:
        what is over trains at the schedule's last rate.
        """
        if self.epochs_per_round is not None:
            return self.epochs_per_round
        skipped = self._number if self._unit == "ep" else 0
        return max(self.dense_epochs - skipped, 1)

    def rewind_step(self, trainer: Trainer) -> int:
        return self._number if self._unit == "it" else round(self._number * steps_per_epoch(trainer))

    def phase(self, trainer: Trainer, number: int) -> Phase:
        """What the optimizer of a round is for; of round 0, the dense training."""
        if number == 0:
            return Phase(self.dense_epochs)
        if self.after == "rewind":
            return Phase(self.dense_epochs, first_step=self.rewind_step(trainer))
        return Phase(self.round_epochs, lr_factor=self.finetune_lr if self.after == "finetune" else 1.0)


def steps_per_epoch(trainer: Trainer) -> float:
    """Optimizer steps."""
    return trainer.estimated_stepping_batches / max(trainer.max_epochs or 1, 1)
