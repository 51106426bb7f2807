"""`empcause bench`: the cases, the limits, the table, the comparison of two runs. No time is judged."""

import csv
from dataclasses import replace

import pytest
import torch

from empcause.benchmarks import cpu, long_context, test_attention
from empcause.benchmarks.comparison import Limit, time_case
from empcause.benchmarks.cpu import SUITES, Limits, best_peers
from empcause.benchmarks.figures import Results, Row, compare, read_csv, write_csv
from empcause.benchmarks.peers import cpu_peers, make_inputs
from empcause.benchmarks.shapes import Case
from empcause.benchmarks.timing import Stopwatch, Timing
from empcause.cli import main
from empcause.cli.bench import CPU_DTYPES
from empcause.cli.bench import CPU_SUITES as CHOICES
from empcause.errors import UserError

SMALL = Case("GPT-2 2x2x16x8", 2, 2, 2, 16, 16, 8)


def row(case, direction, peer, milliseconds, same=True):
    return Row("attention", case, direction, peer, same, "ok", Timing(milliseconds, milliseconds, milliseconds, 5), 1.0)


@pytest.fixture
def small(monkeypatch):
    """One small case in place of all, and quick limits."""
    monkeypatch.setattr(cpu, "SUITES", {"lengths": [SMALL]})
    monkeypatch.setattr(cpu, "Limits", lambda: Limits(rounds=1000, bytes_read=2**16, repeats=2))


def test_choices_are_the_suites():
    assert {*CHOICES} == {*SUITES, "memory", "long"}
    assert {*CPU_DTYPES} == {*cpu.DTYPES}


def test_limits_are_positive_and_finite():
    limits = Limits(rounds=1000, bytes_read=2**16, repeats=2)
    assert all(0 < gflops < 1e5 for gflops in limits.gflops.values())
    assert 0 < limits.gigabytes < 1e5


def test_decoding_is_timed_beside_reading_as_much():
    limits = Limits(rounds=1000, bytes_read=2**22, repeats=2)
    case = Case("decode", 1, 2, 2, 1, 512, 64)
    limit = limits.of(case)
    assert limit.name == "limit: reading"
    assert limit.work == case.bytes("forward")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_case_is_timed_beside_no_more_arithmetic_than_it_takes(dtype):
    limits = Limits(rounds=1000, bytes_read=2**16, repeats=2)
    for case in SUITES["lengths"]:
        limit = limits.of(replace(case, dtype=dtype))
        assert limit.name == "limit: multiply-adds"
        assert 0.9 * case.flops("forward") < limit.work <= case.flops("forward")


def test_what_limits_count():
    from empcause import _C

    assert _C.multiply_adds(10, 3) == 3 * _C.multiply_adds(10, 1) > 0
    # Pairs are multiplied twice as many at once, where there are any.
    two_at_once = _C.build_info()["isa_selected"] == "avx512_bf16"
    assert _C.multiply_adds(10, 1, bfloat16=True) == (2 if two_at_once else 1) * _C.multiply_adds(10, 1)
    values = torch.arange(1001, dtype=torch.float32)
    assert _C.read_all(values.data_ptr(), values.numel(), 3) == 1000 * 1001 / 2


def test_decoding_reads_more_than_a_cache_holds_and_finds_it_contiguous():
    case = SUITES["decoding"][0]
    assert replace(case, dtype=torch.bfloat16).bytes("forward") > 64 * 2**20
    assert make_inputs(replace(SMALL, queries=1, dtype=torch.float32), "cpu").key.is_contiguous()


