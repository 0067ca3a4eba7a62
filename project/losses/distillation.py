"""Learning from another net's probabilities beside the labels.

Distilling the knowledge in a neural network, Hinton et al. 2015 (arXiv:1503.02531, sec. 2): both nets' logits are
divided by a temperature T, and the cross entropy between the softened distributions is multiplied by T**2, which keeps
its gradient's size. We take the divergence in place of the cross entropy: the same gradient, and 0 where both agree.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Distillation(nn.Module):
    """``(1 - weight) loss + weight T**2 KL(softmax(teacher / T) || softmax(student / T))``, a mean over the batch.

    Args:
        teacher: images ``[N, C, H, W]`` -> logits ``[N, K]``; neither trained nor part of the module's state.
        temperature: T, above 0; 1 compares the probabilities as they are, more also those of the improbable classes.
        weight: share of the teacher, in [0, 1].

    Raises:
        ValueError: for numbers outside their range.
    """

    def __init__(self, teacher: nn.Module, temperature: float = 4.0, weight: float = 0.9) -> None:
        super().__init__()
        check_distillation(temperature, weight)
        self._teacher = [teacher.eval().requires_grad_(False)]  # in a list it is no part of the module
        self.temperature = temperature
        self.weight = weight

    def forward(self, images: Tensor, logits: Tensor, loss: Tensor) -> Tensor:
        """The student's images ``[N, C, H, W]`` and logits ``[N, K]``, and its loss without a teacher."""
        with torch.no_grad():
            wanted = self._teacher[0](images).float()
        student = F.log_softmax(logits / self.temperature, dim=1)
        target = F.log_softmax(wanted / self.temperature, dim=1)
        divergence = F.kl_div(student, target, reduction="batchmean", log_target=True)
        return (1 - self.weight) * loss + self.weight * self.temperature**2 * divergence


def check_distillation(temperature: float, weight: float) -> None:
    """Refuse numbers that make no sense.

    Raises:
        ValueError: for a temperature that is not positive, a weight outside [0, 1].
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, but logits are divided by it: choose about 4.")
    if not 0 <= weight <= 1:
        raise ValueError(f"weight is {weight}, but it is the teacher's share of the loss: choose 0 to 1.")
