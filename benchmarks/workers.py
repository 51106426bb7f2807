"""What can be done beforehand and at once: kernels compiled and cases checked, in as many processes as there are cores.

A process that calls a kernel leaves its code in the caches on the disk, Triton's and Inductor's, where the process that measures
finds it. The calls are the very ones that will be measured, so that the keys of the caches are the same.
"""

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

NOT_REACHED = "not reached"
Task = tuple[Callable[..., Any], tuple[Any, ...]]


def run_all(tasks: Sequence[Task], seconds: float, processes: int | None = None) -> list[Any]:
    """Run tasks in processes, in their order, and return their results.

    A process that hangs or dies costs its own task, not the run: what is not done in time is ended.

    Args:
        tasks: functions of modules, each with its arguments, which can be pickled as the results can.
        seconds: for all of them.
        processes: None: one for each core that this process may use.

    Returns:
        For each task its result, the exception that it raised, or NOT_REACHED.
    """
    processes = processes or len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    results: list[Any] = []
    if not tasks:
        return results
    end = time.monotonic() + seconds
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(processes, len(tasks)), _begin) as pool:
        pending = [pool.apply_async(function, arguments) for function, arguments in tasks]
        for one in pending:
            try:
                results.append(one.get(max(0.0, end - time.monotonic())))
            except multiprocessing.TimeoutError:
                results.append(NOT_REACHED)
            except Exception as error:  # a compiler's too
                results.append(error)
    return results


def _begin() -> None:
    """Leave each process one core: Inductor would otherwise start compilers of its own in every one of them."""
    import torch

    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    torch.set_num_threads(1)
