"""Worker processes on one machine: each trains one trial after another, so that Python and torch start once."""

import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
from typing import Any

from optuna.exceptions import StorageInternalError

from project.frame.logger import setup_logging
from project.frame.parser import one_sentence
from project.tuning.plan import Plan
from project.tuning.work import work

log = logging.getLogger(__name__)

GONE = "the study's storage does not answer any more: when it does, the same command goes on with the study."


def work_in_processes(plan: Plan, workers: int) -> None:
    """Start workers, and another for each that dies while trials are left."""
    context = multiprocessing.get_context("spawn")
    before = dict(os.environ)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // workers)))  # threads that wait cost tenfold
    processes = [_start(context, plan, number) for number in range(workers)]
    try:
        while processes:
            multiprocessing.connection.wait([process.sentinel for process in processes])
            for index, process in [(i, p) for i, p in enumerate(processes) if not p.is_alive()]:
                process.join()
                killed = process.exitcode is not None and process.exitcode < 0
                if killed:
                    log.warning("a worker was killed by signal %d: its trial is tried again", -(process.exitcode or 0))
                    processes[index] = _start(context, plan, index)
            processes = [process for process in processes if process.is_alive()]
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()
        os.environ.clear()
        os.environ.update(before)


def _start(context: Any, plan: Plan, number: int) -> Any:
    import torch

    if (num_gpus := torch.cuda.device_count()) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(number % num_gpus)
    process = context.Process(target=_worker, args=(plan,), name=f"worker_{number}")
    process.start()
    return process


def _worker(plan: Plan) -> None:
    setup_logging()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the trial is given back
    try:
        work(plan)
    except (ValueError, OSError) as error:
        log.error("error: %s", one_sentence(str(error)))
        sys.exit(2)
    except StorageInternalError:
        log.error("error: %s", GONE)
        sys.exit(2)
