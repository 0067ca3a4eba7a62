"""What a model file says of its model, beside the weights."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Metadata:
    """What a file says of its model.

    Args:
        class_names: in the order of the logits.
        image_shape: (C, H, W).
        mean, std: per channel, of pixels in [0, 1]: the model takes ``(pixels / 255 - mean) / std``.
    """

    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def to_strings(self) -> dict[str, str]:
        """Keys and JSON values, and a line for whoever reads them without this package."""
        texts = {key: json.dumps(value, ensure_ascii=False) for key, value in asdict(self).items()}
        return texts | {"preprocessing": "images = (pixels / 255 - mean) / std per channel, float32 [batch, C, H, W]"}

    @classmethod
    def from_strings(cls, strings: Mapping[str, str]) -> "Metadata":
        """The opposite of :meth:`to_strings`.

        Raises:
            KeyError, ValueError: where a key is missing or no JSON.
        """
        values = {key: tuple(json.loads(strings[key])) for key in cls.__dataclass_fields__}
        return cls(**values)
