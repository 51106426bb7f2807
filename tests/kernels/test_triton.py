"""The Triton kernels against fp64, over shapes, masks, strides and precisions.

Where there is a CUDA device the kernels run on it; elsewhere in Triton's interpreter, which cannot multiply bf16.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import empcause
from empcause.ops import biased_attention, biased_attention_varlen
from empcause.testing import Case, gradients
from ops.contract import Contract, packed_case

TRITON = empcause.info()["triton"]
if not TRITON.runs:
    pytest.skip(f"no Triton kernels: {TRITON.reason}", allow_module_level=True)

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from empcause.kernels import operators  # noqa: E402
from empcause.kernels.attention import present_end  # noqa: E402
from empcause.kernels.configurations import configuration  # noqa: E402
from empcause.ops.registration import FLAGGED_KEYS, num_flags  # noqa: E402

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


@triton.jit
def find_present_end(flags, first_key, end, found):
    tl.store(found, present_end(flags, first_key, end))


class OnlyAllocatesAndViews(TorchDispatchMode):
    """Refuses every operator of torch that could launch a kernel on a GPU."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.name()
        assert name in {"aten::new_empty", "aten::empty.memory_format", "aten::transpose.int", "aten::detach"}, name
        return operator(*args, **kwargs or {})


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
        """Several tiles of every kernel, so that both its loops run: one of the last keys is absent."""
        every = [
            self.tiles(kernel, 64, dtype, dropout_p > 0) for kernel in ("forward", "backward_keys", "backward_queries")
        ]
        length = 2 * max(max(t.block_m, t.block_n) for t in every) + 3
        assert length > FLAGGED_KEYS + 2
        shape = {"batch": 1, "heads": 1, "key_heads": 1, "queries": length, "keys": length, "dim": 64}
        key_mask = (torch.arange(length) != length - 2)[None]
        case = Case(**shape, dtype=dtype, dropout_p=dropout_p, causal=causal, extra={"key_mask": key_mask})
        self.assert_close(case)

    @pytest.mark.parametrize(
        "case",
        [
            Case(batch=1, queries=1, keys=70, dim=64),
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

    @pytest.mark.parametrize("absent", [[], [0], [130], [127, 300]])
    @pytest.mark.parametrize("by", ["mask", "weight"])
    def test_weights_are_followed_by_a_flag_per_group_of_keys(self, by, absent):
        keys, heads = 301, 2
        query, key = torch.ones(1, heads, 20, 8), torch.ones(1, 1, keys, 8)
        cause = torch.rand(1, keys, generator=torch.Generator().manual_seed(0))
        present = torch.ones(1, keys, dtype=torch.bool)
        present[0, absent] = False
        strength = torch.tensor([0.5, 1.0])
        if by == "weight":
            cause[~present] = -1.0  # takes the key out of the second head alone
        arguments = self.raw_arguments("attention") | {"query": query, "key": key, "value": key, "cause": cause}
        arguments |= {"head_strength": strength, "key_mask": present if by == "mask" else None}
        weights = operators.attention(**{name: self.moved(value) for name, value in arguments.items()})[3].cpu()
        assert weights.shape == (1, heads, keys + num_flags(keys))
        expected = (1 + strength[:, None] * cause) * (present if by == "mask" else 1)
        torch.testing.assert_close(weights[0, :, :keys], expected.log2())
        flags = torch.zeros(heads, num_flags(keys))
        flags[slice(None) if by == "mask" else 1, [key // FLAGGED_KEYS for key in absent]] = 1.0
        assert torch.equal(weights[0, :, keys:], flags)

    def test_absent_keys_are_found_by_the_flags_of_the_sequence_alone(self):
        """Flags of other keys, before and behind, are set: they are not looked at."""
        keys = 20000  # of which a program looks at the flags in two steps
        for first_key in (0, 5, 128, 19000):
            for end in (0, 1, 123, 124, 1000, keys - first_key):
                first_flag, last_flag = first_key // FLAGGED_KEYS, (first_key + end - 1) // FLAGGED_KEYS
                for absent in (None, first_flag, (first_flag + last_flag) // 2, last_flag):
                    flags = torch.ones(num_flags(keys))
                    flags[first_flag : last_flag + 1] = 0.0
                    expected = end
                    if absent is not None and first_flag <= absent <= last_flag:
                        flags[absent] = 1.0
                        expected = max(absent * FLAGGED_KEYS - first_key, 0)
                    found = torch.zeros(1, dtype=torch.int32)
                    flags, found = self.moved(flags), self.moved(found)
                    find_present_end[(1,)](flags, first_key, end, found)
                    assert int(found) == min(expected, end), (first_key, end, absent)

    @pytest.mark.parametrize("queries", [2, 20], ids=["decoding", "general"])
    def test_flags_decide_which_keys_are_looked_at(self, queries, monkeypatch):
        """With every flag set the results are the same; with none, NaN in a masked key is not noticed."""
        keys, absent = 200, 130
        key = torch.randn(1, 1, keys, 16, generator=torch.Generator().manual_seed(0))
        query = key[:, :, -queries:]
        key_mask = torch.ones(1, keys, dtype=torch.bool)
        key_mask[0, absent] = False
        key[0, 0, absent] = float("nan")
        arguments = self.raw_arguments("attention") | {"query": query, "key": key, "value": key, "key_mask": key_mask}
        arguments |= {"cause": None, "head_strength": None, "dropout_p": 0.0, "query_offset": None}
        arguments = {name: self.moved(value) for name, value in arguments.items()}
        results = operators.attention(**arguments)
        del arguments["for_backward"]

        def attend(flag):
            weights = results[3].clone()
            weights[..., keys:] = flag
            with monkeypatch.context() as patched:
                patched.setattr(operators.Call, "compute_weights", lambda call: call.check_weights(weights))
                output = operators.attention(**arguments, for_backward=True)[0]
            changed = (*results[:3], weights)
            given = dict(zip(("output", "rounding", "statistics", "weights"), changed, strict=True))
            grads = operators.attention_backward(torch.ones_like(output), **arguments, **given, cause_grad=False)
            return output, *grads[:3]

        given = dict(zip(("output", "rounding", "statistics", "weights"), results, strict=True))
        grads = operators.attention_backward(torch.ones_like(results[0]), **arguments, **given, cause_grad=False)
        for ours, expected in zip(attend(1.0), (results[0], *grads[:3]), strict=True):
            assert expected.isfinite().all()
            torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
        output, grad_query, *_ = attend(0.0)
        assert output.isnan().all()
        assert grad_query.isnan().all()

    def test_a_packed_sequence_that_begins_within_a_group_with_an_absent_key(self):
        tensors, options = packed_case([100, 90], [100, 90], heads=1)
        options["key_mask"] = torch.ones(190, dtype=torch.bool)
        options["key_mask"][[97, 188]] = False
        got = gradients(lambda *leaves: self.attend(*leaves, operator=biased_attention_varlen, **options), tensors)
        doubles = tuple(tensor.double() for tensor in tensors)
        truth = gradients(lambda *leaves: biased_attention_varlen(*leaves, **options, backend="reference"), doubles)
        for expected, actual in zip(truth, got, strict=True):
            torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("queries", [2, 20], ids=["decoding", "general"])
    def test_the_smallest_weights_of_half_precision(self, queries):
        """In fp16, where all weights are 2^-24 and where one of them is 1, probabilities are those of fp64."""
        (query, key, value, _), _ = Case(batch=1, heads=1, key_heads=1, queries=queries, dtype=torch.float16).make()
        cause = torch.full((1, key.shape[2]), 2.0**-24 - 1)
        assert float((1 + cause).max()) == 2.0**-24
        self.against_fp64((query, key, value, cause), {}, 5e-3, names="oqkv")
        cause[0, 7] = 0.0
        self.against_fp64((query, key, value, cause), {}, 5e-3, names="o")  # gradients are nearly 0

    @pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({}, ("weights", "forward", "backward_queries", "backward_keys", "grad_cause")),
            ({"head_strength": None}, ("weights", "forward", "backward_queries", "backward_keys", "grad_cause")),
            ({"key_mask": None}, ("weights", "forward", "backward_queries", "backward_keys", "grad_cause")),
            ({"cause_grad": False}, ("weights", "forward", "backward_queries", "backward_keys")),
            (
                {"cause_grad": False, "cause": None, "head_strength": None},
                ("weights", "forward", "backward_queries", "backward_keys"),
            ),
            ({"cause_grad": False, "cause": None, "key_mask": None}, ("forward", "backward_queries", "backward_keys")),
        ],
        ids=["everything", "cause and mask", "cause", "no gradient of cause", "mask", "neither"],
    )
    def test_forward_and_backward_launch_these_kernels_and_nothing_of_torch(
        self, changes, expected, packed, monkeypatch
    ):
        """Seed and dropout are given, and strengths per head. Whatever torch does, too, allocates or views."""
        launched = []
        monkeypatch.setattr(operators.Call, "run", lambda self, kernel, *_: launched.append(kernel.__name__))
        arguments = self.raw_arguments("attention", packed) | changes
        cause_grad = arguments.pop("cause_grad", True)
        del arguments["for_backward"]
        with OnlyAllocatesAndViews():
            results = operators.attention(**arguments, for_backward=True)
            given = dict(zip(("output", "rounding", "statistics", "weights"), results, strict=True))
            operators.attention_backward(results[0], **arguments, **given, cause_grad=cause_grad)
        assert launched == [f"{name}_kernel" for name in expected]

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
            (Case(batch=1, heads=4, key_heads=2, queries=3, keys=520, dim=20), 2),
            (Case(batch=1, heads=4, key_heads=2, queries=3, keys=300, dim=20, per_head=True), 1),
            (
                Case(
                    batch=1, heads=2, key_heads=1, queries=2, keys=300, causal=False, masked=True, dtype=torch.float16
                ),
                2,
            ),
            (Case(batch=1, heads=2, key_heads=1, queries=2, keys=300, query_offset=100), 2),  # later parts see no key
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
