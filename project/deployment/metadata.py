"""What a model file holds beside the weights: class names, image shape and normalisation."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

_LARGEST = 1e12
"""Limit for means and standard deviations, which float32 holds with its inverse."""
_MAX_IMAGE = 1 << 30
"""Largest number of values of an image."""


@dataclass(frozen=True)
class Metadata:
    """What a file tells about its model: class names, image shape and normalisation.

    Pixels are divided by 255 first: the model takes ``(pixels / 255 - mean) / std``.

    Example::

        >>> from project.deployment import Metadata
        >>> metadata = Metadata(("cat", "dog"), (1, 28, 28), mean=(0.29,), std=(0.35,))
        >>> Metadata.from_strings(metadata.to_strings()) == metadata
        True

    Args:
        class_names: name of each class, in the order of the logits.
        image_shape: shape (C, H, W) of one image.
        mean: mean of each channel, for pixels from 0 to 1.
        std: standard deviation of each channel, for pixels from 0 to 1; above 0.
    """

    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def to_strings(self) -> dict[str, str]:
        """The fields as JSON texts, and a line ``preprocessing`` for people who read the file without this package."""
        texts = {key: json.dumps(value, ensure_ascii=False) for key, value in asdict(self).items()}
        return texts | {"preprocessing": "images = (pixels / 255 - mean) / std per channel, float32 [batch, C, H, W]"}

    @classmethod
    def from_strings(cls, strings: Mapping[str, str]) -> "Metadata":
        """Read what :meth:`to_strings` returned.

        Args:
            strings: JSON text of each field, by the field's name. Other keys are ignored.

        Raises:
            KeyError: if a field is missing.
            ValueError: if a text is not JSON, or a value is outside its range.
        """
        values = {key: json.loads(strings[key]) for key in cls.__dataclass_fields__}
        if not all(isinstance(value, list) for value in values.values()):
            raise ValueError("a field is no list")
        metadata = cls(**{key: tuple(value) for key, value in values.items()})
        metadata.check()
        return metadata

    def check(self) -> None:
        """Check every value's type and range.

        Raises:
            ValueError: if there is no class, a size is not a whole number above 0, or normalisation does not fit.
        """
        known = len(self.class_names) > 0 and all(isinstance(name, str) for name in self.class_names)
        known &= len(self.image_shape) == 3 and all(type(side) is int and side > 0 for side in self.image_shape)
        known &= len(self.mean) == len(self.std) == self.image_shape[0] if self.image_shape else False
        known &= all(type(value) in (int, float) for value in (*self.mean, *self.std))
        known = known and all(-_LARGEST < value < _LARGEST for value in self.mean)
        known = known and all(1 / _LARGEST < value < _LARGEST for value in self.std)
        if not known or math.prod(self.image_shape) > _MAX_IMAGE:
            raise ValueError("classes, image shape, mean and std are not those of a classifier")
