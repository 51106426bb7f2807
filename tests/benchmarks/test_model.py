"""The performance model counts what it says, and the committed table is what it computes."""

import csv
from dataclasses import replace

import pytest
import torch

from empcause.benchmarks import model
from empcause.benchmarks.model import GPUS, PUBLISHED, Tile, estimate, executed_tiles
from empcause.benchmarks.shapes import CASES, Case
from empcause.kernels.configurations import configuration

SQUARE = Case("square", 2, 4, 4, 128, 128, 64)
A100, H100, B200 = GPUS


def visible_pairs(queries, keys):
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


@pytest.mark.parametrize(("queries", "keys"), [(128, 128), (100, 100), (1, 300), (70, 200), (200, 70)])
@pytest.mark.parametrize("cut", [Tile(64, 64, 16, 64), Tile(16, 32, 16, 64), Tile(128, 32, 32, 64)])
def test_tiles_are_those_with_a_visible_pair(queries, keys, cut):
    visible = visible_pairs(queries, keys)
    tiles = [part for rows in visible.split(cut.queries) for part in rows.split(cut.keys, 1)]
    assert executed_tiles(queries, keys, cut) == sum(bool(part.any()) for part in tiles)


@pytest.fixture
def tiles_of_64(monkeypatch):
    """All kernels in tiles of 64 by 64, by four warps of 16 rows."""
    monkeypatch.setattr(model, "tile", lambda backend, kernel, case, arch: Tile(64, 64, 16, 64))


@pytest.mark.usefixtures("tiles_of_64")
def test_forward_work_by_hand():
    """Two blocks of queries: one tile of keys for the first, two for the second; 8 heads in all."""
    work = model.forward(SQUARE, "cuda", 80)
    tiles, logits = 3 * 8, 3 * 8 * 64 * 64
    assert work.flops == 2 * 2 * 64 * logits
    assert work.exponentials == logits
    assert work.programs == 2 * 8
    # Key and value tiles of 8 KiB each are written once and read by four warps.
    assert work.shared == tiles * 2 * 8192 * 5
    # Four tensors of bf16, the log-sum-exp of every row, the weight of every key.
    assert work.hbm == 4 * 2 * 4 * 128 * 64 * 2 + 2 * 4 * 128 * 4 + 2 * 128 * 4


@pytest.mark.usefixtures("tiles_of_64")
def test_backward_work_by_hand():
    """Four products in `backward_keys`, three in `backward_queries`, each of which reads a tile of the other operand, after two
    were written."""
    forward, backward = (work(SQUARE, "cuda", 80) for work in (model.forward, model.backward))
    assert backward.flops == 7 / 2 * forward.flops
    assert backward.exponentials == 2 * forward.exponentials
    assert backward.shared == 3 * 8 * 8192 * ((2 + 4 * 4) + (2 + 3 * 4))


def test_slices_compute_the_logits_again(monkeypatch):
    monkeypatch.setattr(
        model, "tile", lambda backend, kernel, *_: Tile(64, 64, 16, 64, 2 if kernel == "backward_keys" else 1)
    )
    assert model.backward(SQUARE, "cuda", 80).flops == 9 / 2 * model.forward(SQUARE, "cuda", 80).flops


def test_tiles_are_those_of_the_kernels():
    """What tiling.h says for head size 64, and that a head size between two is padded to the larger."""
    text = (model.ROOT / "csrc" / "cuda" / "tiling.h").read_text()
    part = text[text.index("struct Tilings<false, 64>") :]
    warps, row_tiles, columns = (int(number) for number in part[part.index("Tiling<") + 7 :].split(",")[:3])
    cut = model.tile("cuda", "forward", SQUARE, 80)
    assert (cut.queries, cut.keys, cut.shared_rows) == (16 * warps * row_tiles, columns, 16 * row_tiles)
    assert model.tile("cuda", "forward", replace(SQUARE, dim=65), 80).width > 64
    chosen = configuration("backward_keys", 64, torch.bfloat16, 90)
    cut = model.tile("triton", "backward_keys", SQUARE, 90)
    assert (cut.queries, cut.keys) == (chosen.block_m, chosen.block_n)


def test_times_are_work_over_rates():
    case = next(case for case in CASES if case.name.startswith("long"))
    line, work = estimate(case, "cuda", "forward", A100), model.forward(case, "cuda", 80)
    assert line.tensor_us == pytest.approx(work.flops / 312e12 * 1e6)
    assert line.hbm_us == pytest.approx(work.hbm / 2.039e12 * 1e6)
    assert line.exp2_us == pytest.approx(work.exponentials / (16 * 108 * 1.41e9) * 1e6)
    assert line.shared_us == pytest.approx(work.shared / (128 * 108 * 1.41e9) * 1e6)
    times = {name: getattr(line, f"{name}_us") for name in ("tensor", "exp2", "fp32", "shared", "hbm")}
    assert line.bound == max(times, key=times.get)
    assert line.overlapped_us == max(times.values()) <= line.serial_us
    assert line.tflops == pytest.approx(case.flops("forward") / line.overlapped_us / 1e6)


def test_few_programs_leave_multiprocessors_idle():
    small = replace(SQUARE, batch=1, heads=2, key_heads=2)
    one = estimate(small, "cuda", "forward", H100)
    four = estimate(replace(small, batch=4), "cuda", "forward", H100)
    assert 4 * one.programs == four.programs < H100.sms
    assert one.tensor_us == pytest.approx(four.tensor_us), "four times the work on four times the multiprocessors"


def test_bounds_lie_where_expected():
    """Decoding waits for memory; fp32 for its multiply-adds; mma of single warps for shared memory where it is fast."""
    decode = next(case for case in CASES if case.decoding)
    full = next(case for case in CASES if case.dtype == torch.float32)
    long = next(case for case in CASES if case.name.startswith("long"))
    for gpu in GPUS:
        assert estimate(decode, "triton", "forward", gpu).bound == "hbm"
        assert estimate(full, "triton", "forward", gpu).bound == "fp32"
    assert estimate(long, "cuda", "forward", B200).bound == "shared"


def test_packing_saves_work():
    padded = next(case for case in CASES if case.padded)
    packed = next(case for case in CASES if case.packed)
    assert padded.flops("forward") == packed.flops("forward")
    assert model.forward(packed, "cuda", 80).flops < 0.7 * model.forward(padded, "cuda", 80).flops


def test_rates_agree_with_each_other():
    """The tensor rate is products per clock and multiprocessor, a power of two, times multiprocessors and clock."""
    for gpu in GPUS:
        per_clock = gpu.tensor * 1e12 / (gpu.sms * gpu.clock * 1e9)
        assert per_clock == pytest.approx({80: 2048, 90: 4096, 100: 8192}[gpu.arch], rel=0.01)


def test_published_figures_are_below_the_peak():
    for entry in PUBLISHED:
        peak = next(gpu.tensor for gpu in GPUS if gpu.name == entry.gpu)
        assert len(entry.tflops) == len(model.LENGTHS)
        assert all(value is None or value < peak for value in entry.tflops)


def test_the_committed_table_is_the_models(tmp_path):
    model.write_csv(tmp_path / "model.csv")
    committed = (model.RESULTS / "gpu_model.csv").read_text()
    assert (tmp_path / "model.csv").read_text() == committed, "run python benchmarks/model.py and commit what it writes"
    assert len(list(csv.DictReader(committed.splitlines()))) > 100


def test_plot(tmp_path):
    model.plot(tmp_path / "model.png")
    assert (tmp_path / "model.png").stat().st_size > 20000
