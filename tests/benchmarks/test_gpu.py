"""What of the GPU benchmark runs without a GPU: peers, gates, time budget, timings on the CPU, files, the sentence it says."""

import csv
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend

from empcause.benchmarks import correctness, gpu, training_steps
from empcause.benchmarks.comparison import time_case
from empcause.benchmarks.figures import Row, ratios, read_csv, write_csv
from empcause.benchmarks.gate import Gate
from empcause.benchmarks.gpu_report import plot
from empcause.benchmarks.peers import Peer, formula, make_inputs, peers, this_package
from empcause.benchmarks.shapes import Case
from empcause.benchmarks.timing import MAX_REPEATS, MIN_REPEATS, Budget, Stopwatch, Timing
from empcause.benchmarks.training_steps import Texts
from empcause.integration import attention as integration
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
            except (RuntimeError, ValueError, NotImplementedError) as error:
                expected = (
                    "FlexAttention|no packed sequences|FlashAttention and without dropout|flash_attention_forward"
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

    def test_wrong_cases_are_counted(self, monkeypatch, capsys):
        verdicts = iter(["output: wrong", None] + [None] * 100)
        monkeypatch.setattr(correctness, "judge", lambda *_: next(verdicts))
        budget = Budget()
        budget.begin("correctness", 60)
        assert gpu.check("cpu", "cpu", budget) == 1
        assert "cpu is wrong: output: wrong" in capsys.readouterr().out
        assert not budget.skipped


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

    def test_sections_end_when_they_should(self):
        clock = Clock()
        budget = Budget(clock)
        budget.begin("first", 10)
        clock.now += 4
        assert budget.left() == 6
        assert budget.allows("this", 6)
        assert not budget.allows("that", 6.5)
        budget.begin("second", 15)
        assert budget.left() == 11, "what the first section did not use is there for the second"
        assert budget.skipped == ["that"]

    def test_the_whole_run_is_below_eight_minutes(self):
        assert gpu.BUILT < gpu.CHECKED < gpu.TIMED < gpu.TRAINED < 480


@pytest.fixture
def few_rounds(monkeypatch):
    monkeypatch.setattr(gpu, "ROUNDS_SECONDS", 0.0)


@pytest.mark.usefixtures("few_rounds")
class TestRun:
    def test_attention(self):
        budget = Budget()
        budget.begin("attention", 60)
        cases = [SMALL, CASES["packed"], CASES["decoding"]]
        candidates = peers(["cpu", "reference"], {"flash": SDPBackend.FLASH_ATTENTION}, compiled=False)
        rows = list(gpu.time_attention(cases, candidates, "cpu", Stopwatch("cpu"), budget))
        timed = {(row.case, row.direction, row.peer) for row in rows if row.status == "ok"}
        for direction in ("forward", "forward+backward", "forward+backward+cause"):
            assert ("small, float32", direction, "empcause cpu") in timed
        assert ("small, float32", "forward+backward", "sdpa flash, no weights") in timed
        assert all((row.timing is None) == (row.status != "ok") for row in rows)
        assert any("no packed sequences" in row.status for row in rows)
        marked = {row.peer for row in rows if not row.same_function}
        assert marked == {"sdpa flash, no weights"}

    def test_what_is_wrong_is_not_timed(self):
        liar = replace(this_package("cpu"), prepare=lambda *_: lambda q, k, v, c: q + 0 * (k + v + c.sum()))
        rows = list(time_case(SMALL, [liar], "cpu", Stopwatch("cpu"), 60.0))
        assert [row.timing for row in rows] == [None]
        assert "error" in rows[0].status

    def test_what_is_not_reached_is_said(self):
        budget = Budget()
        budget.begin("attention", 0)
        assert not list(gpu.time_attention([SMALL], peers(["cpu"], {}, False), "cpu", Stopwatch("cpu"), budget))
        assert budget.skipped == ["attention small, torch.float32"]
        rows = time_case(SMALL, peers(["cpu"], {}, False), "cpu", Stopwatch("cpu"), 0.0)
        assert {row.status for row in rows} == {"not reached"}

    @pytest.mark.filterwarnings("ignore::FutureWarning")
    def test_training_steps(self):
        budget = Budget()
        budget.begin("training steps", 59)  # no time for what is compiled
        texts = [Texts("padded", 3, 24), Texts("packed", 3, 24, packed=True)]
        rows = list(gpu.time_steps(texts, ["cpu"], SIZES, "cpu", Stopwatch("cpu"), budget))
        timed = {(row.case, row.peer) for row in rows if row.status == "ok"}
        for peer in ("generator, empcause cpu", "stock, sdpa", "stock, eager", "generator without causes, sdpa"):
            assert {("padded", peer), ("packed", peer)} <= timed
        assert any(what.startswith("compiled step, padded, generator") for what in budget.skipped)

    def test_a_wrong_loss_is_red(self, monkeypatch):
        texts, variant = Texts("padded", 3, 24), training_steps.variants(["cpu"], False)[0]
        assert training_steps.judge(variant, texts, SIZES, "cpu") is None
        right = integration.biased_attention

        def wrong_on_the_cpu(query, *others, **options):
            factor = 1.5 if choose_backend(None, query.device, query.dtype, query.shape[-1]) == "cpu" else 1.0
            return right(query, *others, **options) * factor

        monkeypatch.setattr(integration, "biased_attention", wrong_on_the_cpu)
        assert "with the reference" in training_steps.judge(variant, texts, SIZES, "cpu")

    def test_batches_hold_the_same_texts(self):
        padded = training_steps.make_batch(Texts("padded", 3, 24), 100, "cpu")
        packed = training_steps.make_batch(Texts("packed", 3, 24, packed=True), 100, "cpu")
        real = padded["attention_mask"].bool()
        assert torch.equal(padded["input_ids"][real], packed["input_ids"][0])
        assert torch.equal(padded["labels"][real], packed["labels"][0])
        assert (padded["labels"][~real] == -100).all()


class TestReport:
    ROWS = (
        Row("attention", "a", "forward", "empcause triton", True, "ok", Timing(2.0, 1.5, 2.5, 9), 10.0),
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
        assert all(row["torch"] == "1" and row["cuda"] == "3" for row in rows)

    def test_csv_is_read_as_it_was_written(self, tmp_path):
        write_csv(list(self.ROWS), self.FACTS, tmp_path / "gpu.csv")
        assert read_csv(tmp_path / "gpu.csv") == (list(self.ROWS), self.FACTS)
        (tmp_path / "other.csv").write_text("a,b\n1,2\n")
        with pytest.raises(ValueError, match="not a table of these benchmarks"):
            read_csv(tmp_path / "other.csv")

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


def test_without_a_gpu_it_says_so_in_one_sentence(tmp_path):
    command = [sys.executable, "-m", "empcause.benchmarks.gpu", str(tmp_path)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "There is no CUDA device that torch can use here, so nothing was built, checked or timed.\n"
