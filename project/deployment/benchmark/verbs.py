"""The verb ``benchmark``."""

import json
from typing import Any

import lightning.pytorch as pl
import torch

from project.frame.trainer import RunTrainer

_LIST_OPTIONS = ("--compare", "--engines")


class Verbs(RunTrainer):
    """Part of :class:`project.frame.verbs.Trainer`. The docstring of a method is the help of its verb."""

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
        """Measure accuracy, bytes, latency, throughput and memory on every engine, as one table and one picture.

        Args:
            model: classifier whose net is measured.
            datamodule: data module that gives the test images for the accuracy.
            run: folder of a run. Its ``*.onnx`` and ``*.packed`` files are measured as well, and the results are
                written to it.
            ckpt_path: path of a checkpoint to measure instead of the run's best one; the model files are then left out.
            compare: folders of other runs on the same data to measure beside this one: ``--compare DIR DIR``.
            engines: names of the engines, any of eager, contiguous, bf16, compiled, onnxruntime, openvino,
                openvino-bf16, cuda and cuda-compiled: ``--engines eager onnxruntime``. null takes all that are
                installed.
            num_images: number of test images to use, from the first on; 1 or more. null takes all.
            rounds: number of timed calls of each engine at batch sizes 1 and 64; 1 or more.
            budget_s: seconds after which no new round begins; 0 or more.
            threads: number of threads; 1 or more. null takes PyTorch's own number (``OMP_NUM_THREADS``).
            memory: whether to measure peak memory, each engine in its own process.
        """
        from project.callbacks.places import tensorboard
        from project.deployment.benchmark import measure as work
        from project.deployment.benchmark.publish import how_to_repeat, publish
        from project.deployment.benchmark.subjects import load_subjects
        from project.frame.paths import Run

        if run is None:
            raise ValueError("benchmark needs --run DIR, the folder of a run, because it writes its results there.")
        checkpoint = self._weights_of(run, ckpt_path)
        assert checkpoint is not None
        options = {"engines": engines, "num_images": num_images, "rounds": rounds, "budget_s": budget_s}
        subjects = load_subjects(
            Run.find(run),
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

    @staticmethod
    def _words(args: list[str]) -> list[str]:
        """``--compare DIR DIR`` -> ``--compare ["DIR", "DIR"]``, which jsonargparse reads. Lists in brackets stay."""
        done: list[str] = []
        rest = list(args)
        while rest:
            option, equals, value = rest.pop(0).partition("=")
            done.append(f"{option}{equals}{value}")
            if option not in _LIST_OPTIONS:
                continue
            values = [value] if equals else []
            while rest and not rest[0].startswith("--"):
                values.append(rest.pop(0))
            if values and not values[0].startswith(("[", "null")):
                done[-1:] = [option, json.dumps(values)]
            else:
                done += values[1:] if equals else values
        return done
