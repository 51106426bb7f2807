"""What of `empcause bench` on a GPU runs without one: peers, gates, the plan, timings on the CPU, files, the sentence it says."""

import csv
import math
import os
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend

from empcause.benchmarks import correctness, gpu, long_context, models, training_steps, workers
from empcause.benchmarks.comparison import time_case
from empcause.benchmarks.figures import Results, Row, ratios, read_csv, write_csv
from empcause.benchmarks.gate import Gate
from empcause.benchmarks.gpu_report import cuda_is_not_slower, plot
from empcause.benchmarks.models import Attention
from empcause.benchmarks.peers import Peer, formula, make_inputs, peers, this_package
from empcause.benchmarks.shapes import GPU_SUITES, TINY, Case
from empcause.benchmarks.timing import MAX_REPEATS, MIN_REPEATS, Budget, HostStopwatch, Stopwatch, Timing
from empcause.benchmarks.training_steps import Texts
from empcause.benchmarks.workers import NOT_REACHED, run_all
from empcause.cli import main
from empcause.cli.bench import GPU_DTYPES
from empcause.cli.bench import GPU_SUITES as CHOICES
from empcause.errors import UserError
from empcause.integration import attention as integration
from empcause.ops.backends import CUDA_IS_NOT_SLOWER
from empcause.ops.choice import choose_backend
from empcause.testing import disagreement

KERNELS = {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}
SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 100, "n_positions": 64}
SMALL = Case("small", 3, 4, 4, 48, 48, 16, torch.float32)
CASES = {
    "plain": SMALL,
    "bf16": replace(SMALL, dtype=torch.bfloat16),
    "grouped": replace(SMALL, key_heads=2),
    "padded": replace(SMALL, padded=True),
    "packed": replace(SMALL, packed=True),
    "dropout": replace(SMALL, dropout_p=0.2),
    "decoding": replace(SMALL, queries=1, key_heads=2),
}


