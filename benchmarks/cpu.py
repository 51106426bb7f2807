"""Attention on the CPU beside the other ways to compute it, and beside the machine's limits: `empcause bench`.

Every peer is judged against fp64 first; one that is wrong is not timed. Peers take turns, so that a machine that slows down slows
them all: compare ratios, not milliseconds. The machine's limits are measured in the same run.
"""

import math
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import empcause
from empcause._C import build_info, multiply_adds, read_all
from empcause.benchmarks import long_context
from empcause.benchmarks.comparison import Limit, directions, time_case
from empcause.benchmarks.cpu_report import plot_ratios, plot_roofline, where
from empcause.benchmarks.figures import OURS, Results, Row, ratios, resumed
from empcause.benchmarks.memory import peak_bytes, require_linux
from empcause.benchmarks.peers import FLEX, Peer, check_names, cpu_peers, make_inputs
from empcause.benchmarks.plotting import plot_long_context, require_matplotlib
from empcause.benchmarks.shapes import Case
from empcause.benchmarks.timing import Stopwatch

CPU = f"{OURS} cpu"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Seconds that a peer may take to be checked: plain torch in bf16 needs minutes on a processor without bf16.
PATIENCE = 4.0
LENGTHS = (32, 64, 128, 256, 512, 1024, 2048)
# Words and punctuation marks of 32 dialogues drawn from EmpatheticDialogues' validation split.
DIALOGUES = tuple(
    int(length)
    for length in "115 110 104 98 93 90 90 87 86 85 81 80 78 76 72 72 "
    "70 68 68 67 65 63 62 59 52 51 51 47 46 46 43 37".split()
)


