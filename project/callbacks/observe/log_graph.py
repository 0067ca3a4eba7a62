"""Draws the net's graph in TensorBoard."""

import io
import logging
import warnings
from contextlib import redirect_stdout
from copy import deepcopy

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from project.callbacks.places import tensorboard

log = logging.getLogger(__name__)


class LogGraph(Callback):
    """Traces a copy of the net with one black image before training.

    If the net cannot be traced, a warning is logged and training goes on.

    Example::

        trainer:
          observe: false  # the graph is the only picture
          callbacks+:
            - class_path: project.callbacks.LogGraph
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        writer = tensorboard(trainer)
        if writer is None or trainer.global_step > 0:  # a resumed run already has its graph
            return
        net = getattr(pl_module, "net", pl_module)
        net = getattr(net, "_orig_mod", net)
        image = torch.zeros(1, *getattr(pl_module, "image_shape", ()))
        try:
            # Tracing a copy leaves batch norm's statistics and compiled code as they are; fork_rng does the same for
            # dropout's random numbers. Tracing warns about each Python branch, and TensorBoard prints: both are hidden.
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                # No check: torch compares with a second trace by name, and names of local variables sometimes differ.
                writer.add_graph(torch.jit.trace(deepcopy(net).cpu().eval(), image, check_trace=False), image)
        except Exception as error:
            log.warning("TensorBoard shows no graph of the net: tracing %s failed (%s).", type(net).__name__, error)
