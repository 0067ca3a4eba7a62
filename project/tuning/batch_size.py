"""The largest batch size that fits into memory. Each size that is proposed has run training steps.

Lightning's tuner is not used. With ``mode="binsearch"`` it does not train the sizes that it passes over, and it may
propose its upper limit without a try.

On the command line the steps run in another process. If that process is killed for its memory, or hangs because memory
is short, the answer is still found.
"""

import gc
import logging
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from typing import Any, Literal, NamedTuple

import lightning.pytorch as pl
import torch

from project.learning.schedules import Schedule

log = logging.getLogger(__name__)

_NUM_STEPS = 3
"""Steps of a try. The optimizer has its state after the first, and one of the next two has a full batch."""
_OF_MEMORY = (
    "out of memory",
    "allocate memory",
    "could not create a primitive",  # oneDNN
    "could not create a memory object",
    "CUDNN_STATUS_NOT_SUPPORTED",
    "_STATUS_ALLOC_FAILED",
    "bad_alloc",
    "can't start new thread",
    "killed by signal",  # a worker of the loader
    "unable to mmap",
    "No space left on device",  # shared memory
)


class Failure(NamedTuple):
    """The reason why a size cannot be trained."""

    reason: str
    is_memory: bool


def find_batch_size(
    trainer: Any,
    model: Any,
    datamodule: Any,
    *,
    mode: Literal["power", "binsearch"],
    first: int,
    largest: int | None,
    patience_s: float = 45.0,
) -> int:
    """The largest batch size that fits into memory, at most the size of the training set.

    On a CPU, memory is seldom the limit.

    Args:
        trainer: trainer whose device, precision and gradient settings are used; nothing is saved in its run. If it has
            a ``configuration``, the steps run in another process.
        model: classifier that is trained; its weights are restored.
        datamodule: data module that gives the training images.
        mode: ``power`` doubles the size until a step fails. ``binsearch`` then also tries sizes between the last one
            that fitted and the one that failed.
        first: batch size of the first try, 1 or more; ``largest`` where that is smaller. If it fails, it is halved
            until a size fits.
        largest: largest batch size to try; 1 or more. ``None`` takes the size of the training set.
        patience_s: number of seconds after which a try counts as failed, above 0. A size gets more time if that is
            expected from the smaller sizes. The limit holds in another process only.

    Raises:
        ValueError: if an argument is outside its range, or a step with one image fails.
    """
    datamodule.prepare_data()
    datamodule.setup("fit")
    most = len(datamodule.train_data)
    largest = most if largest is None else min(largest, most)
    for name, value in (("first", first), ("largest", largest)):
        if value < 1:
            raise ValueError(f"{name} is {value}: choose a batch size of 1 or more.")
    first = min(first, largest)
    if patience_s <= 0:
        raise ValueError(f"patience_s is {patience_s}: choose a number of seconds above 0.")
    if getattr(trainer, "configuration", None) is None:
        size = largest_that_fits(lambda size: attempt(trainer, model, datamodule, size), mode, first, largest)
    else:
        with _OtherProcess(trainer.configuration, patience_s) as other:
            size = largest_that_fits(other.attempt, mode, first, largest)
    log.info("batch size     %d of at most %d", size, largest)
    log.info("take it        --data.init_args.batch_size %d", size)
    return size


def largest_that_fits(
    attempt: Callable[[int], Failure | None], mode: Literal["power", "binsearch"], first: int, largest: int
) -> int:
    """The largest size that was tried and has fitted.

    Args:
        attempt: function that tries a size, and returns ``None`` or the failure.
        mode: ``power`` stops when a size fails; ``binsearch`` then goes on between the two.
        first: size of the first try; from 1 to ``largest``.
        largest: largest size to try; 1 or more.

    Raises:
        ValueError: if a step with one image fails, or if the first tries fail for another reason than memory.
    """
    fitted, failed, size = 0, largest + 1, first
    while fitted < largest and size < failed:
        began = time.perf_counter()
        failure = attempt(size)
        if failure is None:
            log.info("size %-10d fits, %.1f s", size, time.perf_counter() - began)
            fitted, size = size, min(2 * size, largest)
            continue
        if not fitted and not (failure.is_memory and size > 1):
            raise ValueError(f"a training step with a batch size of {size} fails: {failure.reason}")
        log.info("size %-10d fails: %s", size, failure.reason)
        failed = size
        size = fitted or size // 2
        if fitted:
            break
    while mode == "binsearch" and failed - fitted > 1:
        size = (fitted + failed) // 2
        failure = attempt(size)
        log.info("size %-10d %s", size, "fits" if failure is None else f"fails: {failure.reason}")
        fitted, failed = (size, failed) if failure is None else (fitted, size)
    return fitted


