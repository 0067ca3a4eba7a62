"""Loss of knowledge distillation: a student net learns from a teacher net's probabilities and from the labels.

Distilling the knowledge in a neural network, Hinton et al. 2015 (arXiv:1503.02531, sec. 2). The logits of both nets are
divided by a temperature T. The cross entropy between the two softened distributions is multiplied by T**2, so that the
size of its gradient does not depend on T. We use the Kullback-Leibler divergence instead of the cross entropy: it has
the same gradient, and it is 0 where both nets agree.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Distillation(nn.Module):
    """``(1 - weight) loss + weight T**2 KL(softmax(teacher / T) || softmax(student / T))``, a mean over the batch.

    :class:`project.callbacks.DistillFrom` uses it in a run.

    Example::

        >>> import torch
        >>> from project.losses import Distillation
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
        >>> images, loss = torch.rand(2, 1, 8, 8), torch.tensor(1.0)
        >>> distillation = Distillation(teacher=net, temperature=4.0, weight=0.5)
        >>> round(distillation(images, net(images), loss).item(), 3)  # both nets agree: KL is 0
        0.5

    Args:
        teacher: net that maps images ``[N, C, H, W]`` to logits ``[N, K]``. It is not trained and not part of the
            module's state.
        temperature: number T of the formula, above 0. At 1 the probabilities are compared as they are; a larger T gives
            the improbable classes more influence.
        weight: share of the teacher's term in the loss, in [0, 1].

    Raises:
        ValueError: if ``temperature`` or ``weight`` is outside its range.
    """

    def __init__(self, teacher: nn.Module, temperature: float = 4.0, weight: float = 0.9) -> None:
        super().__init__()
        check_distillation(temperature, weight)
        self._teacher = [teacher.eval().requires_grad_(False)]  # in a list, so that it is not a submodule
        self.temperature = temperature
        self.weight = weight

    def forward(self, images: Tensor, logits: Tensor, loss: Tensor) -> Tensor:
        """Combine the student's own loss with the teacher's term.

        Args:
            images: images ``[N, C, H, W]`` that both nets see.
            logits: logits ``[N, K]`` of the student for these images.
            loss: scalar loss of the student on the labels, without a teacher.
        """
        with torch.no_grad():
            wanted = self._teacher[0](images).float()
        student = F.log_softmax(logits / self.temperature, dim=1)
        target = F.log_softmax(wanted / self.temperature, dim=1)
        divergence = F.kl_div(student, target, reduction="batchmean", log_target=True)
        return (1 - self.weight) * loss + self.weight * self.temperature**2 * divergence


def check_distillation(temperature: float, weight: float) -> None:
    """Check the two numbers of a distillation.

    Args:
        temperature: number that the logits are divided by, above 0.
        weight: share of the teacher's term in the loss, in [0, 1].

    Raises:
        ValueError: if ``temperature`` is not positive or ``weight`` is not in [0, 1].
    """
    if not temperature > 0:
        raise ValueError(
            f"temperature is {temperature}, but it divides the logits: choose a number above 0, such as 4."
        )
    if not 0 <= weight <= 1:
        raise ValueError(f"weight is {weight}, but it is the teacher's share of the loss: choose a number from 0 to 1.")
