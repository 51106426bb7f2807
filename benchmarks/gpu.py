"""What `empcause bench` does on a GPU: correctness first, then attention and models beside the other ways to them.

Kernels are compiled beforehand, in as many processes as there are cores. Cases are measured in the order of their importance,
each with all peers before the next one begins, and written when they are complete, so that a run that is stopped loses none and
can be continued. Every case is judged before it is timed; one that is wrong has no figures.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import empcause
from empcause.benchmarks import correctness, long_context, models, training_steps
from empcause.benchmarks.comparison import directions, prepare, time_case
from empcause.benchmarks.figures import OURS, Results, Row, resumed
from empcause.benchmarks.gate import first_sentence
from empcause.benchmarks.gpu_report import FILES, machine, plot_all
from empcause.benchmarks.memory import peak_bytes
from empcause.benchmarks.peers import FLEX, FLEX_FLASH, Peer, check_names, gpu_peers, make_inputs
from empcause.benchmarks.plotting import require_matplotlib
from empcause.benchmarks.shapes import GPU_SUITES, TINY, Case
from empcause.benchmarks.timing import Budget, HostStopwatch, Stopwatch, Timing, capability
from empcause.benchmarks.training_steps import Texts
from empcause.benchmarks.workers import NOT_REACHED, Task, run_all
from empcause.errors import UserError

# In the order of their importance: those of attention by shape (GPU_SUITES), the host's time, and models.
SUITES = ("lengths", "dialogues", "overhead", "decoding", "steps", "generation", "shapes", "dropout", "long", "memory")
BACKENDS = ["triton", "cuda"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FIRST = "bf16"  # the dtype of what is measured in one dtype
# Seconds that compiling and checking beforehand may take; and that a case, a training step (not compiled, compiled), and a model
# need at least.
BEFOREHAND, CASE_SECONDS, STEP_SECONDS, MODEL_SECONDS = 180.0, 8.0, (6.0, 60.0), 20.0
MEMORY_LENGTHS = (1024, 2048, 4096)
PROMPTS = (8, 256, 64)  # batch, tokens, new tokens
HOST_PROMPTS = (1, 64, 0)

TEXTS = [
    Texts("16 texts of 64 to 256 tokens, padded", 16, 256),
    Texts("16 texts of 64 to 256 tokens, packed", 16, 256, packed=True),
    Texts("8 texts of 256 to 1,024 tokens, padded", 8, 1024),
    Texts("8 texts of 256 to 1,024 tokens, packed", 8, 1024, packed=True),
]
COMPILED_TEXTS = 2  # of these, that steps are compiled for


@dataclass(frozen=True)
class Job:
    """What is measured at once and written when it is complete.

    Attributes:
        section, case, direction, peer: those of its rows; None where they have several.
        seconds: what it needs at least.
        measure: yields its rows.
    """

    section: str
    case: str
    seconds: float
    measure: Callable[[], Iterable[Row]]
    direction: str | None = None
    peer: str | None = None

    @property
    def name(self) -> str:
        return ", ".join(filter(None, (self.section, self.case, self.direction, self.peer)))


class Plan:
    """The jobs of a run and what is done beforehand for them.

    Args:
        peers: of attention.
        seconds: for the rounds of one direction of a case.
        budget: of the run.
        sizes: of the models.
    """

    def __init__(
        self, peers: Sequence[Peer], device: str, seconds: float, budget: Budget, sizes: dict[str, Any] | None = None
    ) -> None:
        self.peers, self.device, self.seconds, self.budget = peers, device, seconds, budget
        self.sizes = training_steps.GPT2 if sizes is None else sizes
        self.stopwatch, self.host_stopwatch = Stopwatch(device), HostStopwatch(device)
        self.kind: dict[str, Any] = {"capability": capability(device)}
        self.backends = [name for name in BACKENDS if empcause.info()[name].runs]
        self._verdicts: dict[Any, str | None] = {}

    def jobs(self, suites: Iterable[str], dtypes: Sequence[str]) -> Iterator[Job]:
        """Yield the jobs of suites, the most important first: all suites in the first dtype, then attention in the others."""
        jobs_of = {
            "overhead": self._overhead,
            "steps": self._steps,
            "generation": self._generation,
            "long": self._long,
            "memory": self._memory,
        }
        for number, dtype in enumerate(_ordered(dtypes)):
            for suite in _ordered_suites(suites):
                if suite in GPU_SUITES:
                    yield from map(self._attention, self._cases(suite, dtype))
                elif number == 0:
                    yield from jobs_of[suite](DTYPES[dtype])

    def tasks(self, suites: Iterable[str], dtypes: Sequence[str], results: Results) -> list[Task]:
        """Return what compiles the kernels of jobs beforehand, but for cases that the results have."""
        found: list[Task] = []
        if "steps" in suites:
            for index in range(min(COMPILED_TEXTS, len(TEXTS))):
                for variant in training_steps.variants(self.backends, True):
                    found.append((compile_step, (variant, TEXTS[index], self.sizes, self.device)))
        compiled = [peer.name for peer in self.peers if peer.name in (f"{OURS} triton", FLEX, FLEX_FLASH)]
        for dtype in _ordered(dtypes):
            for suite in _ordered_suites(suites):
                section = "host time" if suite == "overhead" else "attention"
                cases = (case for case in self._cases(suite, dtype) if not results.has(section, case.title))
                for case in cases:
                    found += [(compile_case, (case, name, self.device)) for name in compiled]
        return found

    def _cases(self, suite: str, dtype: str) -> list[Case]:
        cases = TINY if suite == "overhead" else GPU_SUITES.get(suite, [])
        return [replace(case, dtype=DTYPES[dtype]) for case in cases]

    def _attention(self, case: Case) -> Job:
        def measure() -> Iterator[Row]:
            yield from time_case(
                case, self.peers, self.device, self.stopwatch, self.budget.left(), rounds_seconds=self.seconds
            )

        return Job("attention", case.title, CASE_SECONDS, measure)

    def _overhead(self, dtype: torch.dtype) -> Iterator[Job]:
        """The host's time of tiny calls, and of a model's pass with and without `steer`."""
        for case in (replace(case, dtype=dtype) for case in TINY):

            def measure(case: Case = case) -> Iterator[Row]:
                yield from time_case(
                    case,
                    self.peers,
                    self.device,
                    self.host_stopwatch,
                    self.budget.left(),
                    rounds_seconds=self.seconds,
                    section="host time",
                )

            yield Job("host time", case.title, CASE_SECONDS, measure)
        title = f"GPT-2, {HOST_PROMPTS[0]} x {HOST_PROMPTS[1]} tokens, {_name(dtype)}"
        yield Job("host time", title, MODEL_SECONDS, lambda: self._model_passes(title, dtype))

    def _model_passes(self, title: str, dtype: torch.dtype) -> Iterator[Row]:
        calls: dict[str, dict[str, Callable[[], object]]] = {}
        with ExitStack() as steering:
            for attention in models.attentions(self.backends):
                identity = ("host time", title)
                status = self._judge_model(attention)
                if status is not None:
                    yield Row(*identity, "all", attention.name, True, status, **self.kind)
                    continue
                prompts = models.Prompts(self.sizes, *HOST_PROMPTS, self.device, dtype)
                prompts.model.set_attn_implementation(attention.implementation)
                if attention.steered:
                    steering.enter_context(empcause.steer(prompts.model, prompts.causes))
                for direction, call in prompts.passes(attention.backend).items():
                    calls.setdefault(direction, {})[attention.name] = call
            for direction, found in calls.items():
                for name, timing in self.host_stopwatch.interleave(found, self.seconds).items():
                    yield Row("host time", title, direction, name, True, "ok", timing, **self.kind)

    def _judge_model(self, attention: models.Attention) -> str | None:
        """Say what is wrong with a model's attention, judged once; None if nothing is."""
        if attention.implementation != "empcause":
            return None
        if attention not in self._verdicts:
            try:
                self._verdicts[attention] = models.judge(attention, self.sizes, self.device)
            except Exception as error:  # models refuse in many ways
                self._verdicts[attention] = f"does not run: {first_sentence(error)}"
        return self._verdicts[attention]

    def _generation(self, dtype: torch.dtype) -> Iterator[Job]:
        batch, tokens, new = PROMPTS
        every = models.attentions(self.backends)
        for cache in models.CACHES:
            title = f"GPT-2, {batch} prompts of {tokens} tokens, {new} new tokens, {cache}, {_name(dtype)}"
            # What is compiled is timed by itself, since the compiler keeps few forms of a function at a time.
            for attentions in [[each] for each in every] if cache == models.COMPILED else [every]:
                yield Job(
                    "generation",
                    title,
                    MODEL_SECONDS,
                    lambda cache=cache, title=title, attentions=attentions: self._generate(  # type: ignore[misc]
                        cache, title, dtype, attentions
                    ),
                    peer=attentions[0].name if len(attentions) == 1 else None,
                )

    def _generate(
        self, cache: str, title: str, dtype: torch.dtype, attentions: Sequence[models.Attention]
    ) -> Iterator[Row]:
        torch.compiler.reset()
        prompts, calls = models.Prompts(self.sizes, *PROMPTS, self.device, dtype), {}
        for attention in attentions:
            status = self._judge_model(attention)
            if status is None:
                try:
                    call = _generating(prompts, attention, models.CACHES[cache])
                    call()
                    calls[attention.name] = call
                except Exception as error:  # models refuse in many ways
                    status = f"does not run: {first_sentence(error)}"
            if status is not None:
                yield Row("generation", title, "generate", attention.name, True, status, **self.kind)
        for name, timing in self.stopwatch.interleave(calls, self.seconds).items():
            yield Row("generation", title, "generate", name, True, "ok", timing, **self.kind)

    def _steps(self, dtype: torch.dtype) -> Iterator[Job]:
        """Training steps, which are in bf16 under autocast whatever `dtype` is: not compiled, then compiled."""
        batches = [*((batch, False) for batch in TEXTS), *((batch, True) for batch in TEXTS[:COMPILED_TEXTS])]
        for texts, compiled in batches:
            for variant in training_steps.variants(self.backends, compiled):
                direction = "compiled step" if compiled else "step"
                job = Job(
                    "training step",
                    texts.name,
                    STEP_SECONDS[compiled],
                    lambda variant=variant, texts=texts, direction=direction: [self._step(variant, texts, direction)],  # type: ignore[misc]
                    direction,
                    variant.name,
                )
                yield job

    def _step(self, variant: training_steps.Variant, texts: Texts, direction: str) -> Row:
        identity = ("training step", texts.name, direction, variant.name, variant.backend is not None)
        key = variant.backend, texts.packed
        try:
            if variant.backend is not None and key not in self._verdicts:
                smallest = next(other for other in TEXTS if other.packed == texts.packed)
                self._verdicts[key] = training_steps.judge(variant, smallest, self.sizes, self.device)
            verdict = self._verdicts.get(key)
            if verdict is not None:
                return Row(*identity, verdict, **self.kind)
            torch.compiler.reset()
            calls: dict[str, Callable[[], object]] = {}
            timing: Timing | None = None

            def measure() -> None:
                nonlocal timing
                with empcause.use_backend(variant.backend or "reference"):
                    calls[variant.name] = training_steps.prepare(variant, texts, self.sizes, self.device)
                    timing = self.stopwatch.interleave(calls, self.seconds)[variant.name]

            peak = peak_bytes(measure, self.device)
            return Row(*identity, "ok", timing, peak_mib=peak / 2**20, **self.kind)
        except Exception as error:  # models refuse in many ways
            return Row(*identity, f"does not run: {first_sentence(error)}", **self.kind)

    def _long(self, dtype: torch.dtype) -> Iterator[Job]:
        for length in long_context.LENGTHS:
            case = long_context.long_case(length, dtype)
            for peer in long_context.chosen_peers(self.peers):
                yield Job(
                    long_context.SECTION,
                    case.title,
                    CASE_SECONDS,
                    lambda peer=peer, case=case: long_context.measure(peer, case, self.device, self.seconds),  # type: ignore[misc]
                    peer=peer.name,
                )

    def _memory(self, dtype: torch.dtype) -> Iterator[Job]:
        for length in MEMORY_LENGTHS:
            case = Case(f"GPT-2 1x12x{length}x64", 1, 12, 12, length, length, 64, dtype)
            yield Job("memory", case.title, CASE_SECONDS, lambda case=case: self._peaks(case))  # type: ignore[misc]

    def _peaks(self, case: Case) -> Iterator[Row]:
        kind: dict[str, Any] = self.kind | {"dtype": case.dtype_name, "head_dim": case.dim}
        for found in prepare(case, self.peers, self.device):
            identity = ("memory", case.title, found.direction, found.peer.name, found.peer.weighted, found.status)
            if found.call is None:
                yield Row(*identity, **kind)
            elif found.direction == "forward+backward":
                yield Row(*identity, peak_mib=peak_bytes(found.call, self.device) / 2**20, **kind)


