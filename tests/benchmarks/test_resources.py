"""The resource table: its reader, its limits, and the kernels themselves against it (in a process without the interpreter)."""

import subprocess
import sys
from dataclasses import replace

import pytest

pytest.importorskip("triton", reason="triton is not installed, so its kernels cannot be compiled")

from empcause.benchmarks import resources

USAGE = """
Resource usage:
 Common:
  GLOBAL:11 CONSTANT[4]:8
 Function forward_kernel:
  REG:198 STACK:8 SHARED:1024 LOCAL:4 CONSTANT[0]:488 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function other:
  REG:12 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:488 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
CODE = """
\t\tFunction : forward_kernel
\t.headerflags\t@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;            /* 0x00000a00ff017b82 */
                                                                     /* 0x000fe20000000800 */
        /*0010*/              @!P0 HMMA.16816.F32 R4, R8, R2, R4 ;   /* 0x0000000000057919 */
        /*0020*/              @UP1 HMMA.16816.F32 R4, R8, R2, R4 ;   /* 0x0000000000057919 */
        /*0030*/                   LDGSTS.E.BYPASS.128 [R3], desc[UR4][R2.64] ;
        /*0040*/                   STL [R1], R4 ;
\t\tFunction : other
        /*0000*/                   EXIT ;
"""


@pytest.fixture
def figures():
    return resources.Figures(
        "triton", "forward", "bf16", 64, "causal", 80, 128, 0, 32768, 128, 2, 4, "HMMA 128", 36, "triton 1"
    )


def judged(row, *committed, everything=False):
    return resources.judge([row], {other.key: other for other in committed}, everything)


class TestReading:
    def test_resource_usage(self):
        assert resources.resource_usage(USAGE) == {"forward_kernel": (198, 12, 1024), "other": (12, 0, 0)}

    def test_instructions(self):
        found = resources.instructions(CODE)
        assert found["forward_kernel"] == {"LDC": 1, "HMMA": 2, "LDGSTS": 1, "STL": 1}
        assert found["other"] == {"EXIT": 1}

    @pytest.mark.parametrize(
        ("arch", "registers", "threads", "shared", "columns", "blocks"),
        [
            (80, 128, 128, 0, 0, 4),  # registers: 65536 / (128 * 128)
            (80, 129, 128, 0, 0, 3),  # handed out eight per thread at a time
            (80, 32, 1024, 0, 0, 2),  # warps: 64 of 32 threads
            (80, 32, 32, 0, 0, 32),  # blocks
            (80, 32, 128, 81 * 1024, 0, 2),  # shared memory, of which each block takes one KiB more
            (90, 32, 128, 81 * 1024, 0, 2),
            (90, 32, 128, 56 * 1024, 0, 4),
            (100, 32, 128, 0, 256, 2),  # tensor memory
            (120, 32, 1024, 0, 0, 1),  # 48 warps
            (120, 32, 32, 0, 0, 24),
            (120, 32, 128, 99 * 1024, 0, 1),
            (120, 32, 128, 99 * 1024 + 1, 0, 0),
        ],
    )
    def test_possible_blocks(self, arch, registers, threads, shared, columns, blocks):
        assert resources.possible_blocks(arch, registers, threads, shared, columns) == blocks


class TestJudging:
    def test_a_good_kernel(self, figures):
        assert judged(figures, figures) == ([], [])

    @pytest.mark.parametrize(
        ("change", "complaint"),
        [
            ({"local_bytes": 8}, "8 bytes of local memory"),
            ({"matrix_instructions": ""}, "no matrix instructions"),
            ({"possible_blocks": 1}, "allow 1 of 2 planned"),
        ],
    )
    def test_limits_hold_for_every_compiler(self, figures, change, complaint):
        changed = replace(figures, **change, compiler="triton 2")
        wrong, skipped = judged(changed, figures)
        assert len(wrong) == 1
        assert complaint in wrong[0]
        assert skipped == ["figures of triton 2 are not compared with the table, which is of triton 1"]

    def test_fp32_has_no_matrix_instructions(self, figures):
        assert not list(resources.broken_limits(replace(figures, dtype="fp32", matrix_instructions="")))

    @pytest.mark.parametrize(
        ("change", "complaint"),
        [
            ({"registers": 129}, "registers rose from 128 to 129"),
            ({"shared_bytes": 32769}, "shared_bytes rose"),
            ({"possible_blocks": 3}, "possible_blocks fell from 4 to 3"),
        ],
    )
    def test_worse_figures_fail(self, figures, change, complaint):
        wrong, _ = judged(replace(figures, **change), figures)
        assert len(wrong) == 1
        assert complaint in wrong[0]
        assert judged(figures, replace(figures, **change))[0] == [], "better figures do not"

    def test_the_table_must_be_complete_and_no_more(self, figures):
        other = replace(figures, head_dim=128)
        assert judged(figures)[0] == [f"{figures}: not in the table"]
        assert judged(figures, figures, other)[0] == []
        assert judged(figures, figures, other, everything=True)[0] == [f"{other}: in the table, but not shipped"]
        absent = replace(other, backend="cuda")  # where nvcc is missing
        assert judged(figures, figures, absent, everything=True)[0] == []

    def test_table_reads_as_written(self, figures, tmp_path):
        resources.write_table([figures], tmp_path / "table.csv")
        assert resources.read_table(tmp_path / "table.csv") == {figures.key: figures}

    def test_the_committed_summary_is_the_tables(self):
        rows = [*resources.read_table(resources.TABLE).values()]
        assert resources.TABLE.with_suffix(".md").read_text() == resources.summary(rows)

    def test_summary_takes_the_most_costly_options(self, figures):
        other = replace(figures, options="causal dropout", registers=168, possible_blocks=3)
        assert "| triton | forward | 168 / 32.0 / 3 |  |  |" in resources.summary([figures, other])

    def test_the_committed_table_keeps_the_limits(self):
        rows = resources.read_table(resources.TABLE).values()
        assert [complaint for row in rows for complaint in resources.broken_limits(row)] == []
        assert {row.backend for row in rows} == {"triton", "cuda"}
        assert {row.arch for row in rows} == {80, 90, 100, 120}
        for row in rows:
            assert row.kernel in (*resources.WITH_PRODUCTS, *resources.WITHOUT_PRODUCTS)


def check(backend, *options):
    if resources.why_not(backend):
        pytest.skip(resources.why_not(backend))
    done = subprocess.run(
        [sys.executable, "-m", "empcause.benchmarks.resources", "--check", "--backend", backend, *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert ", 0 complaints" in done.stdout
    print(done.stdout)


@pytest.mark.parametrize("backend", resources.TASKS)
def test_kernels_that_train_gpt2(backend):
    check(backend, "--fast")


@pytest.mark.slow
@pytest.mark.parametrize("backend", resources.TASKS)
def test_every_shipped_kernel(backend):
    check(backend, "--dtypes", "bf16", "fp32")


def test_a_missing_compiler_is_said(monkeypatch):
    monkeypatch.setattr(resources.shutil, "which", lambda name: None if name == "nvcc" else name)
    assert resources.why_not("cuda") == "there is no nvcc to compile the cuda kernels with"
    assert resources.why_not("triton") is None


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        ("empcause::cuda::ForwardKernel<empcause::cuda::BFloat16, 64, true>", ("forward", 64, "dropout")),
        ("empcause::cuda::DecodeKernel<float, 128>", ("decode", 128, "")),
        ("empcause::cuda::BackwardKeysKernel<empcause::cuda::Float16, 256, false>", ("backward_keys", 256, "")),
        ("empcause::cuda::MergeKernel<empcause::cuda::BFloat16>", ("merge", 0, "")),
        ("empcause::cuda::WeightsKernel", ("weights", 0, "")),
    ],
)
def test_names_of_cuda_kernels(kernel, expected):
    assert resources.kernel_of(kernel) == expected
