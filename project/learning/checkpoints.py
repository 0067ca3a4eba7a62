"""Checkpoints of a :class:`~project.learning.classifier.Classifier`: read a file, load its net, write a new file."""

import io
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import ZIP_STORED, ZipFile

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from torch import Tensor, nn

from project.frame.paths import write_whole

if TYPE_CHECKING:
    from project.learning.classifier import Classifier

log = logging.getLogger(__name__)


def check_checkpoint(path: str | os.PathLike[str] | None, argument: str = "ckpt_path") -> dict[str, Any] | None:
    """The content of a checkpoint, with tensors that hold no data (on the meta device); ``None`` without a path.

    Args:
        path: path of the file.
        argument: name of the argument that gave the path, for the error message.

    Raises:
        ValueError: if the file does not exist, or if it is no checkpoint of a run.
    """
    return None if path is None else read_checkpoint(path, "meta", argument)


def read_checkpoint(path: str | os.PathLike[str], device: str = "cpu", argument: str = "ckpt_path") -> dict[str, Any]:
    """The content of a checkpoint, with its tensors on a device.

    Args:
        path: path of the file.
        device: device of the tensors, such as ``cpu``, or ``meta`` for tensors without data.
        argument: name of the argument that gave the path, for the error message.

    Raises:
        ValueError: if the file does not exist, is damaged (each part has a checksum, which torch does not check), or is
            no checkpoint.
    """
    if not Path(path).is_file():
        raise ValueError(
            f"{argument} is {str(path)!r}, but there is no such file: name one below a run's checkpoints/."
        )
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True) if _is_whole(path) else None
    except Exception:  # torch raises half a dozen kinds of exceptions for a file that it did not write
        checkpoint = None
    known = isinstance(checkpoint, dict) and isinstance(checkpoint.get("hyper_parameters", {}), dict)
    state = checkpoint.get("state_dict") if checkpoint is not None and known else None
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(
            f"{argument} is {os.fspath(path)!r}, but that is not a checkpoint of a run, or it is damaged: name one "
            "below a run's checkpoints/."
        )
    assert checkpoint is not None
    return checkpoint


def save_checkpoint(checkpoint: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a checkpoint beside its place, then rename it. If the disk is full, the older file stays whole.

    Args:
        checkpoint: content of the checkpoint.
        path: path of the file; its folder is made if it is missing.
    """
    content = io.BytesIO()  # not the file itself, whose name would be part of the content
    torch.save(checkpoint, content)
    write_whole(Path(path), lambda part: part.write_bytes(content.getbuffer()))


def newest_whole(folder: Path, *, alone: bool) -> str | None:
    """The checkpoint with which a run goes on: ``last.ckpt``, or the newest other one if that is missing or damaged.

    Args:
        folder: folder of the run's checkpoints; ``None`` is returned if none of them is whole.
        alone: whether this process is the only one that trains the run. It then renames damaged files, and deletes
            those that killed processes have left half written.
    """
    found: dict[tuple[int, int], Path] = {}
    for path in sorted(folder.glob("*.ckpt"), key=lambda path: path.name != "last.ckpt"):
        if path.name.startswith("."):
            path.unlink() if alone else None
            continue
        try:
            checkpoint = read_checkpoint(path, "meta")
        except ValueError:
            if alone:
                aside = path.replace(f"{path}.damaged")
                log.warning("%s is damaged and was renamed to %s", path, aside.name)
            continue
        if path.name == "last.ckpt":
            return str(path)
        if checkpoint.get("loops") and checkpoint.get("optimizer_states"):  # not the end of a compression
            found[checkpoint["global_step"], path.stat().st_mtime_ns] = path
    log.info("There is no last.ckpt: the run goes on with %s", found[max(found)] if found else "its first epoch")
    return str(found[max(found)]) if found else None


class WholeFiles(TorchCheckpointIO):
    """Lightning's way to write checkpoints, but with :func:`save_checkpoint`.

    Lightning 2.6 writes into the folder for temporary files, then moves the file, which copies it if that folder is on
    another disk.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if storage_options is None and "://" not in str(path):
            save_checkpoint(checkpoint, path)
        else:
            super().save_checkpoint(checkpoint, path, storage_options)


def take_weights_(module: Any, path: str | os.PathLike[str]) -> None:
    """Give ``module`` the structure and the weights of a checkpoint, and nothing of its training.

    Args:
        module: LightningModule that is changed.
        path: path of the checkpoint.

    Raises:
        ValueError: if there is no such checkpoint, or if it belongs to another net.
    """
    _fill_(module, {**read_checkpoint(path, argument="weights"), "hyper_parameters": {}})  # its classes may be others


def _is_whole(path: str | os.PathLike[str]) -> bool:
    """Whether each part of the file has its checksum, and the parts are no longer than the file."""
    with ZipFile(path) as file:
        parts = file.infolist()
        small = sum(part.file_size for part in parts) <= Path(path).stat().st_size
        return small and all(part.compress_type == ZIP_STORED for part in parts) and file.testzip() is None


def with_weights(module: "Classifier", checkpoint: dict[str, Any]) -> "Classifier":
    """A copy of ``module`` on the CPU, in eval mode, with the structure and the weights of a checkpoint's content."""
    # `make_optimizer` refers to everything that the command line built, also to the trainer, which cannot be copied if
    # there are several processes. So the copy shares it.
    copy = deepcopy(module, {id(module.make_optimizer): module.make_optimizer}).to("cpu")
    _fill_(copy, checkpoint)
    return copy.eval()


def _fill_(module: Any, checkpoint: dict[str, Any]) -> None:
    with refused_if_damaged():
        module.on_load_checkpoint(checkpoint)
        module.load_state_dict(checkpoint["state_dict"])


@contextmanager
def refused_if_damaged() -> Iterator[None]:
    """Raise a ValueError of one sentence for any error while a net takes what a checkpoint holds."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) and len(str(error)) < 1000:
            raise
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"the checkpoint does not fit its net ({reason}): give another checkpoint.") from error


def load_net(module: "Classifier", path: Path) -> nn.Module:
    """The net of a checkpoint, in eval mode and float32 on the CPU; ``module`` does not change."""
    return with_weights(module, read_checkpoint(path)).net.float()


def one_object_each(value: Any) -> Any:
    """A copy of nested plain values in which equal texts are one object, and nothing else is.

    A file says once what is one object. Without this, the bytes of a checkpoint would tell whether its run was resumed.

    Args:
        value: value, or dictionary, list or tuple of such values. Values of other classes stay as they are.
    """
    if type(value) is str:
        return sys.intern(value)
    if type(value) is dict:
        return {one_object_each(key): one_object_each(item) for key, item in value.items()}
    return type(value)(map(one_object_each, value)) if type(value) in (list, tuple) else value


_TRAINING_STATE = ("loops", "callbacks", "ema_raw_weights", "MixedPrecision", "train_sums", "gradients")


def load_with_weights(module: "Classifier", source: Path) -> tuple["Classifier", dict[str, Any]]:
    """A copy of ``module`` with the weights of the checkpoint ``source``, and the checkpoint's content."""
    checkpoint = read_checkpoint(source)
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