def _ordered(dtypes: Sequence[str]) -> list[str]:
    return sorted(dtypes, key=lambda name: name != FIRST)


def _ordered_suites(suites: Iterable[str]) -> list[str]:
    return sorted(suites, key=SUITES.index)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _generating(prompts: models.Prompts, attention: models.Attention, cache: dict[str, Any]) -> Callable[[], object]:
    return lambda: prompts.generate(attention, cache)


def compile_case(case: Case, name: str, device: str) -> None:
    """Call all that is timed of a peer on a case once."""
    peer = next(peer for peer in gpu_peers() if peer.name == name)
    inputs = make_inputs(case, device)
    for call in directions(inputs, peer, peer.prepare(inputs, case.dropout_p)).values():
        call()


def compile_step(variant: training_steps.Variant, texts: Texts, sizes: dict[str, Any], device: str) -> None:
    """Take two training steps."""
    with empcause.use_backend(variant.backend or "reference"):
        step = training_steps.prepare(variant, texts, sizes, device)
        step(), step()


def check_beforehand(backends: Sequence[str], tasks: Sequence[Task], device: str, seconds: float) -> list[Row]:
    """Judge the correctness matrix on backends and do the tasks, all at once.

    Returns:
        For each backend a row that counts the cases that are right, and one for each that is wrong or was not reached.
    """
    matrix = [(backend, case) for backend in backends for case in correctness.matrix()]
    judging = [(correctness.judge, (case, backend, device)) for backend, case in matrix]
    verdicts = run_all([*judging, *tasks], seconds)[: len(judging)]
    rows = []
    for backend in backends:
        peer = f"{OURS} {backend}"
        mine = [(case, verdict) for (name, case), verdict in zip(matrix, verdicts, strict=True) if name == backend]
        right = sum(verdict is None for _, verdict in mine)
        rows.append(Row("correctness", "matrix", "all", peer, True, f"{right} of {len(mine)} cases right"))
        for case, verdict in mine:
            if verdict is not None:
                said = f"does not run: {first_sentence(verdict)}" if isinstance(verdict, Exception) else verdict
                rows.append(Row("correctness", str(case), "all", peer, True, said))
    return [replace(row, capability=capability(device)) for row in rows]


