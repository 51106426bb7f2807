"""The Triton kernels against fp64, over shapes, masks, strides and precisions.

Where there is a CUDA device the kernels run on it; elsewhere in Triton's interpreter, which cannot multiply bf16.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import empcause
from empcause.ops import biased_attention, biased_attention_varlen
from empcause.testing import Case
from ops.contract import Contract, packed_case

TRITON = empcause.info()["triton"]
if not TRITON.runs:
    pytest.skip(f"no Triton kernels: {TRITON.reason}", allow_module_level=True)

import triton  # noqa: E402

from empcause.kernels import operators  # noqa: E402
from empcause.kernels.configurations import configuration  # noqa: E402

INTERPRETED = triton.knobs.runtime.interpret
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]
# The interpreter computes with numpy, which warns of what is meant: log2(0), infinity minus infinity.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture
def launched(monkeypatch):
    """The kernels launched so far, with their arguments by name."""
    launches = []
    run = operators.Call.run

    def recorded(self, kernel, programs, arguments, options):
        launches.append((kernel.__name__, dict(zip(kernel.arg_names, arguments, strict=True))))
        run(self, kernel, programs, arguments, options)

    monkeypatch.setattr(operators.Call, "run", recorded)
    return launches


MATRIX = {
    "batch": st.integers(1, 2),
    "grouping": st.sampled_from([(1, 1), (2, 2), (2, 1), (3, 1), (4, 2)]),  # query heads, key heads
    "queries": st.sampled_from([1, 2, 17, 31, 64, 65]),
    "keys": st.sampled_from([1, 7, 8, 31, 64, 65, 97]),
    "dim": st.sampled_from([1, 8, 15, 16, 33, 64, 80]),
    "dtype": st.sampled_from(DTYPES),
    "causal": st.booleans(),
    "dropout_p": st.sampled_from([0.0, 0.0, 0.1, 0.5]),
    "cause_shape": st.sampled_from(["BK", "1K", "BHK", "B1K", "1HK", "11K", None]),
    "masked": st.booleans(),
    "per_head": st.booleans(),
    "query_offset": st.sampled_from([None, 0, 3, -2]),
    "layout": st.sampled_from(["BHND", "BNHD", "BHDN"]),
    "seed": st.integers(0, 5),
}


class TestTriton(Contract):
    backend, device, dtypes = "triton", DEVICE, DTYPES
    assertion = triton.errors.TritonError

    @pytest.fixture(autouse=True)
    def _assertions(self, monkeypatch):
        """Those of integer overflow hold too."""
        if INTERPRETED:
            from triton.runtime import interpreter

            monkeypatch.setattr(interpreter.interpreter_builder, "options", interpreter.InterpreterOptions(debug=True))

    def leave_memory_alone(self, monkeypatch):
        super().leave_memory_alone(monkeypatch)
        if INTERPRETED:
            from triton.runtime.interpreter import GridExecutor

            # It would copy every storage onto itself.
            monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *_: None)

    def check(self, grouping, **arguments):
        heads, key_heads = grouping
        self.assert_close(Case(heads=heads, key_heads=key_heads, **arguments))

    def tiles(self, kernel, dim, dtype=torch.float32, dropout=False):
        architecture = operators.architecture(torch.device(DEVICE))
        return configuration(kernel, dim, dtype, architecture, dropout)

    @settings(max_examples=12, deadline=None, derandomize=True)
    @given(**MATRIX)
    def test_case_matrix(self, **arguments):
        self.check(**arguments)

    @pytest.mark.slow
    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(**MATRIX | {"seed": st.integers(6, 50)})
    def test_larger_case_matrix(self, **arguments):
        self.check(**arguments)

    @pytest.mark.parametrize("causal", [True, False])
    @pytest.mark.parametrize("dropout_p", [0.0, 0.2])
    def test_whole_tiles_and_bounded_ones(self, dtype, dropout_p, causal):
        """Several tiles of every kernel, so that both its loops run."""
        every = [
            self.tiles(kernel, 64, dtype, dropout_p > 0) for kernel in ("forward", "backward_keys", "backward_queries")
        ]
        length = 2 * max(max(t.block_m, t.block_n) for t in every) + 3
        shape = {"batch": 1, "heads": 1, "key_heads": 1, "queries": length, "keys": length, "dim": 64}
        self.assert_close(Case(**shape, dtype=dtype, dropout_p=dropout_p, causal=causal, masked=True))

    @pytest.mark.parametrize(
        "case",
        [
            Case(batch=1, queries=1, keys=300, dim=64),
            Case(batch=1, dim=256, queries=20, keys=20, heads=2, key_heads=1),
            Case(heads=6, key_heads=2, dim=32, batch=1, queries=40, keys=50, dtype=torch.float16),
            Case(queries=40, keys=10, batch=1),
            Case(queries=10, keys=40, batch=1, heads=2, query_offset=7),
            Case(queries=20, keys=20, batch=1, heads=2, query_offset=-(2**40)),
            Case(queries=20, keys=20, batch=1, heads=2, query_offset=2**40),
        ],
        ids=["decoding", "widest head", "grouped fp16", "dead rows", "offset", "before everything", "after everything"],
    )
    def test_notable_cases(self, case):
        self.assert_close(case)

    @pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter cannot multiply bf16")
    @pytest.mark.parametrize("dim", [64, 128, 256])
    @pytest.mark.parametrize("dropout_p", [0.0, 0.1])
    def test_bf16(self, dim, dropout_p):
        case = Case(heads=8, key_heads=4, queries=500, keys=500, dim=dim, dtype=torch.bfloat16, dropout_p=dropout_p)
        self.assert_close(case)

    def test_views_of_a_fused_projection_are_read_in_place(self, launched):
        fused = torch.randn(1, 37, (2 + 1 + 1) * 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
        query, key, value = (part.unflatten(-1, (-1, 16)).transpose(1, 2) for part in fused.split([32, 16, 16], -1))
        output = biased_attention(query, key, value, backend=self.backend)
        expected = biased_attention(query, key, value, backend="reference")
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
        (arguments,) = [arguments for name, arguments in launched if name == "forward_kernel"]
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            assert arguments[name].data_ptr() == tensor.data_ptr(), name

    def test_launches_give_every_argument_once_and_no_other(self):
        arguments = self.raw_arguments("attention")
        del arguments["for_backward"]
        call, tensor = operators.Call(**arguments), torch.empty(1, device=DEVICE)
        names = ("part_output", "part_maximum", "part_total", "output", "statistics")
        own = dict.fromkeys(names, tensor) | {"parts": 1, "BLOCK_P": 16, "MAX_PARTS": 16}
        call.launch(operators.merge_kernel, 0, {}, **own)
        for wrong, named in (
            ({"scale_log2": 1.0}, "scale_log2"),
            ({"rows": 3, "key": tensor}, "key, rows"),
        ):
            with pytest.raises(RuntimeError, match=f"merge_kernel is launched with the wrong arguments: {named}$"):
                call.launch(operators.merge_kernel, 0, {}, **own, **wrong)
        del own["output"], own["parts"]
        with pytest.raises(RuntimeError, match=r"merge_kernel is launched with the wrong arguments: output, parts$"):
            call.launch(operators.merge_kernel, 0, {}, **own)

    def test_prefix_sums_beyond_the_tensors_lead_nowhere(self):
        """They cannot be refused without waiting for the GPU; the sequences that fit are right all the same."""
        tensors, options = packed_case([6, 25], [6, 25])
        wrong = options | {
            name: torch.tensor([0, 6, 4000], dtype=torch.int32) for name in ("cu_seqlens_q", "cu_seqlens_k")
        }
        expected = self.attend(*tensors, operator=biased_attention_varlen, **options)
        assert torch.equal(self.attend(*tensors, operator=biased_attention_varlen, **wrong), expected)
        wrong = options | {
            name: torch.tensor([0, 6, -4000], dtype=torch.int32) for name in ("cu_seqlens_q", "cu_seqlens_k")
        }
        assert torch.equal(self.attend(*tensors, operator=biased_attention_varlen, **wrong)[:6], expected[:6])

    @pytest.mark.parametrize(
        ("case", "heads_together"),
        [
            (Case(batch=1, heads=4, key_heads=2, queries=3, keys=700, dim=20), 2),
            (Case(batch=1, heads=4, key_heads=2, queries=3, keys=700, dim=20, per_head=True), 1),
            (
                Case(
                    batch=1, heads=2, key_heads=1, queries=2, keys=600, causal=False, masked=True, dtype=torch.float16
                ),
                2,
            ),
            (Case(batch=1, heads=2, key_heads=1, queries=2, keys=700, query_offset=100), 2),  # later parts see no key
        ],
        ids=["grouped", "weights per head", "fp16", "cache longer than it is full"],
    )
    def test_decoding_in_several_parts(self, case, heads_together, launched):
        self.measured(case)
        (decode,) = [arguments for name, arguments in launched if name == "decode_kernel"]
        assert decode["parts"] > 1
        assert decode["packed_heads"] == heads_together
        assert "forward_kernel" not in [name for name, _ in launched]
        self.assert_close(case)
