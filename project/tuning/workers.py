"""Worker processes on one machine. Each trains one trial after another, so Python and torch start only once."""

import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from typing import Any

from optuna.exceptions import StorageInternalError

from project.frame.logger import setup_logging
from project.frame.parser import one_sentence
from project.tuning.plan import Plan
from project.tuning.work import work

log = logging.getLogger(__name__)

GONE = "the study's storage no longer answers: when it answers again, the same command continues the study."
"""Error message for a storage that stops answering."""


def work_in_processes(plan: Plan, workers: int) -> None:
    """Run worker processes until all of them end. A worker that is killed is replaced.

    Raises:
        SystemExit: if a worker ended with an error, which it has logged.
    """
    context = multiprocessing.get_context("spawn")
    before = dict(os.environ)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # With more threads than cores, threads wait for each other, and a trial takes ten times as long.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // workers)))
    processes = [_start(context, plan, number) for number in range(workers)]
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGTERM, _end) if in_main else None
    failed = False
    try:
        while processes:
            multiprocessing.connection.wait([process.sentinel for process in processes])
            for index, process in [(i, p) for i, p in enumerate(processes) if not p.is_alive()]:
                process.join()
                failed = failed or (process.exitcode or 0) > 0
                killed = process.exitcode is not None and process.exitcode < 0
                if killed:
                    log.warning("a worker was killed by signal %d: its trial is run again", -(process.exitcode or 0))
                    processes[index] = _start(context, plan, index)
            processes = [process for process in processes if process.is_alive()]
        if failed:
            sys.exit(2)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()
        if in_main:
            signal.signal(signal.SIGTERM, handler)
        os.environ.clear()
        os.environ.update(before)


def _end(*_: Any) -> None:
    """A handler of SIGTERM that raises an exception, so that trials go back to the queue."""
    sys.exit(143)


def _start(context: Any, plan: Plan, number: int) -> Any:
    import torch

    if (num_gpus := torch.cuda.device_count()) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(number % num_gpus)
    process = context.Process(target=_worker, args=(plan,), name=f"worker_{number}")
    process.start()
    return process


def _worker(plan: Plan) -> None:
    setup_logging()
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes, but the first one ends the others
    try:
        work(plan)
    except (ValueError, OSError) as error:
        log.error("error: %s", one_sentence(str(error)))
        sys.exit(2)
    except StorageInternalError:
        log.error("error: %s", GONE)
        sys.exit(2)
