"""The checkpoint of a net without its pruned units, made when a run ends."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from project.compression.masks import Masks, apply_masks_
from project.compression.thinning import plan_thinning
from project.models.checkpoints import with_weights
from project.models.classifier import Classifier
from project.paths import write_whole

_TRAINING_STATE = ("loops", "callbacks", "ema_raw_weights", "MixedPrecision")


def thin_checkpoint(
    module: Classifier, source: Path, target: Path, masks: Masks, removed: Mapping[str, Sequence[int]]
) -> None:
    """Write a checkpoint of the smaller net, to test, export or train on (with a fresh optimizer, from epoch 0).

    Args:
        module: whose structure fits the source after its surgeries; left as it was.
        source: a checkpoint of the masked net.
        target: is overwritten as a whole.
        masks: on the net's parameters, by name.
        removed: numbers of the units that go, by layer.
    """
    small, checkpoint = _load(module, source)
    apply_masks_(small.net, {name: mask.cpu() for name, mask in masks.items()})
    small.operate_(plan_thinning(small.net, removed, small.image_shape))
    write_whole(target, lambda part: torch.save(fresh_checkpoint(small, checkpoint), part))


def write_fresh(module: Classifier, source: Path, target: Path) -> None:
    """Write a checkpoint of the same net without the state of its training; arguments as above."""
    same, checkpoint = _load(module, source)
    write_whole(target, lambda part: torch.save(fresh_checkpoint(same, checkpoint), part))


def _load(module: Classifier, source: Path) -> tuple[Classifier, dict[str, Any]]:
    checkpoint = torch.load(source, map_location="cpu", weights_only=True)
    return with_weights(module, checkpoint), checkpoint


def fresh_checkpoint(module: Classifier, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's content with this module's weights and a fresh optimizer, at epoch 0, without what belongs to the
    training that made it.
    """
    kept = {key: value for key, value in checkpoint.items() if key not in _TRAINING_STATE}
    module.on_save_checkpoint(kept)
    optimizer = module.make_optimizer(module.parameter_groups())
    fresh = {"state_dict": module.state_dict(), "epoch": 0, "global_step": 0}
    return kept | fresh | {"optimizer_states": [optimizer.state_dict()], "lr_schedulers": []}
