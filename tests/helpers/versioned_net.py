"""A net that asks for the version of the code that wrote its weights, as torchvision's MNASNet does.

PyTorch keeps the versions of all modules beside the tensors of a state dict. A copy into a plain dict loses them.
"""

from typing import Any

from torch import nn


class Versioned(nn.Sequential):
    """A convolution with batch norm and a linear layer: ``[N, 1, 8, 8] -> [N, num_classes]``."""

    _version = 2

    def __init__(self, num_classes: int = 10, image_shape: tuple[int, int, int] = (1, 8, 8)) -> None:
        conv, pool = nn.Conv2d(image_shape[0], 8, 3, stride=2), nn.AdaptiveAvgPool2d(1)
        super().__init__(conv, nn.BatchNorm2d(8), nn.ReLU(), pool, nn.Flatten(), nn.Linear(8, num_classes))

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: dict[str, Any], *rest: Any, **options: Any
    ) -> None:
        if local_metadata.get("version") != 2:
            raise ValueError(f"version should be 2 instead of {local_metadata.get('version')}")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest, **options)