def _square(name: str, length: int, heads: int = 12, key_heads: int = 12, dim: int = 64, **options: object) -> Case:
    batch = 8 if length <= 512 else max(1, 2048 // length)
    sizes = f"{batch}x{heads}{f'/{key_heads}' if key_heads != heads else ''}x{length}x{dim}"
    return Case(f"{name} {sizes}", batch, heads, key_heads, length, length, dim, **options)  # type: ignore[arg-type]


_DIALOGUES = Case("dialogues", len(DIALOGUES), 12, 12, max(DIALOGUES), max(DIALOGUES), 64, mixed=DIALOGUES)

# Each is timed in every dtype.
SUITES: dict[str, list[Case]] = {
    "lengths": [_square("GPT-2", length) for length in LENGTHS],
    "shapes": [
        *(_square("head size", 512, dim=dim) for dim in (32, 80, 128)),
        _square("grouped", 512, key_heads=4),
        _square("SmolLM2", 128, heads=9, key_heads=3),
    ],
    "dropout": [_square("dropout 0.1", 512, dropout_p=0.1)],
    "decoding": [Case("decode 8x12x1/4096x64", 8, 12, 12, 1, 4096, 64)],
    "dialogues": [
        replace(_DIALOGUES, name="dialogues, padded", padded=True),
        replace(_DIALOGUES, name="dialogues, packed", packed=True),
    ],
    "overhead": [Case("one query, one key 1x1x1x64", 1, 1, 1, 1, 1, 64)],
}


class Limits:
    """The most that the machine does with as many threads as torch has: multiply-adds, and reading memory.

    Attributes:
        gflops: 10^9 FLOP/s of each dtype, the best of several. bf16 is on a par with fp32 where it is multiplied as that.
        gigabytes: 10^9 bytes/s, the best of several.
    """

    def __init__(self, rounds: int = 4_000_000, bytes_read: int = 2**29, repeats: int = 8) -> None:
        self._tasks = 8 * torch.get_num_threads()
        self._values = torch.ones(bytes_read // 4)  # more than the caches hold
        # Whether bf16 is multiplied as bf16, two products at a time.
        has_bf16 = multiply_adds(1, 1, True) > multiply_adds(1, 1, False)
        self._as_bf16 = {torch.float32: False, torch.bfloat16: has_bf16}
        best = {as_bf16: _best_rate(self._multiply_adds(as_bf16, rounds), repeats) for as_bf16 in {False, has_bf16}}
        self.gflops = {dtype: best[as_bf16] for dtype, as_bf16 in self._as_bf16.items()}
        self.gigabytes = _best_rate(self._reading(bytes_read), repeats)

    def of(self, case: Case) -> Limit:
        """Return the limit of a case, which is timed in turn with it: a machine that others use too is not always equally fast.

        Decoding is bound by reading, the rest by multiply-adds. A limit does no more work than the case needs, so that waking
        threads counts as much in both; and while a processor computes for long and reads nothing, its neighbours fill the
        caches, and the peer that comes next pays for it.
        """
        if case.decoding:
            return self._reading(case.bytes("forward"))
        as_bf16 = self._as_bf16[case.dtype]
        return self._multiply_adds(as_bf16, int(case.flops("forward")) // multiply_adds(1, 1, as_bf16))

    def _multiply_adds(self, as_bf16: bool, rounds: int) -> Limit:
        rounds_each = max(1, rounds // self._tasks)

        def run() -> None:
            multiply_adds(rounds_each, self._tasks, as_bf16)

        work = rounds_each * self._tasks * multiply_adds(1, 1, as_bf16)
        return Limit("limit: multiply-adds", run, work, Case.flops)

    def _reading(self, wanted: int) -> Limit:
        values = self._values[: wanted // 4]

        def run() -> None:
            read_all(values.data_ptr(), values.numel(), self._tasks)

        return Limit("limit: reading", run, values.nbytes, Case.bytes)


def _best_rate(limit: Limit, repeats: int) -> float:
    """Return the best rate of several runs: 10^9 FLOPs or bytes per second."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        limit.run()
        times.append(time.perf_counter() - start)
    return limit.work / min(times) / 1e9


def machine(limits: Limits) -> dict[str, str]:
    """Return what the figures depend on: processor, instruction set, threads, limits, versions."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return {
        "cpu": model,
        "isa": build_info()["isa_selected"],
        "threads": str(torch.get_num_threads()),
        "peak_gflops": f"{limits.gflops[torch.float32]:.1f}",
        "peak_gflops_bf16": f"{limits.gflops[torch.bfloat16]:.1f}",
        "read_gbytes": f"{limits.gigabytes:.1f}",
        "empcause": empcause.__version__,
        "torch": torch.__version__,
    }


def chosen_cases(suites: Iterable[str] | None = None, dtypes: Iterable[str] | None = None) -> list[Case]:
    """Return the cases of suites in the dtypes, both by name; None: all."""
    suites, dtypes = SUITES if suites is None else suites, DTYPES if dtypes is None else dtypes
    return [replace(case, dtype=DTYPES[dtype]) for suite in suites for dtype in dtypes for case in SUITES[suite]]


def chosen_peers(names: Sequence[str] | None = None) -> list[Peer]:
    """Return this package and the peers of these names; None: all but FlexAttention, which compiles for long."""
    return [peer for peer in cpu_peers() if peer.ours or (peer.name != FLEX if names is None else peer.name in names)]


def run(
    suites: Sequence[str],
    dtypes: Sequence[str],
    names: Sequence[str] | None,
    seconds: float,
    limits: Limits,
    results: Results,
) -> None:
    """Judge and time the peers on every case that the results do not have yet.

    Args:
        suites, dtypes, names: as in `chosen_cases` and `chosen_peers`.
        seconds: for the rounds of one direction of a case.
        results: get the rows of each case when it is complete.
    """
    peers, stopwatch = chosen_peers(names), Stopwatch("cpu")
    cases = [case for case in chosen_cases(suites, dtypes) if not results.has("attention", case.title)]
    for case in tqdm(cases, desc="attention", unit="case", disable=None):
        limit = limits.of(case)
        results.add(time_case(case, peers, "cpu", stopwatch, patience=PATIENCE, rounds_seconds=seconds, limit=limit))


def peak_memory(name: str, length: int) -> int:
    """Return the bytes that a forward and backward pass takes at its peak beside its inputs."""
    inputs = make_inputs(Case("memory", 1, 12, 12, length, length, 64, torch.float32), "cpu")
    peer = next(peer for peer in cpu_peers() if peer.name == name)
    call = directions(inputs, peer, peer.prepare(inputs, 0.0))["forward+backward"]
    small = make_inputs(Case("memory", 1, 12, 12, 8, 8, 64, torch.float32), "cpu")
    directions(small, peer, peer.prepare(small, 0.0))["forward+backward"]()  # what is loaded once
    return peak_bytes(call, "cpu")


def run_memory(
    lengths: Sequence[int] = (1024, 2048, 4096), done: Callable[[str, str], bool] = lambda case, peer: False
) -> Iterator[Row]:
    """Yield the peak memory of this package and of the eager formula, each in a process of its own.

    Args:
        done: says of a case and a peer whether they are left out.

    Raises:
        UserError: not on Linux.
    """
    require_linux()
    context = multiprocessing.get_context("spawn")
    for length in lengths:
        case = f"GPT-2 1x12x{length}x64, float32"
        for peer in (CPU, "eager formula"):
            if done(case, peer):
                continue
            with context.Pool(1) as pool:
                extra = pool.apply(peak_memory, (peer, length))
            yield Row("memory", case, "forward+backward", peer, True, "ok", peak_mib=extra / 2**20)


def best_peers(rows: Sequence[Row]) -> dict[tuple[str, str, str], tuple[str, float]]:
    """Return the fastest peer of the same function, and its time / ours, for each section, case and direction."""
    found: dict[tuple[str, str, str], tuple[str, float]] = {}
    by_peer = ratios(rows)
    for row in rows:
        ratio = by_peer.get((row.group, row.peer), {}).get(CPU, math.inf)
        if row.same_function and ratio < found.get(row.group, ("", math.inf))[1]:
            found[row.group] = row.peer, ratio
    return found


def print_table(rows: Sequence[Row], limits: Limits, console: Console) -> None:
    """Print our figures with the fastest peer's ratio, then geometric means, then what was not timed."""
    best, found = best_peers(rows), ratios(rows)
    table = Table("case", "direction", "ms", "p20", "p80", "GFLOP/s", "of limit", "best peer", "/ ours", box=SIMPLE)
    for column in table.columns[2:7] + table.columns[8:]:
        column.justify = "right"
    for row in rows:
        if row.timing and row.peer == CPU and row.section == "attention":
            name, ratio = best.get(row.group, ("", math.nan))
            times = (f"{value:.3g}" for value in (row.timing.median, row.timing.p20, row.timing.p80))
            assert row.shape is not None
            share = found[row.group, limits.of(row.shape).name][CPU]
            rates = (f"{row.gflops:.1f}", f"{share:.0%}")
            table.add_row(row.case, row.direction, *times, *rates, name, f"{ratio:.2f}" if name else "")
    console.print(table)
    lengths: dict[tuple[str, str], list[float]] = {}
    for (_, case, direction), (_, ratio) in best.items():
        if case.startswith("GPT-2"):
            lengths.setdefault((case.split(", ")[1], direction), []).append(ratio)
    for (dtype, direction), values in lengths.items():
        mean = statistics.geometric_mean(values)
        console.print(f"GPT-2 lengths, {dtype}, {direction}: {mean:.2f} (geometric mean), {min(values):.2f} at least")
    for row in rows:
        if row.peak_mib is not None:
            spent = f"{row.timing.median:.4g} ms, " if row.timing else ""
            console.print(f"{row.case}, {row.direction}, {row.peer}: {spent}peak memory {row.peak_mib:.0f} MiB")
        elif row.timing is None:
            console.print(f"not timed: {row.case}, {row.peer}: {row.status}")
    console.print(
        f"At best {limits.gflops[torch.float32]:.0f} GFLOP/s in fp32, {limits.gflops[torch.bfloat16]:.0f} in bf16, and"
        f" {limits.gigabytes:.1f} GB/s read. Limits: multiply-adds, in decoding reading, timed in turn with each case."
    )


# What `bench` writes, the last if the suite "long" was measured.
FILES = ("cpu.csv", "cpu_ratios.png", "cpu_roofline.png", "cpu_long_context.png")


def bench(
    suites: Sequence[str],
    dtypes: Sequence[str],
    names: Sequence[str] | None = None,
    output: Path | None = None,
    seconds: float = 1.5,
    resume: bool = False,
    console: Console | None = None,
) -> list[Row]:
    """Measure, print and, given a folder, write FILES there, the table whenever a case is complete.

    Args:
        suites: of SUITES, and "memory" and "long".
        output: folder of the results.
        resume: go on with the run whose table is in that folder.

    Raises:
        UserError: an unknown peer; plots without matplotlib; see `resumed`.
    """
    require_matplotlib(output)
    check_names(names, cpu_peers())
    console = console or Console()
    console.width = max(console.width, 150 if not console.is_terminal else 0)
    limits = Limits()
    facts, table = machine(limits), None if output is None else output / FILES[0]
    results = Results(facts, table)
    if resume and table is not None:
        results = resumed(facts, ("peak_gflops", "peak_gflops_bf16", "read_gbytes"), table)
        shapes = {case.title: case for case in chosen_cases()}
        results.rows = [replace(row, shape=shapes.get(row.case)) for row in results.rows]
    run([suite for suite in suites if suite in SUITES], dtypes, names, seconds, limits, results)
    if "memory" in suites:
        for row in run_memory(done=lambda case, peer: results.has("memory", case, peer=peer)):
            results.add([row])
    if "long" in suites:
        every = cpu_peers() if names is None else chosen_peers(names)
        done = partial(results.has, long_context.SECTION)
        peers = long_context.chosen_peers(every)
        for rows in long_context.run_on_cpu(peers, seconds, done=lambda case, peer: done(case, peer=peer)):
            results.add(rows)
    print_table(results.rows, limits, console)
    if output is not None:
        ratios, roofline, long = (output / name for name in FILES[1:])
        plot_ratios(results.rows, results.facts, ratios)
        plot_roofline(results.rows, {*limits.gflops.values()}, limits.gigabytes, results.facts, roofline)
        plot_long_context(results.rows, where(results.facts), long)
        console.print(f"Results are in {output}{os.sep}.")
    return results.rows