class Clock:
    """A clock that a test sets."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class TestPeers:
    @pytest.mark.parametrize("name", CASES)
    def test_each_computes_what_it_says(self, name):
        """Every peer passes the gate, or refuses for a reason that is expected of it."""
        inputs = make_inputs(CASES[name], "cpu")
        gate, right = Gate(inputs), []
        for peer in peers(["cpu"], KERNELS, compiled=False):
            try:
                verdict = gate.verdict(peer, peer.prepare(inputs, CASES[name].dropout_p))
            except (RuntimeError, ValueError, NotImplementedError, ModuleNotFoundError) as error:
                expected = (
                    "FlexAttention|no packed sequences|FlashAttention and without dropout|flash_attention_forward"
                    "|No module named 'flash_attn'"
                )
                if not re.search(expected, str(error)):
                    raise
            else:
                assert verdict is None, f"{peer.name}: {verdict}"
                right.append(peer.name)
        assert "empcause cpu" in right
        if name == "decoding":  # FlexAttention has no backward pass on the CPU, but a forward pass
            assert "flex score_mod" in right
        if name != "packed":
            assert {"eager formula", "folded, sdpa flash", "sdpa math, log-weight mask", "sdpa flash, no weights"} <= {
                *right
            }

    def test_flex_packs_sequences(self):
        inputs = make_inputs(CASES["packed"], "cpu")
        flex = next(peer for peer in peers([], {}, compiled=False) if peer.name == "flex score_mod")
        ours = this_package("reference").prepare(inputs, 0.0)
        torch.testing.assert_close(
            flex.prepare(inputs, 0.0)(*inputs.leaves), ours(*inputs.leaves), rtol=1e-4, atol=1e-5
        )

    def test_shapes_of_the_cases(self):
        padded, packed = make_inputs(CASES["padded"], "cpu"), make_inputs(CASES["packed"], "cpu")
        assert padded.case.lengths == [48, 30, 12]
        assert padded.query.shape == (3, 4, 48, 16)
        assert padded.key_mask.sum(1).tolist() == packed.sums.diff().tolist() == [48, 30, 12]
        assert packed.query.shape == (90, 4, 16)
        tokens, rows = 3 * 4 * 16, [padded.query, padded.key, padded.value]
        assert [row.stride() for row in rows] == 3 * [(48 * tokens, 16, tokens, 1)], "as GPT-2's projection leaves them"
        assert [row.storage_offset() for row in rows] == [0, 4 * 16, 2 * 4 * 16]

    def test_flops_count_visible_pairs(self):
        visible = [sum(range(1, length + 1)) for length in (48, 30, 12)]
        assert CASES["packed"].flops("forward") == 4 * 16 * 4 * sum(visible)
        assert CASES["decoding"].flops("forward") == 4 * 16 * 4 * 3 * 48


class TestGate:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_peer_that_forgets_the_weights_is_red(self, dtype):
        inputs = make_inputs(replace(SMALL, dtype=dtype), "cpu")
        plain = next(peer for peer in peers([], KERNELS, compiled=False) if not peer.weighted)
        liar = replace(plain, weighted=True)
        assert "error" in Gate(inputs).verdict(liar, liar.prepare(inputs, 0.0))

    def test_one_wrong_row_is_red(self):
        inputs = make_inputs(replace(SMALL, dtype=torch.bfloat16, queries=480, keys=480), "cpu")

        def prepare(inputs, dropout_p):
            def call(*leaves):
                output = formula(*leaves, None, lambda probability: probability)
                return torch.cat([output[:, :, :-1], output[:, :, -1:] + 0.5], 2)

            return call

        peer = Peer("one wrong row", prepare)
        assert "output" in Gate(inputs).verdict(peer, prepare(inputs, 0.0))

    @pytest.mark.parametrize("wrong", [None, 0, 1, 2])
    @pytest.mark.parametrize("padded", [False, True])
    def test_every_sequence_is_judged_where_they_are_short(self, padded, wrong):
        inputs = make_inputs(replace(SMALL, padded=padded), "cpu")
        factor = torch.ones(SMALL.batch, 1, 1, 1)
        if wrong is not None:
            factor[wrong] += 1e-3

        def prepare(inputs, dropout_p):
            return lambda *leaves: factor * formula(*leaves, inputs.key_mask, lambda probability: probability)

        verdict = Gate(inputs).verdict(Peer("one wrong sequence", prepare), prepare(inputs, 0.0))
        assert verdict is None if wrong is None else "output" in verdict

    def test_nan_and_shape_are_red(self):
        good = [torch.ones(2, 3, dtype=torch.float64)]
        assert disagreement(good, good, good, torch.float32) is None
        assert "not finite" in disagreement(good, [good[0] * float("nan")], good, torch.float32)
        assert "shape" in disagreement(good, [good[0][:1]], good, torch.float32)

    @pytest.mark.parametrize(
        ("rows", "units", "verdict"), [(1, 3, None), (1, 20, "largest"), (5, 3, "root mean square")]
    )
    def test_what_is_slightly_wrong_everywhere_is_red_where_rows_are_many(self, rows, units, verdict):
        exact = [torch.ones(1, 1, rows, 8, dtype=torch.float64)]
        got = [exact[0] * (1 + units * torch.finfo(torch.float32).eps)]
        found = disagreement(exact, got, exact, torch.float32)
        assert found is None if verdict is None else verdict in found

    def test_matrix_holds_on_the_cpu(self):
        """Each dtype's first cases here; all of them on a GPU."""
        cases = list(correctness.matrix())
        assert {case.dtype for case in cases} == {torch.float32, torch.bfloat16, torch.float16}
        assert {64, 128, 256} <= {case.dim for case in cases}
        for case in cases[:12]:
            assert correctness.judge(case, "cpu", "cpu") is None

    def test_wrong_cases_are_counted(self, monkeypatch, in_this_process):
        verdicts = iter(["output: wrong", None, RuntimeError("it broke"), NOT_REACHED] + [None] * 100)

        def judge(*_):
            verdict = next(verdicts)
            if isinstance(verdict, Exception):
                raise verdict
            return verdict

        monkeypatch.setattr(correctness, "judge", judge)
        number = len(list(correctness.matrix()))
        rows = gpu.check_beforehand(["cpu"], [(math.sqrt, (4.0,))], "cpu", 60.0)
        said = [f"{number - 3} of {number} cases right", "output: wrong", "does not run: it broke", NOT_REACHED]
        assert [row.status for row in rows] == said
        assert {row.peer for row in rows} == {"empcause cpu"}
        assert gpu.count_wrong(rows) == 2

    @pytest.mark.parametrize("wrong", [None, "query", "key", "cause"])
    def test_the_last_rows_of_long_sequences_are_judged(self, monkeypatch, wrong):
        """Their exact gradients follow from the last queries alone; an error in one of their rows is found."""
        monkeypatch.setattr("empcause.benchmarks.gate.LONGEST", 32)
        monkeypatch.setattr("empcause.benchmarks.gate.LAST_ROWS", 16)
        inputs = make_inputs(replace(SMALL, queries=48, key_heads=2), "cpu")
        factors = [torch.ones(rows) for rows in (48, 48, 48)]
        if wrong is not None:
            factors[("query", "key", "cause").index(wrong)][40] += 1e-3

        class Scaled(torch.autograd.Function):
            """The identity, whose gradient is that times a factor."""

            @staticmethod
            def forward(ctx, tensor, factor):
                ctx.factor = factor
                return tensor.clone()

            @staticmethod
            def backward(ctx, grad):
                return grad * ctx.factor, None

        def prepare(inputs, dropout_p):
            right = this_package("reference").prepare(inputs, 0.0)

            def call(query, key, value, cause):
                query = Scaled.apply(query, factors[0][:, None])
                key = Scaled.apply(key, factors[1][:, None])
                return right(query, key, value, Scaled.apply(cause, factors[2]))

            return call

        verdict = Gate(inputs).verdict(Peer("long", prepare), prepare(inputs, 0.0))
        assert verdict is None if wrong is None else wrong in verdict