def bench(
    suites: Sequence[str],
    dtypes: Sequence[str],
    names: Sequence[str] | None = None,
    output: Path | None = None,
    seconds: float = 1.5,
    resume: bool = False,
    minutes: float = float("inf"),
    device: str = "cuda",
    console: Console | None = None,
) -> list[Row]:
    """Check, measure, print and, given a folder, write `gpu.csv` and plots there, the table whenever a case is complete.

    Args:
        suites: of SUITES.
        dtypes: of DTYPES. What is not attention by shape is measured in bf16 alone, or in the first if that is not one of them.
        names: peers; None: all.
        output: folder of the results.
        seconds: for the rounds of one direction of a case.
        resume: go on with the run whose table is in that folder.
        minutes: after these, nothing new is begun.

    Raises:
        UserError: an unknown peer; plots without matplotlib; see `resumed`; the GPU does not answer any more.
    """
    require_matplotlib(output)
    check_names(names, gpu_peers())
    peers = [peer for peer in gpu_peers() if peer.ours or names is None or peer.name in names]
    console, budget, facts = console or Console(), Budget(60 * minutes), machine(device)
    console.print(empcause.info())
    table = None if output is None else output / FILES[0]
    results = resumed(facts, (), table) if resume and table is not None else Results(facts, table)
    plan = Plan(peers, device, seconds, budget)
    jobs = [job for job in plan.jobs(suites, dtypes) if not results.has(job.section, job.case, job.direction, job.peer)]
    to_check = [] if results.has("correctness", "matrix") else plan.backends
    tasks = plan.tasks(suites, dtypes, results)
    results.add(check_beforehand(to_check, tasks, device, min(BEFOREHAND, budget.left())))
    _print(results.rows, console)
    for job in jobs:
        if budget.allows(job.name, job.seconds):
            rows = _measured(job)
            results.add(rows)
            _print(rows, console)
            try:
                settle(device)
            except Exception as error:
                said = f"The GPU does not answer any more after {job.name} ({first_sentence(error)})"
                raise UserError(f"{said}; --resume goes on with the next case.") from error
    if output is not None:
        plot_all(results.rows, facts, output)
        console.print(f"Results are in {output}{os.sep}.")
    for what in budget.skipped:
        console.print(f"not reached: {what}")
    return results.rows


