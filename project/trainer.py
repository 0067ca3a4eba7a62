"""The project's own verbs, each a thin method; see :class:`project.cli.CLI`."""

from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch

from project.compression import Quantizer
from project.paths import MODEL_FILES, Paths
from project.run_trainer import RunTrainer


class Trainer(RunTrainer):
    """Trains, shrinks, measures and deploys; all its arguments are :class:`~project.run_trainer.RunTrainer`'s."""

    def export(
        self,
        model: "pl.LightningModule",
        datamodule: "pl.LightningDataModule",
        run: str | None = None,
        ckpt_path: str | None = None,
        format: Literal["onnx", "onnx-int8", "pt2", "packed"] = "onnx",
        output: str | None = None,
        tolerance: float | None = None,
        num_images: int = 256,
        quantizer: Quantizer | None = None,
    ) -> Any:
        """Write the net as one file that runs without this package, once it has been read again and compared.

        Args:
            model: the classifier.
            datamodule: the data: test images to compare on, training images to calibrate int8 with.
            run: a run's folder, for its configuration and best checkpoint.
            ckpt_path: checkpoint to export.
            format: onnx (fp32), onnx-int8 (quantized after training), pt2 (torch.export) or packed (fewest bytes, read
                by this package).
            output: the file; null is ``model.onnx``, ``model_int8.onnx``, ``model.pt2`` or ``model.packed`` in the
                run's folder, else in the working directory.
            tolerance: largest difference of a logit that is accepted, as a share of the largest logit; null is 1e-4,
                0.25 for int8.
            num_images: test images to compare file and net on.
            quantizer: of int8: what becomes integers, and how their scales are found.
        """
        from project.export import export_checkpoint

        path = self._weights_of(run, ckpt_path)
        target = Path(output) if output else self.run.model_file(format) if self.run else Path(MODEL_FILES[format])
        assert path is not None
        return export_checkpoint(
            model,  # type: ignore[arg-type]
            datamodule,  # type: ignore[arg-type]
            Path(path),
            target,
            format=format,
            tolerance=tolerance,
            num_images=num_images,
            quantizer=quantizer,
        )

    def benchmark(
        self,
        model: "pl.LightningModule",
        datamodule: "pl.LightningDataModule",
        run: str | None = None,
        ckpt_path: str | None = None,
        compare: list[str] | None = None,
        engines: list[str] | None = None,
        num_images: int | None = None,
        rounds: int = 50,
        budget_s: float = 30.0,
        threads: int | None = None,
        memory: bool = True,
    ) -> Any:
        """Measure accuracy, bytes, latency, throughput and memory on every engine; one table, one picture.

        Args:
            model: the classifier.
            datamodule: the data, whose test images the accuracy is measured on.
            run: a run's folder; the results are written to it, and ``*.onnx`` and ``*.packed`` files in it are
                measured as well.
            ckpt_path: another checkpoint of this run than its best; without the model files.
            compare: folders of further runs on the same data, to put beside it: ``--compare DIR DIR``.
            engines: of eager, contiguous, bf16, compiled, onnxruntime, openvino, openvino-bf16, cuda, cuda-compiled:
                ``--engines eager onnxruntime``; null takes all that are installed.
            num_images: take only the first test images; null takes all.
            rounds: timed calls of each engine at batch 1 and 64.
            budget_s: seconds after which no new round begins.
            threads: number of threads; null is torch's own (``OMP_NUM_THREADS``).
            memory: measure peak memory, in processes of their own.
        """
        from project import benchmark as work
        from project.benchmark_report import how_to_repeat, publish
        from project.benchmark_subjects import load_subjects
        from project.callbacks.places import tensorboard

        if run is None:
            raise ValueError("benchmark needs --run DIR, a run's folder: that is where its results are written.")
        checkpoint = self._weights_of(run, ckpt_path)
        assert self.run is not None and checkpoint is not None
        options = {"engines": engines, "num_images": num_images, "rounds": rounds, "budget_s": budget_s}
        subjects = load_subjects(
            self.run,
            checkpoint,
            model,  # type: ignore[arg-type]
            compare=compare or [],
            files=ckpt_path is None,
        )
        with work.threads(threads):
            rows = work.benchmark(subjects, datamodule, memory=memory, **options)  # type: ignore[arg-type]
            named = {"run": run, "ckpt_path": ckpt_path, "compare": compare, "threads": torch.get_num_threads()}
            publish(rows, self.run, how_to_repeat(**named, **options, memory=memory), tensorboard(self))
        return rows

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
