"""Cross entropy with label smoothing, for class numbers and for mixed targets.

Rethinking the Inception architecture, Szegedy et al. 2015 (arXiv:1512.00567, sec. 7): the target distribution becomes
``q'(k) = (1 - eps) q(k) + eps / K``. For one-hot ``q`` that is the paper's equation; the soft ``q`` of MixUp or CutMix
goes through the same line.
"""

from torch import Tensor, nn
from torch.nn import functional as F


class CrossEntropy(nn.Module):
    """Mean over the batch of ``-sum_k q'(k) log softmax(logits)(k)``.

    Smoothing acts in train and eval alike: where the validation loss of runs is to be compared, measure it with 0.

    Args:
        label_smoothing: eps, the mass spread evenly over all classes, in [0, 1).

    Raises:
        ValueError: for a smoothing outside [0, 1).
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ValueError(
                f"label_smoothing is {label_smoothing}, but it is the share of the target spread over all classes: "
                "choose a number in [0, 1), such as 0.1; 0 switches it off."
            )
        self.label_smoothing = label_smoothing

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Logits [N, K]; targets are int64 class numbers [N], or float distributions [N, K]. Returns a scalar."""
        return F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)

    def extra_repr(self) -> str:
        return f"label_smoothing={self.label_smoothing}"
