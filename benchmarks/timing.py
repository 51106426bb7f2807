"""Time budgets, and timings of several functions taken in turn."""

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

# Written between repeats so that no call finds its inputs in the cache: more than any GPU's L2 holds.
FLUSHED_BYTES = 256 * 2**20
MIN_REPEATS, MAX_REPEATS = 5, 100
ROUNDS_SECONDS = 1.5


def capability(device: str) -> str:
    """Return the compute capability of a CUDA device, such as "9.0"; "" for the CPU."""
    return "{}.{}".format(*torch.cuda.get_device_capability(device)) if device.startswith("cuda") else ""


@dataclass(frozen=True)
class Timing:
    """Milliseconds: the median, and the 20th and 80th percentile."""

    median: float
    p20: float
    p80: float
    repeats: int

    @classmethod
    def of(cls, milliseconds: list[float]) -> "Timing":
        """Return the quantiles of measured times."""
        if len(milliseconds) == 1:
            return cls(milliseconds[0], milliseconds[0], milliseconds[0], 1)
        low, *_, high = statistics.quantiles(milliseconds, n=5, method="inclusive")
        return cls(statistics.median(milliseconds), low, high, len(milliseconds))

    def scaled(self, factor: float) -> "Timing":
        """Return the times of `factor` times the work."""
        return Timing(self.median * factor, self.p20 * factor, self.p80 * factor, self.repeats)


class Stopwatch:
    """Times functions on a device: events on the GPU's own clock, or the host's clock for CPU tensors."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device.startswith("cuda")
        self._flushed = torch.empty(FLUSHED_BYTES if self.on_gpu else 0, dtype=torch.int8, device=device)

    def interleave(self, calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, Timing]:
        """Time functions in turn, each round in another order.

        What drifts, and what the function before left in the caches, meets all alike.

        Args:
            calls: functions, warmed up here.
            seconds: what all rounds together may take; there are at least 5 and at most 100 rounds. A function that takes longer
                than this by itself sits out the rounds after its second.

        Returns:
            A timing per function.
        """
        estimates = {}
        for name, call in calls.items():
            estimates[name] = self._seconds(call)
            if estimates[name] < seconds:
                call()
                estimates[name] = self._seconds(call)
        rounds = max(MIN_REPEATS, min(MAX_REPEATS, int(seconds / max(sum(estimates.values()), 1e-6))))
        names = list(calls)
        spans: dict[str, list] = {name: [] for name in names}
        order = random.Random(0)
        for _ in range(rounds):
            for name in order.sample(names, len(names)):
                if len(spans[name]) < 2 or estimates[name] * len(spans[name]) < seconds:
                    spans[name].append(self._span(calls[name]))
        self._wait()
        return {name: Timing.of([self._milliseconds(span) for span in spans[name]]) for name in names}

    def _seconds(self, call: Callable[[], object]) -> float:
        self._wait()
        start = time.perf_counter()
        self._span(call)
        self._wait()
        return time.perf_counter() - start

    def _span(self, call: Callable[[], object]) -> tuple:
        self._flushed.zero_()
        if not self.on_gpu:
            start = time.perf_counter()
            call()
            return start, time.perf_counter()
        events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        events[0].record()
        call()
        events[1].record()
        return events

    def _milliseconds(self, span: tuple) -> float:
        return span[0].elapsed_time(span[1]) if self.on_gpu else (span[1] - span[0]) * 1e3

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()


class HostStopwatch(Stopwatch):
    """Times how long the host is busy with a call, whether or not the device has done the work by then."""

    CALLS = 20  # in a row, for one timing: few enough that the device's queue never holds up the host

    def _span(self, call: Callable[[], object]) -> tuple:
        self._wait()
        start = time.perf_counter()
        for _ in range(self.CALLS):
            call()
        return start, time.perf_counter()

    def _milliseconds(self, span: tuple) -> float:
        return (span[1] - span[0]) * 1e3 / self.CALLS


@dataclass
class Budget:
    """Seconds of a whole run. `skipped` collects what was not begun because too few of them were left."""

    seconds: float = float("inf")
    clock: Callable[[], float] = time.monotonic
    skipped: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._end = self.clock() + self.seconds

    def left(self) -> float:
        """Seconds left to the run."""
        return self._end - self.clock()

    def allows(self, what: str, seconds: float) -> bool:
        """Whether this many seconds are left for `what`; if not, `what` is noted as not reached."""
        if self.left() >= seconds:
            return True
        self.skipped.append(what)
        return False