class TestTiming:
    def test_quantiles(self):
        timing = Timing.of([5.0, 1.0, 4.0, 2.0, 3.0, 6.0])
        assert (timing.median, timing.p20, timing.p80, timing.repeats) == (3.5, 2.0, 5.0, 6)
        assert Timing.of([7.0]) == Timing(7.0, 7.0, 7.0, 1)

    @pytest.fixture
    def stopwatch(self, monkeypatch):
        """One that takes a call for as many seconds as it returns."""
        monkeypatch.setattr(Stopwatch, "_seconds", lambda self, call: call())
        return Stopwatch("cpu")

    def test_calls_are_taken_in_turn(self, stopwatch):
        order = []
        calls = {name: lambda name=name: order.append(name) or 1.0 for name in "abc"}
        timings = stopwatch.interleave(calls, seconds=10.0)
        assert {timing.repeats for timing in timings.values()} == {MIN_REPEATS}
        warm_up, rounds = order[:9], ["".join(order[start : start + 3]) for start in range(9, len(order), 3)]
        assert warm_up == [*"aaabbbccc"]
        assert {"".join(sorted(names)) for names in rounds} == {"abc"}, "each once a round"
        assert len({*rounds}) > 1, "not always in the same order"

    def test_what_is_slow_sits_out(self, stopwatch):
        order = []
        calls = {"fast": lambda: order.append("fast") or 1.0, "slow": lambda: order.append("slow") or 100.0}
        timings = stopwatch.interleave(calls, seconds=10.0)
        assert {name: timing.repeats for name, timing in timings.items()} == {"fast": MIN_REPEATS, "slow": 2}
        assert order.count("slow") == 3, "warmed up once"

    def test_rounds_have_an_upper_bound(self):
        assert Stopwatch("cpu").interleave({"nothing": lambda: None}, seconds=60.0)["nothing"].repeats == MAX_REPEATS

    def test_a_run_ends_when_it_should(self):
        clock = Clock()
        budget = Budget(10, clock)
        clock.now += 4
        assert budget.left() == 6
        assert budget.allows("this", 6)
        assert not budget.allows("that", 6.5)
        assert budget.skipped == ["that"]
        assert Budget().allows("everything", 1e9)

    def test_the_host_is_timed_per_call(self, monkeypatch):
        clock = Clock()
        monkeypatch.setattr(time, "perf_counter", clock)

        def call():
            clock.now += 0.002

        timing = HostStopwatch("cpu").interleave({"call": call}, seconds=0.0)["call"]
        assert timing.median == pytest.approx(2.0)


