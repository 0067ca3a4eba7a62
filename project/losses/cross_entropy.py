"""Cross entropy with label smoothing and class weights, for class numbers and for mixed targets.

Rethinking the Inception architecture, Szegedy et al. 2015 (arXiv:1512.00567, sec. 7): the target distribution becomes
``q'(k) = (1 - eps) q(k) + eps / K``. For a one-hot ``q`` this is the paper's equation. The soft ``q`` of MixUp or
CutMix goes through the same formula.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class CrossEntropy(nn.Module):
    """Mean over the batch of ``-sum_k w_k q'(k) log softmax(logits)(k)``, as ``torch.nn.functional.cross_entropy``.

    Smoothing acts in train mode and in eval mode. To compare validation losses of runs, measure them without smoothing.

    With class weights and class numbers the sum over the batch is divided by the sum of the images' weights. With mixed
    targets (MixUp, CutMix) it is divided by the number of images. Smoothing comes before the weights: each class's
    share of the smoothed target is multiplied by that class's weight.

    Example::

        model:
          loss:
            class_path: project.losses.CrossEntropy
            init_args:
              label_smoothing: 0.1
              class_weights: [1, 1, 1, 1, 1, 1, 1, 1, 2, 2]

    Args:
        label_smoothing: share eps of the target that is spread evenly over all classes, in [0, 1).
        class_weights: K factors on the loss, 0 or more, one per class in the order of the labels. ``None`` gives all
            classes the factor 1.

    Raises:
        ValueError: if the smoothing is outside [0, 1), if a weight is negative, or if all weights are 0.
    """

    class_weights: Tensor | None

    def __init__(self, label_smoothing: float = 0.0, class_weights: Sequence[float] | None = None) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ValueError(
                f"label_smoothing is {label_smoothing}, but it is the share of the target spread over all classes: "
                "choose a number in [0, 1), such as 0.1; 0 switches it off."
            )
        if class_weights is not None and not (
            all(0 <= weight < float("inf") for weight in class_weights) and any(class_weights)
        ):
            raise ValueError(
                f"class_weights is {list(class_weights)}, but each is the factor on a class's loss: choose one number "
                "per class, 0 or more, at least one of them above 0."
            )
        self.label_smoothing = label_smoothing
        weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.register_buffer("class_weights", weights, persistent=False)

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss, a scalar. Logits are ``[N, K]``; targets are classes ``[N]`` int64 or distributions ``[N, K]``."""
        weights = None if self.class_weights is None else self.class_weights.to(logits.dtype)
        return F.cross_entropy(logits, targets, weight=weights, label_smoothing=self.label_smoothing)

    def extra_repr(self) -> str:
        weights = "" if self.class_weights is None else f", class_weights={self.class_weights.tolist()}"
        return f"label_smoothing={self.label_smoothing}{weights}"
