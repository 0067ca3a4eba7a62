"""The net's graph in TensorBoard."""

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
    """Traces a copy of the net with one black image before training. A net that cannot be traced is a log line, no
    error.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        writer = tensorboard(trainer)
        if writer is None or trainer.global_step > 0:  # a resumed run has its graph
            return
        net = getattr(pl_module, "net", pl_module)
        net = getattr(net, "_orig_mod", net)
        image = torch.zeros(1, *getattr(pl_module, "image_shape", ()))
        try:
            # The copy keeps batch norm's statistics and compiled code untouched, fork_rng dropout's random numbers.
            # Tracing warns of every Python branch, and TensorBoard prints.
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                # Unchecked: torch compares a second trace by name, and names of local variables differ now and then.
                writer.add_graph(torch.jit.trace(deepcopy(net).cpu().eval(), image, check_trace=False), image)
        except Exception as error:
            log.warning("The net's graph is not in TensorBoard: tracing %s failed (%s).", type(net).__name__, error)