class TestWorkers:
    def test_results_come_in_the_order_of_the_tasks(self):
        seven, error, two = run_all([(int, ("7",)), (int, ("x",)), (math.sqrt, (4.0,))], 600.0, processes=2)
        assert (seven, two) == (7, 2.0)
        assert isinstance(error, ValueError)
        assert run_all([], 1.0) == []

    def test_what_hangs_or_dies_is_given_up(self, monkeypatch):
        tasks = [(time.sleep, (600.0,)), (os._exit, (1,))]
        assert run_all(tasks, 2.0) == [NOT_REACHED, NOT_REACHED]
        monkeypatch.setattr(workers, "PATIENCE", 2.0)
        assert run_all(tasks, 600.0) == [NOT_REACHED, NOT_REACHED]


@pytest.fixture
def in_this_process(monkeypatch):
    """Work that is done beforehand is done here."""

    def run(tasks, seconds):
        results = []
        for function, arguments in tasks:
            try:
                results.append(function(*arguments))
            except Exception as error:
                results.append(error)
        return results

    monkeypatch.setattr(gpu, "run_all", run)


@pytest.fixture
def small(monkeypatch, in_this_process):
    """Small cases, texts and models in place of all, on the CPU."""
    monkeypatch.setattr(gpu, "BACKENDS", ["cpu"])
    flash = {"flash": SDPBackend.FLASH_ATTENTION}
    monkeypatch.setattr(gpu, "gpu_peers", lambda: peers(["cpu", "cuda"], flash, compiled=False))
    cases = {"lengths": [SMALL, CASES["packed"]], "shapes": [CASES["grouped"]]}
    monkeypatch.setattr(gpu, "GPU_SUITES", {suite: [] for suite in GPU_SUITES} | cases)
    monkeypatch.setattr(gpu, "TINY", [replace(SMALL, name="tiny")])
    monkeypatch.setattr(gpu, "TEXTS", [Texts("padded", 3, 24), Texts("packed", 3, 24, packed=True)])
    monkeypatch.setattr(gpu, "COMPILED_TEXTS", 0)
    monkeypatch.setattr(gpu, "MEMORY_LENGTHS", (64,))
    monkeypatch.setattr(gpu, "PROMPTS", (2, 8, 4))
    monkeypatch.setattr(gpu, "HOST_PROMPTS", (1, 8, 0))
    monkeypatch.setattr(long_context, "LENGTHS", (32, 64))
    monkeypatch.setattr(training_steps, "GPT2", SIZES)
    caches = {name: options for name, options in models.CACHES.items() if name != models.COMPILED}
    monkeypatch.setattr(models, "CACHES", caches)
    matrix = list(correctness.matrix())[8:9]
    monkeypatch.setattr(correctness, "matrix", lambda: iter(matrix))


def bench(suites, output=None, dtypes=("fp32",), **options):
    return gpu.bench(suites, dtypes, None, output, 0.0, device="cpu", **options)


