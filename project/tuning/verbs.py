"""The verbs ``tune``, ``find_lr`` and ``find_batch_size``."""

from typing import Any, Literal

import lightning.pytorch as pl

from project.frame.paths import Paths
from project.frame.trainer import RunTrainer


class Verbs(RunTrainer):
    """Part of :class:`project.frame.verbs.Trainer`. The docstring of a method is the help of its verb."""

    needs_weights = False

    def tune(
        self,
        model: "pl.LightningModule",
        datamodule: "pl.LightningDataModule",
        space: dict,
        objective: str | list[str] = "val/accuracy",
        sampler: Literal["grid", "random", "tpe", "cma-es"] = "tpe",
        pruner: Literal["none", "median", "hyperband"] = "none",
        trials: int | None = None,
        baseline: bool = False,
        seeds: int = 1,
        workers: int = 1,
        budget_s: float | None = None,
        study: str | None = None,
        storage: str | None = None,
        search_seed: int = 0,
        heartbeat_s: int = 15,
    ) -> Any:
        """Search hyperparameters. Each trial is a run; the same command continues a study, or joins it.

        Args:
            model: classifier that the configuration describes.
            datamodule: data module that the configuration describes.
            space: dotted keys of the configuration and their values; see :mod:`project.tuning.space`.
            objective: logged validation metric (its best epoch counts), macs, bytes, num_parameters, train_seconds or
                fit_seconds. Several names make a Pareto front.
            sampler: method that proposes the next point; grid tries all points.
            pruner: method that stops hopeless trials early.
            trials: number of trials of the whole study; 1 or more. null takes every point of a grid, or 30 for another
                sampler.
            baseline: whether the first trial is the configuration without changes, for comparison.
            seeds: number of runs of each trial; 1 or more. Their mean counts.
            workers: number of processes on this machine; 1 or more.
            budget_s: seconds after which this command begins no further trial; 0 or more. null for no limit.
            study: name of the study, and of its folder below logs; null takes the names of the configuration files.
            storage: path of a file, or URL of a database: with postgresql://USER@HOST/NAME several machines share a
                study. null takes a file in the study's folder.
            search_seed: seed of the sampler; any int.
            heartbeat_s: number of seconds between two signs of life of a trial; 1 or more. A trial that is silent for
                four times as long is given to another process.
        """
        from project.tuning.study import tune

        if self.configuration is None:
            raise ValueError("tune needs a configuration to change: give one, as in `project tune --config FILE`.")
        return tune(
            self.configuration,
            space,
            study=study or self.experiment or "study",
            objective=objective,
            sampler=sampler,
            pruner=pruner,
            trials=trials,
            baseline=baseline,
            seeds=seeds,
            workers=workers,
            budget_s=budget_s,
            storage=storage,
            search_seed=search_seed,
            heartbeat_s=heartbeat_s,
        )

    def find_lr(
        self,
        model: "pl.LightningModule",
        datamodule: "pl.LightningDataModule",
        min_lr: float = 1e-5,
        max_lr: float = 10.0,
        num_steps: int = 100,
    ) -> float:
        """Propose a learning rate from one short run in which it rises. A picture goes to the experiment's folder.

        Args:
            model: classifier that is trained.
            datamodule: data module that gives the training images.
            min_lr: learning rate of the first step; above 0.
            max_lr: learning rate of the last step; above ``min_lr``. The run ends earlier if the loss grows to four
                times its smallest value.
            num_steps: number of training steps; 20 or more.
        """
        from project.tuning.finders import find_lr

        model.check_fit(mixed=getattr(datamodule, "mix", None) is not None)  # type: ignore[operator]
        folder = Paths(logs=self.logs_dir).logs / (self.experiment or "default")
        return find_lr(self, model, datamodule, folder, min_lr=min_lr, max_lr=max_lr, num_steps=num_steps)

    def find_batch_size(
        self,
        model: "pl.LightningModule",
        datamodule: "pl.LightningDataModule",
        mode: Literal["power", "binsearch"] = "power",
        first: int = 16,
        largest: int | None = None,
        patience_s: int = 45,
    ) -> int:
        """Find the largest batch size that fits into memory, with a few training steps at each size.

        Args:
            model: classifier that is trained.
            datamodule: data module that gives the training images.
            mode: power doubles the size until a step fails; binsearch then also tries sizes between the last one that
                fitted and the one that failed.
            first: batch size of the first try; 1 or more. If it fails, it is halved until a size fits.
            largest: largest batch size to try; 1 or more. null takes the size of the training set.
            patience_s: number of seconds after which a try counts as failed; 1 or more. A size gets more time if that
                is expected from the smaller sizes.
        """
        from project.tuning.batch_size import find_batch_size

        model.check_fit(mixed=getattr(datamodule, "mix", None) is not None)  # type: ignore[operator]
        return find_batch_size(self, model, datamodule, mode=mode, first=first, largest=largest, patience_s=patience_s)
