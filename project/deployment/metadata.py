"""What a model file holds beside the weights: class names, image shape and normalisation."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass


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
            ValueError: if a text is not JSON.
        """
        values = {key: tuple(json.loads(strings[key])) for key in cls.__dataclass_fields__}
        return cls(**values)
