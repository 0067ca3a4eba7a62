"""The verbs ``tune``, ``find_lr`` and ``find_batch_size``."""

from typing import Any, Literal

import lightning.pytorch as pl

from project.frame.paths import Paths
from project.frame.trainer import RunTrainer


class Verbs(RunTrainer):
    """Mixed into :class:`project.frame.verbs.Trainer`; the docstring of a method is the help of its verb."""

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
        """Search hyperparameters; each trial is a run, and the same command goes on with a study or joins it.

        Args:
            model: the classifier.
            datamodule: the data.
            space: dotted keys of the configuration and their values; see :mod:`project.tuning.space`.
            objective: a logged metric of validation (its best epoch counts), macs, bytes, num_parameters, train_seconds
                or fit_seconds; several make a Pareto front.
            sampler: what proposes the next point; grid tries all.
            pruner: what stops hopeless trials early.
            trials: of the whole study; null is every point of a grid, else 30.
            baseline: the first trial is the configuration as it is, for what is searched must beat it.
            seeds: runs of each trial; their mean counts.
            workers: processes on this machine.
            budget_s: seconds after which this command begins no further trial.
            study: its name, and the folder below logs; null is the names of the configuration files.
            storage: null is a file in the study's folder; postgresql://USER@HOST/NAME lets machines share a study.
            search_seed: of the sampler.
            heartbeat_s: a trial whose process is silent for four times as long is given to another.
        """
        from project.tuning.study import tune

        if self.configuration is None:
            raise ValueError("tune needs a configuration to change: run it as `project tune --config …`.")
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
        """Propose a learning rate from one short run in which it rises; the picture lands in the experiment's folder.

        Args:
            model: the classifier.
            datamodule: the data.
            min_lr: the first rate.
            max_lr: the last; the run ends earlier when the loss has grown fourfold.
            num_steps: steps from the first to the last.
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
    ) -> int:
        """Find the largest batch that fits into memory, by a few steps with ever larger ones.

        Args:
            model: the classifier.
            datamodule: the data.
            mode: power doubles; binsearch then goes on between what fitted and what did not.
            first: where to begin.
            largest: where to end; null is the training set.
        """
        from project.tuning.finders import find_batch_size

        model.check_fit(mixed=getattr(datamodule, "mix", None) is not None)  # type: ignore[operator]
        return find_batch_size(self, model, datamodule, mode=mode, first=first, largest=largest)