@pytest.mark.usefixtures("small")
class TestRun:
    def test_attention(self, tmp_path):
        rows = bench(["shapes", "lengths"], tmp_path)
        assert rows[0].status == "1 of 1 cases right"
        attention = [row for row in rows if row.section == "attention"]
        order = [*dict.fromkeys(row.case for row in attention)]
        assert order == ["small, float32"], "the lengths first; cases of one name are one case"
        timed = {(row.case, row.direction, row.peer) for row in attention if row.status == "ok"}
        for direction in ("forward", "forward+backward", "forward+backward+cause"):
            assert ("small, float32", direction, "empcause cpu") in timed
        assert ("small, float32", "forward+backward", "sdpa flash, no weights") in timed
        assert all((row.timing is None) == (row.status != "ok") for row in rows)
        assert any("no packed sequences" in row.status for row in rows)
        assert any(row.status == "not installed: flash_attn" for row in rows)
        assert any("'cuda' cannot run this" in row.status for row in rows)
        marked = {row.peer for row in attention if not row.same_function}
        assert marked == {"sdpa flash, no weights", "sdpa, no weights", "flash_attn, no weights"}
        assert {(row.dtype, row.head_dim) for row in attention} == {("float32", 16)}
        assert (tmp_path / "gpu_attention.png").stat().st_size > 0

    def test_what_is_wrong_is_not_timed(self):
        liar = replace(this_package("cpu"), prepare=lambda *_: lambda q, k, v, c: q + 0 * (k + v + c.sum()))
        rows = list(time_case(SMALL, [liar], "cpu", Stopwatch("cpu"), 60.0))
        assert [row.timing for row in rows] == [None]
        assert "error" in rows[0].status

    def test_what_is_not_reached_is_said(self, capsys):
        rows = bench(["lengths"], minutes=1e-9)
        assert {row.section for row in rows} == {"correctness"}
        assert "not reached: attention, small, float32" in capsys.readouterr().out
        rows = time_case(SMALL, peers(["cpu"], {}, False), "cpu", Stopwatch("cpu"), 0.0)
        assert {row.status for row in rows} == {"not reached"}

    def test_a_stopped_run_loses_nothing_and_goes_on(self, tmp_path, monkeypatch):
        right, cases = gpu.time_case, [SMALL, replace(SMALL, name="second")]
        monkeypatch.setattr(gpu, "GPU_SUITES", {"lengths": cases})

        def stopped(case, *others, **options):
            if case.name == "second":
                raise KeyboardInterrupt
            return right(case, *others, **options)

        monkeypatch.setattr(gpu, "time_case", stopped)
        with pytest.raises(KeyboardInterrupt):
            bench(["lengths"], tmp_path)
        first, _ = read_csv(tmp_path / "gpu.csv")
        assert {row.case for row in first} == {"matrix", "small, float32"}
        measured = []
        monkeypatch.setattr(
            gpu, "time_case", lambda case, *_, **__: measured.append(case.name) or right(case, *_, **__)
        )
        rows = bench(["lengths"], tmp_path, resume=True)
        assert measured == ["second"]
        assert rows[: len(first)] == first
        assert {row.case for row in read_csv(tmp_path / "gpu.csv")[0]} == {row.case for row in rows}
        monkeypatch.setattr(gpu, "machine", lambda device: {"gpu": "another"})
        with pytest.raises(UserError, match="of another machine"):
            bench(["lengths"], tmp_path, resume=True)

    def test_a_device_that_broke_ends_the_run(self, tmp_path, monkeypatch):
        """With the rows up to there, and of the case that broke it."""
        monkeypatch.setattr(gpu, "GPU_SUITES", {"lengths": [SMALL, replace(SMALL, name="second")]})

        def broken(case, *_, **__):
            yield Row("attention", case.title, "all", "first peer", True, "output: wrong")
            raise RuntimeError("CUDA error: device-side assert triggered")

        def settle(device):
            raise RuntimeError("CUDA error: device-side assert triggered")

        monkeypatch.setattr(gpu, "time_case", broken)
        rows = bench(["lengths"], tmp_path)
        assert [row.status for row in rows if row.case == "second, float32"] == [
            "output: wrong",
            "does not run: CUDA error: device-side assert triggered",
        ]
        monkeypatch.setattr(gpu, "settle", settle)
        with pytest.raises(UserError, match=r"does not answer any more after attention, small, float32 .* --resume"):
            bench(["lengths"], tmp_path)
        assert {row.case for row in read_csv(tmp_path / "gpu.csv")[0]} == {"matrix", "small, float32"}

    @pytest.mark.filterwarnings("ignore::FutureWarning")
    def test_models(self):
        """Training steps, generation and the host's time, with this package's attention and with others."""
        rows = bench(["steps", "generation", "overhead"])
        timed = {(row.section, row.case.split(",")[0], row.direction, row.peer) for row in rows if row.status == "ok"}
        for texts in ("padded", "packed"):
            for peer in (
                "generator, empcause cpu",
                "stock, sdpa",
                "stock, eager",
                "generator without causes, sdpa",
            ):
                assert ("training step", texts, "step", peer) in timed
        for peer in ("empcause cpu", "empcause cpu, steered", "sdpa", "eager"):
            assert ("generation", "GPT-2", "generate", peer) in timed
            for direction in ("forward", "forward+backward"):
                assert ("host time", "GPT-2", direction, peer) in timed
        assert ("host time", "tiny", "forward+backward", "empcause cpu") in timed
        assert all(row.peak_mib is not None for row in rows if row.section == "training step")

    def test_memory_and_long_context(self, tmp_path):
        rows = bench(["memory", "long"], tmp_path)
        peaks = {(row.section, row.peer) for row in rows if row.peak_mib is not None}
        assert {(section, "empcause cpu") for section in ("memory", "long context")} <= peaks
        assert ("long context", "eager formula") in peaks
        lengths = {row.case for row in rows if row.section == "long context" and row.timing}
        assert lengths == {"long 1x1x32x64, float32", "long 1x1x64x64, float32"}
        assert (tmp_path / "gpu_long_context.png").stat().st_size > 0

    def test_models_are_measured_in_one_dtype(self):
        plan = gpu.Plan(gpu.gpu_peers(), "cpu", 0.0, Budget(), SIZES)
        jobs = list(plan.jobs(gpu.SUITES, ["fp32", "bf16", "fp16"]))
        assert next(job.case for job in jobs if job.section == "attention") == "small, bfloat16"
        assert {job.case.split(", ")[-1] for job in jobs if job.section == "attention"} == {
            "bfloat16",
            "float16",
            "float32",
        }
        assert all(job.case.endswith("bfloat16") for job in jobs if job.section in ("host time", "generation"))

    def test_what_is_compiled_beforehand_runs(self, monkeypatch):
        monkeypatch.setattr(gpu, "COMPILED_TEXTS", 1)
        plan = gpu.Plan(gpu.gpu_peers(), "cpu", 0.0, Budget(), SIZES)
        tasks = plan.tasks(gpu.SUITES, ["fp32"], Results({}))
        names = {(function.__name__, arguments[0].name) for function, arguments in tasks}
        assert ("compile_step", "generator, empcause cpu") in names
        assert ("compile_case", "small") in names
        assert ("compile_case", "tiny") in names
        done = Results({}, rows=[Row("host time", "tiny, float32", "all", "", True, "ok")])
        left = plan.tasks(["overhead", "lengths"], ["fp32"], done)
        assert {arguments[0].name for _, arguments in left} == {"small"}
        gpu.compile_case(SMALL, "empcause cpu", "cpu")
        variant = training_steps.variants(["cpu"], False)[0]
        gpu.compile_step(variant, gpu.TEXTS[0], SIZES, "cpu")

    def test_a_wrong_loss_is_red(self, monkeypatch):
        texts, variant = Texts("padded", 3, 24), training_steps.variants(["cpu"], False)[0]
        assert training_steps.judge(variant, texts, SIZES, "cpu") is None
        right = integration.biased_attention

        def wrong_on_the_cpu(query, *others, **options):
            factor = 1.5 if choose_backend(None, query.device, query.dtype, query.shape[-1]) == "cpu" else 1.0
            return right(query, *others, **options) * factor

        monkeypatch.setattr(integration, "biased_attention", wrong_on_the_cpu)
        assert "with the reference" in training_steps.judge(variant, texts, SIZES, "cpu")

    def test_a_model_with_other_logits_is_red(self, monkeypatch):
        right = integration.biased_attention
        attention = Attention("empcause cpu, steered", "empcause", "cpu", steered=True)
        assert models.judge(attention, SIZES, "cpu") is None

        def wrong_on_the_cpu(query, *others, **options):
            wrong = choose_backend(None, query.device, query.dtype, query.shape[-1]) == "cpu"
            output = right(query, *others, **options)
            return output.flip(-1) if wrong else output

        monkeypatch.setattr(integration, "biased_attention", wrong_on_the_cpu)
        assert "logits with a dynamic cache are off" in models.judge(attention, SIZES, "cpu")

    def test_batches_hold_the_same_texts(self):
        padded = training_steps.make_batch(Texts("padded", 3, 24), 100, "cpu")
        packed = training_steps.make_batch(Texts("packed", 3, 24, packed=True), 100, "cpu")
        real = padded["attention_mask"].bool()
        assert torch.equal(padded["input_ids"][real], packed["input_ids"][0])
        assert torch.equal(padded["labels"][real], packed["labels"][0])
        assert (padded["labels"][~real] == -100).all()


