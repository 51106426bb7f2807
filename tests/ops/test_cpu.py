"""The CPU kernels against fp64, over shapes, masks, strides and precisions."""

import os
import subprocess
import sys
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import empcause
from empcause.ops import biased_attention
from empcause.testing import Case
from ops.accuracy import against_torch
from ops.contract import Contract

CPU = empcause.info()["cpu"]
if not CPU.runs and os.environ.get("EMPCAUSE_REQUIRE_CPU") != "1":
    pytest.skip(f"no CPU kernels: {CPU.reason}", allow_module_level=True)


class TestCpu(Contract):
    backend = device = "cpu"
    dtypes: ClassVar = [torch.float32, torch.float16, torch.bfloat16]
    assertion_message = r"cause .* key 7 .*\(batch 0\); expected finite values with 1 \+ strength \* cause >= 0"
    # In 16 bits, too, the CPU's backward pass has the logsumexp in two fp32 numbers.
    largest: ClassVar = Contract.largest | {torch.float16: 49152.0}

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(
        batch=st.integers(1, 3),
        group=st.sampled_from([1, 2, 3]),
        key_heads=st.sampled_from([1, 2]),
        queries=st.sampled_from([1, 2, 23, 24, 25, 31, 64, 97]),
        keys=st.sampled_from([1, 7, 8, 31, 127, 128, 129, 150]),
        dim=st.sampled_from([1, 8, 15, 16, 33, 64, 80]),
        dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]),
        causal=st.booleans(),
        dropout_p=st.sampled_from([0.0, 0.0, 0.1, 0.5]),
        cause_shape=st.sampled_from(["BK", "1K", "BHK", "B1K", "1HK", None]),
        masked=st.booleans(),
        per_head=st.booleans(),
        offset=st.sampled_from([None, 0, 3, -2]),
        layout=st.sampled_from(["BHND", "BNHD", "BHDN"]),
        seed=st.integers(0, 5),
    )
    def test_case_matrix(
        self,
        batch,
        group,
        key_heads,
        queries,
        keys,
        dim,
        dtype,
        causal,
        dropout_p,
        cause_shape,
        masked,
        per_head,
        offset,
        layout,
        seed,
    ):
        case = Case(
            batch=batch,
            heads=group * key_heads,
            key_heads=key_heads,
            queries=queries,
            keys=keys,
            dim=dim,
            dtype=dtype,
            causal=causal,
            dropout_p=dropout_p,
            cause_shape=cause_shape,
            masked=masked,
            per_head=per_head,
            query_offset=offset,
            layout=layout,
            seed=seed,
        )
        self.assert_close(case)

    @pytest.mark.parametrize(
        "case",
        [
            Case(layout="qkv", queries=20, keys=37),
            Case(queries=1, keys=300, dim=64),
            Case(queries=260, keys=260, dim=64, batch=1, masked=True),
            Case(dim=256, queries=9, keys=9),
            Case(heads=9, key_heads=3, dim=64, queries=50, keys=50, dtype=torch.bfloat16),
            Case(queries=40, keys=10),  # the first rows see no key
        ],
        ids=["fused qkv", "decoding", "long", "widest head", "grouped bf16", "dead rows"],
    )
    def test_notable_cases(self, case):
        self.assert_close(case)

    @pytest.mark.parametrize("dropout_p", [0.0, 0.2])
    def test_bitwise_deterministic_over_threads(self, dropout_p):
        case = Case(batch=3, heads=6, key_heads=3, queries=200, keys=200, dim=24, dropout_p=dropout_p, masked=True)
        threads = torch.get_num_threads()
        results = []
        try:
            for number in (1, 2, 5):
                torch.set_num_threads(number)
                results.append(self.measured(case))
        finally:
            torch.set_num_threads(threads)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))

    @pytest.mark.slow
    @pytest.mark.parametrize("scale", [1, 4, 8, 16])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_errors_beside_those_of_torch(self, dtype, scale):
        """The errors are close to torch's own; queries times 16 make rows that are nearly one-hot."""
        against_torch(dtype, scale, range(100))

    def test_memory_is_linear(self):
        """The process grows by far less than the 512 MiB that 4096 x 4096 logits of 8 heads would take in fp32."""
        import resource

        tensors = [torch.randn(1, 8, 4096, 16, requires_grad=True) for _ in range(3)]
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        biased_attention(*tensors, torch.rand(1, 4096), backend="cpu").sum().backward()
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        assert grown < 128 * 2**20


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512_bf16"])
def test_every_instruction_set(isa):
    """The kernels of each instruction set run a few cases in a process of their own, if the processor has it."""
    code = f"""
import os; os.environ["EMPCAUSE_CPU_ISA"] = {isa!r}
import empcause, torch
cpu = empcause.info()["cpu"]
if not cpu.runs:
    print("SKIP", cpu.reason); raise SystemExit
assert {isa!r} in cpu.reason
from empcause.testing import Case, assert_close
for case in [Case(), Case(queries=70, keys=140, dim=33, masked=True, dropout_p=0.2), Case(dtype=torch.bfloat16, dim=64),
             Case(dtype=torch.float16), Case(causal=False, cause_shape="BHK", dim=5)]:
    assert_close(case, "cpu")
print("FINE")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if done.stdout.startswith("SKIP"):
        pytest.skip(done.stdout)
    assert "FINE" in done.stdout


def test_unknown_instruction_set_is_refused():
    code = "import empcause; print(empcause.info())"
    environment = os.environ | {"EMPCAUSE_CPU_ISA": "mmx"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert "this processor runs" in done.stdout + done.stderr
