"""Checkpoints of a :class:`~project.learning.classifier.Classifier`: read a file, load its net, write a new file."""

import os
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from project.learning.classifier import Classifier


def check_checkpoint(path: str | os.PathLike[str] | None, argument: str = "ckpt_path") -> dict[str, Any] | None:
    """The content of a checkpoint, with tensors that hold no data (on the meta device); ``None`` without a path.

    Args:
        path: path of the file.
        argument: name of the argument that gave the path, for the error message.

    Raises:
        ValueError: if the file does not exist, or if it is no checkpoint of a run.
    """
    if path is None:
        return None
    if not Path(path).is_file():
        raise ValueError(
            f"{argument} is {str(path)!r}, but there is no such file: name one below a run's checkpoints/."
        )
    try:
        checkpoint = torch.load(path, map_location="meta", weights_only=True)
    except Exception:  # torch raises half a dozen kinds of exceptions for a file that it did not write
        checkpoint = None
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(
            f"{argument} is {str(path)!r}, but that is not a checkpoint of a run: name one below a run's checkpoints/."
        )
    return checkpoint


def take_weights_(module: Any, path: str | os.PathLike[str]) -> None:
    """Give ``module`` the structure and the weights of a checkpoint, and nothing of its training.

    Args:
        module: LightningModule that is changed.
        path: path of the checkpoint.

    Raises:
        ValueError: if there is no such checkpoint, or if it belongs to another net.
    """
    check_checkpoint(path, "weights")
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"])


def with_weights(module: "Classifier", checkpoint: dict[str, Any]) -> "Classifier":
    """A copy of ``module`` on the CPU, in eval mode, with the structure and the weights of a checkpoint's content."""
    # `make_optimizer` refers to everything that the command line built, also to the trainer, which cannot be copied if
    # there are several processes. So the copy shares it.
    copy = deepcopy(module, {id(module.make_optimizer): module.make_optimizer}).to("cpu")
    copy.on_load_checkpoint(checkpoint)
    copy.load_state_dict(checkpoint["state_dict"])
    return copy.eval()


def load_net(module: "Classifier", path: Path) -> nn.Module:
    """The net of a checkpoint, in eval mode and float32 on the CPU; ``module`` does not change."""
    return with_weights(module, torch.load(path, map_location="cpu", weights_only=True)).net.float()


_TRAINING_STATE = ("loops", "callbacks", "ema_raw_weights", "MixedPrecision")


def load_with_weights(module: "Classifier", source: Path) -> tuple["Classifier", dict[str, Any]]:
    """A copy of ``module`` with the weights of the checkpoint ``source``, and the checkpoint's content."""
    checkpoint = torch.load(source, map_location="cpu", weights_only=True)
    return with_weights(module, checkpoint), checkpoint


def fresh_checkpoint(module: "Classifier", checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a checkpoint with this module's weights and a new optimizer, at epoch 0.

    The state of the training that made ``checkpoint`` is left out.
    """
    kept = {key: value for key, value in checkpoint.items() if key not in _TRAINING_STATE}
    module.on_save_checkpoint(kept)
    optimizer = module.make_optimizer(module.parameter_groups())
    fresh = {"state_dict": module.state_dict(), "epoch": 0, "global_step": 0}
    return kept | fresh | {"optimizer_states": [optimizer.state_dict()], "lr_schedulers": []}


def mismatch(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str | None:
    """The first difference between two state dicts, in words."""
    for key, value in wanted.items():
        if key not in given:
            return f"it has no {key}"
        if given[key].shape != value.shape:
            return f"{key} is {list(given[key].shape)}, this net's is {list(value.shape)}"
    extra = next((key for key in given if key not in wanted), None)
    return extra and f"it has {extra}, which this net lacks"
