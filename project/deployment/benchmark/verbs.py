"""The verb ``benchmark``."""

from typing import Any

import lightning.pytorch as pl
import torch

from project.frame.trainer import RunTrainer


class Verbs(RunTrainer):
    """Mixed into :class:`project.frame.verbs.Trainer`; the docstring of a method is the help of its verb."""

    needs_weights = True

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
        from project.callbacks.places import tensorboard
        from project.deployment.benchmark import measure as work
        from project.deployment.benchmark.publish import how_to_repeat, publish
        from project.deployment.benchmark.subjects import load_subjects

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