def attempt(trainer: Any, model: Any, datamodule: Any, size: int) -> Failure | None:
    """Train a few steps with batches of ``size`` images in this process.

    Args:
        trainer: trainer whose device, precision and gradient settings are used.
        model: classifier that is trained; its weights are restored.
        datamodule: data module that gives the training images; its batch size is restored.
        size: number of images in a batch; 1 or more.

    Returns:
        The failure, or ``None`` if the steps ran.
    """
    before, failure = datamodule.batch_size, None
    datamodule.batch_size = size
    with tempfile.TemporaryDirectory() as scratch, borrowed(model):
        try:
            with trainer.own_kernels() if hasattr(trainer, "own_kernels") else nullcontext():
                plain(trainer, scratch, max_steps=_NUM_STEPS, limit_val_batches=0).fit(model, datamodule=datamodule)
        except Exception as error:  # anything that a step can raise
            failure = failure_of(error)
            if os.environ.get("PROJECT_DEBUG"):
                traceback.print_exc()
        finally:
            datamodule.batch_size = before
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return failure


def failure_of(error: BaseException) -> Failure:
    """An error of a training step in one line, and whether it says that memory is short.

    Args:
        error: error that the step has raised.
    """
    is_memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        word in str(error) for word in _OF_MEMORY
    )
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return Failure(text[:200], is_memory)


@contextmanager
def borrowed(model: Any) -> Iterator[None]:
    """Train a classifier with a constant rate for a while; its schedule, weights and mode are restored.

    Args:
        model: classifier that is trained inside the context.
    """
    schedule, training = model.schedule, model.training
    state = deepcopy(model.state_dict())
    model.schedule = Schedule()
    try:
        yield
    finally:
        model.zero_grad(set_to_none=True)
        model.load_state_dict(state)
        model.schedule = schedule
        model.train(training)


def plain(trainer: pl.Trainer, scratch: str, **options: Any) -> pl.Trainer:
    """A trainer with the same device, precision and gradient settings that saves nothing and has no last epoch.

    Args:
        trainer: trainer whose settings are used.
        scratch: folder for files that are not kept.
        options: further arguments of Lightning's Trainer.
    """
    return pl.Trainer(
        accelerator=trainer.accelerator,
        devices=1,
        precision=trainer.precision,
        max_epochs=-1,
        accumulate_grad_batches=trainer.accumulate_grad_batches,
        gradient_clip_val=trainer.gradient_clip_val,
        gradient_clip_algorithm=trainer.gradient_clip_algorithm,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=scratch,
        **options,
    )


class _OtherProcess:
    """Tries sizes in another process. A new process takes the place of one that died or hung."""

    def __init__(self, configuration: dict[str, Any], patience_s: float) -> None:
        self._configuration, self._patience_s = configuration, patience_s
        self._process: Any = None
        self._connection: Any = None
        self._seconds_per_image = 0.0

    def __enter__(self) -> "_OtherProcess":
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def attempt(self, size: int) -> Failure | None:
        if self._process is None:
            self._start()
        began = time.perf_counter()
        self._connection.send(size)
        seconds = max(self._patience_s, 3 * self._seconds_per_image * size)
        if not self._connection.poll(seconds):
            self._stop()
            return Failure(f"no answer within {seconds:.0f} seconds (--patience_s), as when memory is short", True)
        try:
            failure: Failure | None = self._connection.recv()
        except (EOFError, OSError):
            return Failure(f"the process died ({self._stop()}), as when memory is short", True)
        if failure is None:
            self._seconds_per_image = (time.perf_counter() - began) / size
        return failure

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(self._configuration, theirs), name="batch_size")
        self._process.start()
        theirs.close()
        try:
            ready = self._connection.poll(self._patience_s) and self._connection.recv()
        except (EOFError, OSError):
            ready = False
        if not ready:
            raise ValueError(
                f"the process that tries the sizes did not start ({self._stop()}): free some memory, or raise "
                "--patience_s."
            )

    def _stop(self) -> str:
        """End the process, and say in words how it ended."""
        if self._process is None:
            return "never started"
        self._connection.close()
        self._process.join(1)
        self._process.kill()
        self._process.join()
        code, self._process = self._process.exitcode, None
        return f"signal {-code}" if code < 0 else f"exit status {code}"


def _serve(configuration: dict[str, Any], connection: Any) -> None:
    """Try each size that the first process sends, until it closes the connection."""
    from project.frame.logger import setup_logging
    from project.tuning.trial import build, quiet

    setup_logging()
    with quiet():
        cli = build(configuration)
        connection.send(True)
        while True:
            try:
                size = connection.recv()
            except EOFError:
                return
            connection.send(attempt(cli.trainer, cli.model, cli.datamodule, size))