def _measured(job: Job) -> list[Row]:
    """Return the rows of a job, the last with what it died of if it did."""
    rows: list[Row] = []
    try:
        for row in job.measure():
            rows.append(row)
    except Exception as error:  # memory that ends while a peer is timed, for example
        identity = (job.section, job.case, job.direction or "all", job.peer or "the next peer")
        rows.append(Row(*identity, True, f"does not run: {first_sentence(error)}"))
    return rows


def settle(device: str) -> None:
    """Wait for the device, and give back the memory that it does not need.

    Raises:
        RuntimeError: an earlier call broke it, so that no later call could succeed.
    """
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def count_wrong(rows: Iterable[Row]) -> int:
    """Return how many cases of the correctness matrix are wrong."""
    return sum(row.section == "correctness" and row.case != "matrix" and row.status != NOT_REACHED for row in rows)


def _print(rows: Iterable[Row], console: Console) -> None:
    for row in rows:
        where = f"{row.section}, {row.case}, {row.direction}, {row.peer}"
        figures = [] if row.timing is None else [f"{row.timing.median:.4g} ms"]
        figures += [] if row.peak_mib is None else [f"{row.peak_mib:.0f} MiB"]
        console.print(f"{where}: {', '.join(figures) or row.status}", highlight=False, soft_wrap=True, markup=False)
