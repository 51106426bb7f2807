"""Time and memory of attention from 1k to 128k tokens, one head: this package, the eager formula, FlexAttention, SDPA.

The eager formula runs until memory ends, which is a status and no crash. On the CPU each peer has a process of its own, so that
its peak is not another's and memory that is not there ends that process alone.
"""

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from empcause.benchmarks.comparison import prepare
from empcause.benchmarks.figures import Row
from empcause.benchmarks.gate import first_sentence
from empcause.benchmarks.memory import peak_bytes, require_linux
from empcause.benchmarks.peers import FLEX, PLAIN, Peer, cpu_peers
from empcause.benchmarks.shapes import Case
from empcause.benchmarks.timing import Stopwatch, Timing, capability

SECTION = "long context"
LENGTHS = tuple(1024 * 2**power for power in range(8))
DIRECTIONS = ("forward", "forward+backward")
# Seconds that one call may take on the CPU; longer ones are left out, by what half the length took.
PATIENCE = 100.0


def long_case(length: int, dtype: torch.dtype) -> Case:
    """Return the case of a length: one sequence, one head of size 64."""
    return Case(f"long 1x1x{length}x64", 1, 1, 1, length, length, 64, dtype)


def chosen_peers(every: Sequence[Peer]) -> list[Peer]:
    """Return those of the peers that are drawn."""
    return [peer for peer in every if peer.ours or peer.name in ("eager formula", FLEX, PLAIN)]


def measure(peer: Peer, case: Case, device: str, seconds: float, wanted: Sequence[str] = DIRECTIONS) -> list[Row]:
    """Judge a peer on a case, then take peak memory and time of each direction.

    Args:
        seconds: for the rounds of a direction; a call that takes longer by itself is timed once.
        wanted: the directions.
    """
    if "forward+backward" not in wanted:
        peer = replace(peer, backward=False)
    kind: dict[str, Any] = {
        "capability": capability(device),
        "dtype": case.dtype_name,
        "head_dim": case.dim,
        "shape": case,
    }
    stopwatch, rows = Stopwatch(device), []
    for found in prepare(case, [peer], device, warm=False):
        identity = (SECTION, case.title, found.direction, peer.name, peer.weighted)
        if found.call is None:
            rows.append(Row(*identity, found.status, **kind))
        elif found.direction in wanted:
            try:
                start = time.perf_counter()
                peak = peak_bytes(found.call, device)
                spent = time.perf_counter() - start
                timing = Timing.of([spent * 1e3])
                if spent < seconds:
                    timing = stopwatch.interleave({peer.name: found.call}, seconds)[peer.name]
            except (RuntimeError, MemoryError) as error:  # memory has ended
                rows.append(Row(*identity, f"does not run: {first_sentence(error)}", **kind))
                continue
            rows.append(Row(*identity, "ok", timing, peak_mib=peak / 2**20, **kind))
    return rows


def measure_on_cpu(name: str, case: Case, seconds: float, wanted: Sequence[str], most_bytes: int) -> list[Row]:
    """Do what `measure` does, in a process of the peer's own.

    Args:
        name: of the peer.
        most_bytes: that the process may take beside what it has.
    """
    import resource

    peer = next(peer for peer in cpu_peers() if peer.name == name)
    for _ in prepare(replace(case, queries=128, keys=128), [peer], "cpu"):
        pass  # what is loaded once is there now
    has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (has + most_bytes, resource.RLIM_INFINITY))
    return measure(peer, case, "cpu", seconds, wanted)


def run_on_cpu(
    peers: Sequence[Peer],
    seconds: float,
    dtype: torch.dtype = torch.float32,
    lengths: Sequence[int] = LENGTHS,
    patience: float = PATIENCE,
    done: Callable[[str, str], bool] = lambda case, peer: False,
) -> Iterator[list[Row]]:
    """Yield the rows of each peer at each length.

    Args:
        peers: of `cpu_peers`.
        seconds: for the rounds of a direction.
        patience: a direction that would take more seconds a call than these is left out.
        done: says of a case and a peer whether they are left out.

    Raises:
        UserError: not on Linux.
    """
    require_linux()
    expected: dict[tuple[str, str], float] = {}  # seconds of a call, by peer and direction
    context = multiprocessing.get_context("spawn")
    with ExitStack() as running:
        processes = {peer.name: running.enter_context(ProcessPoolExecutor(1, context)) for peer in peers}
        for case in (long_case(length, dtype) for length in lengths):
            for peer in peers:
                if done(case.title, peer.name):
                    continue
                identity = (SECTION, case.title)
                if peer.name not in processes:
                    yield [Row(*identity, "all", peer.name, peer.weighted, "left out: half the length did not run")]
                    continue
                rows, wanted = [], []
                for direction in DIRECTIONS:
                    spent = expected.get((peer.name, direction), 0.0)
                    if spent <= patience:
                        wanted.append(direction)
                    else:
                        status = f"left out: a call would take about {spent:.0f} s"
                        rows.append(Row(*identity, direction, peer.name, peer.weighted, status))
                if wanted:
                    rows = [*_in_process(processes[peer.name], peer, case, seconds, wanted), *rows]
                for row in rows:
                    if row.timing:
                        expected[row.peer, row.direction] = 4 * row.timing.median / 1e3
                if wanted and not any(row.timing for row in rows):
                    del processes[peer.name]
                yield rows


def _in_process(
    process: ProcessPoolExecutor, peer: Peer, case: Case, seconds: float, wanted: Sequence[str]
) -> list[Row]:
    try:
        return process.submit(measure_on_cpu, peer.name, case, seconds, wanted, _available() // 2).result()
    except BrokenProcessPool:
        return [Row(SECTION, case.title, "all", peer.name, peer.weighted, "does not run: its process was ended")]


def _available() -> int:
    """Return the bytes of memory that Linux has to give."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