class TestReport:
    ROWS = (
        Row(
            "attention",
            "a",
            "forward",
            "empcause triton",
            True,
            "ok",
            Timing(2.0, 1.5, 2.5, 9),
            10.0,
            None,
            "9.0",
            "bfloat16",
            64,
        ),
        Row("attention", "a", "forward", "eager formula", True, "ok", Timing(6.0, 5.0, 7.0, 9), 3.3),
        Row("attention", "a", "forward", "sdpa flash, no weights", False, "ok", Timing(1.0, 0.9, 1.1, 9), 20.0),
        Row("attention", "a", "all", "flex score_mod", True, "does not run: here"),
        Row("training step", "t", "step", "stock, eager", False, "ok", Timing(60.0, 55.0, 70.0, 9), peak_mib=512.0),
    )
    FACTS = {"gpu": "none", "driver": "none", "torch": "1", "triton": "2", "cuda": "3"}  # noqa: RUF012

    def test_ratios(self):
        found = ratios(list(self.ROWS))
        assert found[("attention", "a", "forward"), "eager formula"] == {"empcause triton": 3.0}
        assert found[("training step", "t", "step"), "stock, eager"] == {}

    def test_csv(self, tmp_path):
        write_csv(list(self.ROWS), self.FACTS, tmp_path / "deep" / "gpu.csv")
        with (tmp_path / "deep" / "gpu.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == len(self.ROWS)
        assert rows[1]["time / empcause triton"] == "3"
        assert rows[3]["status"] == "does not run: here"
        assert rows[3]["median_ms"] == ""
        assert rows[2]["same_function"] == "False"
        assert (rows[0]["capability"], rows[0]["dtype"], rows[0]["head_dim"]) == ("9.0", "bfloat16", "64")
        assert all(row["torch"] == "1" and row["cuda"] == "3" for row in rows)

    def test_csv_is_read_as_it_was_written(self, tmp_path):
        write_csv(list(self.ROWS), self.FACTS, tmp_path / "gpu.csv")
        assert read_csv(tmp_path / "gpu.csv") == (list(self.ROWS), self.FACTS)
        (tmp_path / "other.csv").write_text("a,b\n1,2\n")
        with pytest.raises(UserError, match="not a table of `empcause bench`"):
            read_csv(tmp_path / "other.csv")
        text = (tmp_path / "gpu.csv").read_text()
        (tmp_path / "damaged.csv").write_text(text.replace("1.5", "1.5.5"))
        with pytest.raises(UserError, match="is damaged"):
            read_csv(tmp_path / "damaged.csv")

    def test_the_committed_figures_are_a_table_of_one_card(self, tmp_path):
        committed = Path(gpu.__file__).parent / "results" / "gpu.csv"
        rows, facts = read_csv(committed)
        assert facts["gpu"] == "NVIDIA H200"
        assert {row.section for row in rows} == {"attention", "training step"}
        assert all((row.timing is None) == (row.status != "ok") for row in rows)

    def test_plot(self, tmp_path):
        assert plot(list(self.ROWS), "attention", self.FACTS, tmp_path / "a.png")
        assert (tmp_path / "a.png").stat().st_size > 5000
        assert not plot([self.ROWS[3]], "attention", self.FACTS, tmp_path / "b.png")
        assert not (tmp_path / "b.png").exists()


class TestDefaultBackend:
    """What the figures say about the default on a GPU."""

    @staticmethod
    def row(case, direction, backend, milliseconds, **kind):
        kind = {"capability": "9.0", "dtype": "bfloat16", "head_dim": 64} | kind
        timing = Timing(milliseconds, milliseconds, milliseconds, 9)
        return Row("attention", case, direction, f"empcause {backend}", True, "ok", timing, **kind)

    def test_one_slower_case_or_direction_decides(self):
        equal = [self.row("a", "forward", "triton", 2.0), self.row("a", "forward", "cuda", 2.0)]
        assert cuda_is_not_slower(equal) == {((9, 0), torch.bfloat16, 64)}
        for case, direction in (("b", "forward"), ("a", "forward+backward")):
            pair = [self.row(case, direction, "triton", 2.0), self.row(case, direction, "cuda", 2.1)]
            assert cuda_is_not_slower([*equal, *pair]) == set()
            alone = [*equal, pair[1]]
            assert cuda_is_not_slower(alone) == {((9, 0), torch.bfloat16, 64)}, "no figure to compare it with"

    def test_kinds_are_kept_apart(self):
        rows = [
            self.row("a", "forward", backend, milliseconds, **kind)
            for kind, cuda in (
                ({"capability": "8.0"}, 1.0),
                ({"capability": "9.0"}, 3.0),
                ({"dtype": "float16"}, 1.0),
                ({"head_dim": 80}, 1.0),
            )
            for backend, milliseconds in (("triton", 2.0), ("cuda", cuda))
        ]
        found = {((8, 0), torch.bfloat16, 64), ((9, 0), torch.float16, 64), ((9, 0), torch.bfloat16, 96)}
        # The cases have one name here, as they differ in what is no part of it.
        assert cuda_is_not_slower(rows) == found

    def test_what_is_not_attention_or_has_no_capability_does_not_count(self):
        rows = [self.row("a", "forward", "triton", 2.0), self.row("a", "forward", "cuda", 1.0)]
        assert cuda_is_not_slower([replace(row, section="host time") for row in rows]) == set()
        assert cuda_is_not_slower([replace(row, capability="") for row in rows]) == set()
        assert cuda_is_not_slower([rows[0], replace(rows[1], timing=None, status="output: wrong")]) == set()

    def test_the_default_is_what_the_committed_figures_say(self):
        rows, _ = read_csv(Path(gpu.__file__).parent / "results" / "gpu.csv")
        assert cuda_is_not_slower(rows) == CUDA_IS_NOT_SLOWER


def test_choices_are_the_suites():
    assert {*CHOICES} == {*gpu.SUITES}
    assert {*GPU_DTYPES} == {*gpu.DTYPES}
    assert {*GPU_SUITES} <= {*gpu.SUITES}
    titles = [case.title for cases in (*GPU_SUITES.values(), TINY) for case in cases]
    assert len({*titles}) == len(titles), "rows are told apart by them"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_in_one_sentence(capsys):
    assert main(["bench", "--device", "cuda"]) == 2
    said = capsys.readouterr().err
    assert "There is no CUDA device that torch can use here, so nothing was checked or timed." in said
    assert said.count("\n") == 1
    assert main(["bench", "--suites", "generation"]) == 2
    assert "generation is measured on a GPU alone" in capsys.readouterr().err
    assert main(["bench", "--resume"]) == 2
    assert "--output" in capsys.readouterr().err