def test_bench_writes_table_and_plots(small, tmp_path, capsys):
    assert main(["bench", "--output", str(tmp_path), "--seconds", "0", "--dtypes", "fp32"]) == 0
    with (tmp_path / "cpu.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    ours = [line for line in lines if line["peer"] == "empcause cpu"]
    assert {line["direction"] for line in ours} == {"forward", "forward+backward", "forward+backward+cause"}
    assert all(line["status"] == "ok" and line["isa"] and line["torch"] for line in lines)
    names = {peer.name for peer in cpu_peers()} - {"flex score_mod"}
    assert {line["peer"] for line in lines} == names | {"limit: multiply-adds"}
    assert (tmp_path / "cpu_ratios.png").stat().st_size > 0
    assert (tmp_path / "cpu_roofline.png").stat().st_size > 0
    assert "geometric mean" in capsys.readouterr().out
    assert main(["bench", "--compare", str(tmp_path / "cpu.csv"), str(tmp_path / "cpu.csv")]) == 0


def test_a_wrong_kernel_is_not_timed(small, monkeypatch, capsys):
    right = cpu.cpu_peers()

    def prepare(inputs, dropout_p):
        call = right[0].prepare(inputs, dropout_p)
        return lambda *leaves: call(*leaves) * 1.01

    monkeypatch.setattr(cpu, "cpu_peers", lambda: [replace(right[0], prepare=prepare), *right[1:]])
    rows = cpu.bench(["lengths"], ["fp32"], [], seconds=0.0)
    assert [row.timing for row in rows if row.peer == "empcause cpu"] == [None]
    assert "output: largest error" in " ".join(capsys.readouterr().out.split())


def test_pytest_benchmark_has_the_same_cases_and_peers(monkeypatch):
    timed = []
    monkeypatch.setattr(cpu, "time_case", lambda case, peers, *_, **__: timed.append((case, peers)) or [])
    limits = Limits(rounds=1000, bytes_read=2**16, repeats=1)
    cpu.run(list(SUITES), list(cpu.DTYPES), None, 0.0, limits, Results({}))
    given = {mark.args[0]: list(mark.args[1]) for mark in test_attention.test_attention.pytestmark}
    cases = [test_attention.CASES[name] for name in given["case"]]
    assert len(cases) == len(timed)
    assert set(cases) == {case for case, _ in timed}
    assert all(given["peer"] == [peer.name for peer in peers] for _, peers in timed)
    (ours,) = [item for item in test_attention.prepare(SMALL, cpu_peers()[:1], "cpu") if item.direction == "forward"]
    assert ours.direction in given["direction"]


def test_a_limit_is_timed_for_the_work_of_the_case():
    limit = Limit("limit", lambda: None, 1.0, lambda case, direction: 1e12)
    rows = list(time_case(SMALL, cpu_peers()[:1], "cpu", Stopwatch("cpu"), rounds_seconds=0.0, limit=limit))
    limits = [row for row in rows if row.peer == "limit"]
    assert len(limits) == 3
    for row in limits:
        assert row.timing.median > 1e3, "nothing done takes well over 10^-12 s"
        assert not row.same_function


def test_the_best_peer_computes_the_same_function():
    rows = [
        row("a", "forward", "empcause cpu", 2.0),
        row("a", "forward", "eager formula", 8.0),
        row("a", "forward", "folded, sdpa", 5.0),
        row("a", "forward", "sdpa, no weights", 1.0, same=False),
    ]
    assert best_peers(rows) == {("attention", "a", "forward"): ("folded, sdpa", 2.5)}


def test_compare_finds_what_fell_behind(tmp_path):
    def write(name, ours, eager, folded):
        rows = [row("a", "forward", *pair) for pair in (("empcause cpu", ours), ("eager", eager), ("folded", folded))]
        write_csv(rows, {}, tmp_path / name)
        return tmp_path / name

    first, slower_machine = write("first.csv", 1.0, 8.0, 4.0), write("machine.csv", 3.0, 24.0, 12.0)
    slower, other_peer = write("slower.csv", 1.5, 8.0, 4.0), write("peer.csv", 1.0, 4.0, 4.0)
    assert compare(first, slower_machine, 0.1) == []
    assert compare(first, other_peer, 0.1) == [], "a faster peer is not our regression"
    assert len(compare(first, slower, 0.1)) == 1
    assert main(["bench", "--compare", str(first), str(slower)]) == 1
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="not a table of `empcause bench`"):
        compare(first, tmp_path / "other.csv", 0.1)
    with pytest.raises(UserError, match="cannot be read"):
        compare(first, tmp_path / "missing.csv", 0.1)


def test_memory_of_a_pass_is_that_of_a_fresh_process():
    rows = list(cpu.run_memory(lengths=(512,)))
    ours, eager = (row.peak_mib for row in rows)
    assert 0 < ours < eager


def test_a_stopped_run_is_continued(small, tmp_path, capsys):
    """What it has is not measured again, and is in the plots."""
    arguments = ["bench", "--output", str(tmp_path), "--seconds", "0", "--dtypes"]
    assert main([*arguments, "fp32"]) == 0
    before, _ = read_csv(tmp_path / "cpu.csv")
    assert main([*arguments, "fp32", "bf16"]) == 2
    assert "--resume" in capsys.readouterr().err
    (tmp_path / "cpu_ratios.png").unlink()
    assert main([*arguments, "fp32", "bf16", "--resume"]) == 0
    after, _ = read_csv(tmp_path / "cpu.csv")
    assert after[: len(before)] == before
    assert {row.dtype for row in after[len(before) :]} == {"bfloat16"}
    assert len(after) > len(before)
    assert (tmp_path / "cpu_ratios.png").stat().st_size > 0


class TestLongContext:
    def test_each_peer_is_measured_in_a_process_of_its_own(self):
        (ours, eager) = long_context.run_on_cpu(cpu_peers()[:2], 0.0, lengths=(512,))
        assert [row.direction for row in ours] == ["forward", "forward+backward"]
        assert all(row.timing.median > 0 and row.status == "ok" for row in (*ours, *eager))
        assert 0 < ours[1].peak_mib < eager[1].peak_mib

    def test_memory_that_is_not_there_is_a_status(self, monkeypatch):
        """Of that length and the longer ones; the others go on."""
        monkeypatch.setattr(long_context, "_available", lambda: 2**26)
        (first,), (second,) = long_context.run_on_cpu(cpu_peers()[1:2], 0.0, lengths=(4096, 8192))
        assert (first.direction, first.timing) == ("all", None)
        assert first.status.startswith("does not run: ")
        assert second.status == "left out: half the length did not run"

    def test_what_would_take_too_long_is_left_out(self, monkeypatch):
        def measured(process, peer, case, seconds, wanted):
            spent = {"forward": 1.0, "forward+backward": 30.0}
            timings = {name: Timing(*[1e3 * spent[name] * case.keys / 1024] * 3, 1) for name in wanted}
            return [Row("long context", case.title, name, peer.name, True, "ok", timings[name]) for name in wanted]

        monkeypatch.setattr(long_context, "_in_process", measured)
        found = list(long_context.run_on_cpu(cpu_peers()[:1], 0.0, lengths=(1024, 2048), patience=100.0))
        assert [[row.status for row in rows] for rows in found] == [
            ["ok", "ok"],
            ["ok", "left out: a call would take about 120 s"],
        ]
        assert list(long_context.run_on_cpu(cpu_peers()[:1], 0.0, lengths=(1024,), done=lambda case, peer: True)) == []


@pytest.mark.parametrize(
    ("arguments", "message"), [(["--peers", "nobody"], "no peer 'nobody'"), (["--threads", "0"], "--threads")]
)
def test_mistakes_are_named(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err
