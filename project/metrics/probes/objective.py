"""The loss of a classifier on fixed training images, as a function of its weights alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from project.learning.whole_batch import WholeBatch
from project.metrics.probes.unchanged import unchanged


class LossOnImages:
    """The loss of a net on a batch, which every call computes anew: the same value for the same weights.

    It is the loss that the run was given, without distillation, penalties and weight decay, so that runs that differ in
    these compare. Weights and images keep their type: there is no autocast in mixed precision. Dropout draws the same
    numbers in every call.

    Args:
        net: net whose weights are measured.
        loss: function of logits ``[N, K]`` and labels that gives a scalar.
        images: normalised images ``[N, C, H, W]`` on the net's device.
        labels: class numbers ``[N]`` on the net's device.
    """

    def __init__(self, net: nn.Module, loss: nn.Module, images: Tensor, labels: Tensor) -> None:
        self.net, self.loss, self.images, self.labels = net, loss, images, labels
        self.parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
        self.num_forward = self.num_backward = 0

    def __call__(self) -> Tensor:
        self.num_forward += 1
        torch.default_generator.manual_seed(0)
        if self.images.device.type != "cpu":
            torch.get_device_module(self.images.device).manual_seed(0)
        logits = self.net(self.images.clone())  # the first layer may work in place
        return self.loss(logits.to(torch.promote_types(logits.dtype, torch.float32)), self.labels)

    @contextmanager
    def measuring(self, mode: str) -> Iterator[None]:
        """A context that leaves everything unchanged and counts forward and backward passes.

        Batch norm and dropout of ``trainer.sync_batchnorm`` act on this process alone in the meantime: processes that
        search need not make the same number of passes.

        Args:
            mode: mode of the net, ``"train"`` or ``"eval"``.
        """

        def count(_gradient: Tensor) -> None:
            self.num_backward += 1

        modules = list(self.net.modules())
        compiled = [(module, call) for module in modules if (call := module._compiled_call_impl) is not None]
        replaced = [(module, module.forward) for module in modules if "forward" in vars(module)]
        with unchanged(self.net), unchanged(self.loss):
            self.net.train(mode == "train")
            hook = self.parameters[-1].register_hook(count)  # each backward pass reaches the head
            for module, _ in compiled:  # a compiled net has no second derivative
                module._compiled_call_impl = None
            WholeBatch().revert(self.net)
            try:
                yield
            finally:
                hook.remove()
                for module, call in compiled:
                    module._compiled_call_impl = call
                for module, forward in replaced:
                    module.forward = forward


def fixed_images(data: Any, count: int) -> tuple[Tensor, Tensor]:
    """The same training images ``[N, C, H, W]`` and labels ``[N]`` in every call, spread evenly over the training set.

    They are normalised and neither augmented nor cropped at random.

    Args:
        data: data module of the run, a :class:`project.data.ImageDataModule` that is set up.
        count: number N of images, at least 1; all of a smaller training set.
    """
    source = data.train_data
    crop = getattr(source, "random_crop", None)  # which depends on the epoch
    if crop is None:
        return data.sample(count)
    source.random_crop = None
    try:
        return data.sample(count)
    finally:
        source.random_crop = crop
