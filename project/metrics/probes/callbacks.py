"""The probes as callbacks. Each adapts a function of this folder; what they share is in :class:`~.probe.Probe`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from project.metrics.probes.activations import activation_sparsity
from project.metrics.probes.gradient_norms import gradient_norms
from project.metrics.probes.hessian import top_eigenvalues
from project.metrics.probes.landscape import check_distances, loss_landscape
from project.metrics.probes.objective import LossOnImages
from project.metrics.probes.probe import Mode, Probe
from project.metrics.probes.sharpness import check_box, sharpness

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class LandscapeProbe(Probe):
    """Measures the loss along the gradient, gradient predictiveness and beta-smoothness: see :func:`loss_landscape`.

    Santurkar et al. 2018 (arXiv:1805.11604, fig. 4). It logs ``probe/landscape/loss``, ``gradient_norm`` and
    ``smoothness``, and over all distances ``loss_min``, ``loss_max``, ``gradient_change_min`` and
    ``gradient_change_max``. The picture at the end is ``landscape.png``. With S distances a measurement costs S + 1
    forward and backward passes.

    Example::

        trainer:
          callbacks+:
            - class_path: project.callbacks.LandscapeProbe
              init_args: {every_n_steps: 20, distances: [0.05, 0.1, 0.2, 0.4], num_images: 128}

    Args:
        distances: step sizes along the gradient, each above 0; choose them around the learning rate.
        every_n_steps: number of optimizer steps from one measurement to the next, 1 or more. ``None`` measures at no
            step.
        every_n_epochs: number of epochs from one measurement to the next, 1 or more, each at the epoch's first step.
            ``None`` measures at no epoch.
        num_images: number of training images to measure on, 1 or more, all in one batch.
        mode: mode of the net, ``"train"`` or ``"eval"``; the paper has batch norm in training mode.

    Raises:
        ValueError: if a number is outside its range.
    """

    picture = "landscape"

    def __init__(
        self,
        distances: Sequence[float] = (0.05, 0.1, 0.2, 0.4),
        every_n_steps: int | None = 50,
        every_n_epochs: int | None = None,
        num_images: int = 256,
        mode: Mode = "train",
    ) -> None:
        check_distances(distances)
        super().__init__(every_n_steps, every_n_epochs, num_images, mode)
        self.distances = tuple(distances)

    def _values(self, objective: LossOnImages) -> dict[str, float]:
        found = loss_landscape(objective, objective.parameters, self.distances)
        values = {
            "loss": found.loss,
            "loss_min": found.losses.min().item(),
            "loss_max": found.losses.max().item(),
            "gradient_norm": found.gradient_norm,
            "gradient_change_min": found.gradient_changes.min().item(),
            "gradient_change_max": found.gradient_changes.max().item(),
            "smoothness": found.smoothness,
        }
        return {f"landscape/{name}": value for name, value in values.items()}

    def _draw(self) -> "Figure":
        from project.metrics.probes.figures import plot_landscape

        return plot_landscape(self.history)


class SharpnessProbe(Probe):
    """Measures how far the loss can rise in a small box around the weights, in percent: see :func:`sharpness`.

    Keskar et al. 2017 (arXiv:1609.04836, metric 2.1). It logs ``probe/sharpness/<epsilon>``, with a subspace
    ``probe/sharpness_of_<subspace>/<epsilon>``. For each epsilon a measurement costs 2 forward and backward passes, and
    one to two for each iteration.

    Example::

        trainer:
          callbacks+:
            - class_path: project.callbacks.SharpnessProbe
              init_args: {epsilons: [1.e-3, 5.e-4], num_images: 500}

    Args:
        epsilons: sizes of the box, each above 0.
        subspace: number of dimensions of a random subspace, 1 or more. ``None`` searches in the full space.
        iterations: number of iterations of L-BFGS-B, 1 or more; the paper has 10.
        every_n_steps: number of optimizer steps from one measurement to the next, 1 or more. ``None`` measures at no
            step.
        every_n_epochs: number of epochs from one measurement to the next, 1 or more, each at the epoch's first step.
            ``None`` measures at no epoch.
        num_images: number of training images to measure on, 1 or more, all in one batch.
        mode: mode of the net, ``"train"`` or ``"eval"``. It is a property of the trained net, so batch norm has its
            running statistics by default. They fit no other weights, so nets with batch norm are sharper in this mode.
        seed: seed of the search and of the subspace; any int.

    Raises:
        ValueError: if a number is outside its range.
    """

    usual_mode: Mode = "eval"

    def __init__(
        self,
        epsilons: Sequence[float] = (1e-3, 5e-4),
        subspace: int | None = None,
        iterations: int = 10,
        every_n_steps: int | None = None,
        every_n_epochs: int | None = None,
        num_images: int = 256,
        mode: Mode = "eval",
        seed: int = 0,
    ) -> None:
        if not epsilons:
            raise ValueError("epsilons is empty: give at least one size of the box, such as 1e-3.")
        for epsilon in epsilons:
            check_box(epsilon, subspace, iterations)
        super().__init__(every_n_steps, every_n_epochs, num_images, mode)
        self.epsilons, self.subspace, self.iterations, self.seed = tuple(epsilons), subspace, iterations, seed

    def _values(self, objective: LossOnImages) -> dict[str, float]:
        name = "sharpness" if self.subspace is None else f"sharpness_of_{self.subspace}"
        return {
            f"{name}/{epsilon:g}": sharpness(
                objective, objective.parameters, epsilon, self.subspace, self.iterations, self.seed
            )
            for epsilon in self.epsilons
        }


class CurvatureProbe(Probe):
    """Measures the largest eigenvalues of the loss's Hessian: see :func:`top_eigenvalues`.

    It logs ``probe/top_eigenvalue``, and ``probe/top_eigenvalue_2`` and so on for more than one. A measurement costs
    one forward pass, one backward pass, and one double backward pass for each iteration.

    Example::

        trainer:
          callbacks+:
            - class_path: project.callbacks.CurvatureProbe
              init_args: {every_n_epochs: 1, count: 2}

    Args:
        count: number of eigenvalues, 1 or more.
        iterations: largest number of iterations of Lanczos' method, at least 1 and at least ``count``.
        tolerance: relative residual at which the iteration ends, 0 or more.
        every_n_steps: number of optimizer steps from one measurement to the next, 1 or more. ``None`` measures at no
            step.
        every_n_epochs: number of epochs from one measurement to the next, 1 or more, each at the epoch's first step.
            ``None`` measures at no epoch.
        num_images: number of training images to measure on, 1 or more, all in one batch.
        mode: mode of the net, ``"train"`` or ``"eval"``. In training mode it is the loss that the optimizer sees.
        seed: seed of the start vector; any int.

    Raises:
        ValueError: if a number is outside its range.
    """

    def __init__(
        self,
        count: int = 1,
        iterations: int = 20,
        tolerance: float = 1e-3,
        every_n_steps: int | None = None,
        every_n_epochs: int | None = None,
        num_images: int = 256,
        mode: Mode = "train",
        seed: int = 0,
    ) -> None:
        if count < 1:
            raise ValueError(f"count is {count}, but it counts eigenvalues: choose 1 or more.")
        if iterations < count:
            raise ValueError(f"iterations is {iterations}, too few for {count} eigenvalues: choose about 20 or more.")
        if not tolerance >= 0:
            raise ValueError(f"tolerance is {tolerance}, but it bounds a residual: choose 0 or more, such as 1e-3.")
        super().__init__(every_n_steps, every_n_epochs, num_images, mode)
        self.count, self.iterations, self.tolerance, self.seed = count, iterations, tolerance, seed

    def _values(self, objective: LossOnImages) -> dict[str, float]:
        found = top_eigenvalues(objective, objective.parameters, self.count, self.iterations, self.tolerance, self.seed)
        return {f"top_eigenvalue{f'_{i}' if i > 1 else ''}": value for i, value in enumerate(found, 1)}


class GradientNormProbe(Probe):
    """Measures the norm of the loss's gradient, layer by layer: see :func:`gradient_norms`.

    It logs ``probe/gradient_norm/<layer>``. The picture at the end is ``gradient_norms.png``: the norms by depth. A
    measurement costs one forward and one backward pass. Unlike the norms of
    :class:`~project.callbacks.WeightHistograms`, which are those of a training batch, these are always of the same
    images.

    Example::

        trainer:
          callbacks+:
            - class_path: project.callbacks.GradientNormProbe
              init_args: {every_n_epochs: 1}

    Args:
        every_n_steps: number of optimizer steps from one measurement to the next, 1 or more. ``None`` measures at no
            step.
        every_n_epochs: number of epochs from one measurement to the next, 1 or more, each at the epoch's first step.
            ``None`` measures at no epoch.
        num_images: number of training images to measure on, 1 or more, all in one batch.
        mode: mode of the net, ``"train"`` or ``"eval"``.
    """

    picture = "gradient_norms"

    def __init__(
        self,
        every_n_steps: int | None = None,
        every_n_epochs: int | None = 1,
        num_images: int = 256,
        mode: Mode = "train",
    ) -> None:
        super().__init__(every_n_steps, every_n_epochs, num_images, mode)

    def _values(self, objective: LossOnImages) -> dict[str, float]:
        # Not loss.backward(), at which DDP would exchange gradients.
        for parameter in objective.net.parameters():
            parameter.grad = None
        with torch.enable_grad():
            gradients = torch.autograd.grad(objective(), objective.parameters, allow_unused=True)
        for parameter, gradient in zip(objective.parameters, gradients, strict=True):
            parameter.grad = gradient
        return {f"gradient_norm/{name}": norm for name, norm in gradient_norms(objective.net).items()}

    def _draw(self) -> "Figure":
        from project.metrics.probes.figures import plot_gradient_norms

        return plot_gradient_norms(self.history)


class ActivationProbe(Probe):
    """Measures the share of zeros in the output of each activation: see :func:`activation_sparsity`.

    It logs ``probe/zeros/<layer>``, between 0 and 1, and the mean over the layers as ``probe/zeros``. A measurement
    costs one forward pass.

    Example::

        trainer:
          callbacks+:
            - class_path: project.callbacks.ActivationProbe
              init_args: {every_n_epochs: 1}

    Args:
        every_n_steps: number of optimizer steps from one measurement to the next, 1 or more. ``None`` measures at no
            step.
        every_n_epochs: number of epochs from one measurement to the next, 1 or more, each at the epoch's first step.
            ``None`` measures at no epoch.
        num_images: number of training images to measure on, 1 or more, all in one batch.
        mode: mode of the net, ``"train"`` or ``"eval"``. Without dropout, the zeros are those of the activations alone.
    """

    usual_mode: Mode = "eval"

    def __init__(
        self,
        every_n_steps: int | None = None,
        every_n_epochs: int | None = 1,
        num_images: int = 256,
        mode: Mode = "eval",
    ) -> None:
        super().__init__(every_n_steps, every_n_epochs, num_images, mode)

    def _values(self, objective: LossOnImages) -> dict[str, float]:
        objective.num_forward += 1
        shares = activation_sparsity(objective.net, objective.images.clone())
        mean = sum(shares.values()) / len(shares)
        return {"zeros": mean, **{f"zeros/{name}": share for name, share in shares.items()}}
