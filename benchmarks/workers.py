"""What can be done beforehand and at once: kernels compiled and cases checked, in as many processes as there are cores.

A process that calls a kernel leaves its code in the caches on the disk, Triton's and Inductor's, where the process that measures
finds it. The calls are the very ones that will be measured, so that the keys of the caches are the same.
"""

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from multiprocessing.pool import AsyncResult
from typing import Any

NOT_REACHED = "not reached"
# Seconds in which no task ends, after which those that are left are given up: they hang, or their process died.
PATIENCE = 90.0
Task = tuple[Callable[..., Any], tuple[Any, ...]]


def run_all(tasks: Sequence[Task], seconds: float, processes: int | None = None) -> list[Any]:
    """Run tasks in processes, begun in their order, and return their results.

    A process that hangs or dies costs its own task, not the run: what is not done in time is ended.

    Args:
        tasks: functions of modules, each with its arguments, which can be pickled as the results can.
        seconds: for all of them.
        processes: None: one for each core that this process may use.

    Returns:
        For each task its result, the exception that it raised, or NOT_REACHED.
    """
    if not tasks:
        return []
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(processes or _cores(), len(tasks)), _begin) as pool:
        pending = [pool.apply_async(function, arguments) for function, arguments in tasks]
        end, done, since = time.monotonic() + seconds, 0, time.monotonic()
        while time.monotonic() < min(end, since + PATIENCE) and done < len(tasks):
            time.sleep(0.05)
            if (now_done := sum(one.ready() for one in pending)) > done:
                done, since = now_done, time.monotonic()
        return [_result(one) for one in pending]


def _result(one: AsyncResult) -> Any:
    if not one.ready():
        return NOT_REACHED
    try:
        return one.get()
    except Exception as error:  # a compiler's too
        return error


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _begin() -> None:
    """Leave each process one core, before it imports torch: Inductor would start compilers of its own in every one of them."""
    os.environ |= {"TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
