"""Compares the CUDA kernels with fp64, over shapes, masks, strides and precisions.

The kernels run on a GPU where there is one and the CUDA backend is built. Elsewhere they run under the emulator, which
also ends a call with an error at a race, a read of unwritten shared memory or an access outside of the tensors.
"""

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import empcause
from csrc.building import ROOT, build
from empcause.ops import biased_attention, biased_attention_varlen
from empcause.ops.backends import load_cuda
from empcause.testing import Case, gradients
from ops.contract import TOLERANCE, Contract, packed_case

ON_DEVICE = empcause.info()["cuda"].built and torch.cuda.is_available()
DEVICE = "cuda" if ON_DEVICE else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="session")
def emulation():
    """Build the library that runs the kernels on the host, and return its path."""
    folder = ROOT / "build" / "cuda_emulation"
    build("empcause_cuda_emulation", folder, "-DEMPCAUSE_BUILD_MODULE=OFF", "-DEMPCAUSE_CUDA_EMULATION=ON")
    return folder / "libempcause_cuda_emulation.so"


@pytest.fixture(scope="session", autouse=True)
def _loaded(request):
    if ON_DEVICE:
        return
    if empcause.info()["cuda"].built:
        pytest.skip("the CUDA backend is built, but there is no device")
    load_cuda(request.getfixturevalue("emulation"))


MATRIX = {
    "batch": st.integers(1, 2),
    "grouping": st.sampled_from([(1, 1), (2, 2), (2, 1), (3, 1), (4, 2)]),  # query heads, key heads
    "queries": st.sampled_from([1, 2, 16, 17, 31, 64, 65, 129]),
    "keys": st.sampled_from([1, 7, 8, 31, 64, 65, 97, 200]),
    "dim": st.sampled_from([1, 8, 15, 16, 33, 64, 80, 96, 128]),
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


WRONG_SUMS = [
    [0, 6, 4000],
    [0, 6, -4000],
    [0, 6, 3],
    [0, -1, 31],
    [-5, 40, 31],
    [31, 31, 0],
    [-(2**31), 2**31 - 1, -(2**31)],
]


def fused_views(queries, keys, dtype, lead):
    """Return query, key and value as views of one fused projection that begins `lead` elements into its storage."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1, keys, (2 + 1 + 1) * 16, generator=generator).to(dtype)
    storage = torch.empty(values.numel() + lead, dtype=dtype, device=DEVICE)
    fused = storage[lead:].view(values.shape).copy_(values)
    query, key, value = (part.unflatten(-1, (-1, 16)).transpose(1, 2) for part in fused.split([32, 16, 16], -1))
    return query[:, :, keys - queries :], key, value


def counter(emulation, what):
    """Return a function that returns how many "launches" or "products" there were in this process."""
    function = getattr(ctypes.CDLL(str(emulation)), f"empcause_cuda_{what}")
    function.restype = ctypes.c_uint64
    return function


class CountLaunches(TorchDispatchMode):
    """Lists the operators of torch that launch a kernel: all but views and those that only allocate memory."""

    def __init__(self):
        super().__init__()
        self.operators = []

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        namespace, name = operator.name().split("::")
        is_view = any(argument.alias_info is not None for argument in operator._schema.returns)
        if namespace == "aten" and not is_view and not name.startswith(("empty", "new_empty")):
            self.operators.append(operator.name())
        return operator(*arguments, **(options or {}))


@pytest.mark.usefixtures("_loaded")
class TestCuda(Contract):
    backend, device, dtypes = "cuda", DEVICE, DTYPES

    def check(self, grouping, **arguments):
        heads, key_heads = grouping
        self.assert_close(Case(heads=heads, key_heads=key_heads, **arguments))

    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(**MATRIX)
    def test_case_matrix(self, **arguments):
        self.check(**arguments)

    @pytest.mark.slow
    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(**MATRIX | {"dim": st.integers(1, 256), "seed": st.integers(6, 50)})
    def test_larger_case_matrix(self, **arguments):
        self.check(**arguments)

    @pytest.mark.parametrize("dim", [32, 27, 64, 61, 96, 90, 128, 127, 256, 250])
    @pytest.mark.parametrize("dropout_p", [0.0, 0.2])
    def test_every_kernel(self, dtype, dropout_p, dim):
        """There are several blocks of rows and several tiles of columns; rows see all or some columns of a tile."""
        length = 150 if dim <= 128 else 70
        shape = {"batch": 1, "heads": 1, "key_heads": 1, "queries": length, "keys": length, "dim": dim}
        self.assert_close(Case(**shape, dtype=dtype, dropout_p=dropout_p, masked=True))

    @pytest.mark.parametrize(
        "case",
        [
            Case(batch=1, queries=1, keys=300, dim=64),
            Case(batch=1, heads=6, key_heads=2, dim=32, queries=40, keys=50, dtype=torch.float16),
            Case(batch=1, queries=40, keys=10),
            Case(batch=1, queries=300, keys=40, causal=False, dtype=torch.bfloat16),
            Case(batch=1, heads=2, queries=20, keys=400, causal=False, dtype=torch.bfloat16),
            Case(batch=1, heads=2, queries=10, keys=40, query_offset=7),
            Case(batch=1, heads=2, queries=20, keys=20, query_offset=-(2**40)),
            Case(batch=1, heads=2, queries=20, keys=20, query_offset=2**40),
            Case(batch=1, heads=2, queries=4, keys=20, query_offset=-(2**40)),
            Case(batch=1, heads=2, queries=4, keys=20, query_offset=2**40),
        ],
        ids=[
            "decoding",
            "grouped fp16",
            "dead rows",
            "many queries",
            "many keys",
            "offset",
            "before everything",
            "after everything",
            "decoding before everything",
            "decoding after everything",
        ],
    )
    def test_notable_cases(self, case):
        self.assert_close(case)

    @pytest.mark.parametrize("queries", [5, 150], ids=["decoding", "general"])
    def test_views_of_a_fused_projection_aligned_or_not(self, dtype, queries):
        """Aligned rows are copied in chunks of 16 bytes, rows one element further on element by element."""

        def call(query, key, value):
            return biased_attention(query, key, value, backend=self.backend)

        aligned, shifted = (fused_views(queries, 150, dtype, lead) for lead in (0, 1))
        got = gradients(call, aligned)
        for one, other in zip(got, gradients(call, shifted), strict=True):
            assert torch.equal(one, other)
        truth = gradients(
            lambda *leaves: biased_attention(*leaves, backend="reference"), tuple(view.double() for view in aligned)
        )
        tolerance = TOLERANCE[dtype]
        for expected, actual in zip(truth, got, strict=True):
            torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)

    @pytest.mark.parametrize("queries", [3, 33], ids=["decoding", "general"])
    def test_strides_that_are_not_chunks(self, dtype, queries):
        """The length of a row is a multiple of 16 bytes, its stride is not."""
        whole = Case(batch=2, queries=queries, dtype=dtype).make()[0][:3]
        padded = tuple(torch.nn.functional.pad(tensor, (0, 1))[..., :-1] for tensor in whole)
        assert all(tensor.stride(-1) == 1 and tensor.stride(-2) % 8 for tensor in padded)
        got, expected = (gradients(self.attend, tensors) for tensors in (padded, whole))
        for ours, theirs in zip(got, expected, strict=True):
            assert torch.equal(ours, theirs)

    def test_grad_output_of_any_strides(self):
        tensors, options = Case(batch=1).make()
        leaves = [self.moved(tensor).requires_grad_(True) for tensor in tensors]
        output = biased_attention(*leaves, **options, backend=self.backend)
        row = torch.randn(16, generator=torch.Generator().manual_seed(1)).to(DEVICE)
        expanded = row.expand(output.shape)
        columns = expanded.transpose(2, 3).contiguous().transpose(2, 3)
        shifted = torch.nn.functional.pad(expanded, (1, 0))[..., 1:]
        expected = torch.autograd.grad(output, leaves, expanded.contiguous(), retain_graph=True)
        for grad_output in (expanded, columns, shifted):
            got = torch.autograd.grad(output, leaves, grad_output, retain_graph=True)
            for ours, theirs in zip(got, expected, strict=True):
                assert torch.equal(ours, theirs)

    @pytest.mark.parametrize("cause_shape", [None, "HM", "1M"])
    def test_varlen_causes(self, cause_shape):
        (query, key, value, cause), options = packed_case([7, 20], [7, 20])
        if cause_shape is None:
            leaves = (query, key, value)
        else:
            leaves = (query, key, value, torch.stack([cause, 1 - cause]) if cause_shape == "HM" else cause[None])
        got = gradients(lambda *leaves: self.attend(*leaves, operator=biased_attention_varlen, **options), leaves)
        doubles = tuple(leaf.double() for leaf in leaves)
        truth = gradients(lambda *leaves: biased_attention_varlen(*leaves, **options, backend="reference"), doubles)
        for expected, actual in zip(truth, got, strict=True):
            torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=3e-5)

    @pytest.mark.parametrize("dim", [20, 24])
    @pytest.mark.parametrize("per_head", [False, True])
    def test_only_the_tiles_that_lack_keys_look_at_them(self, dtype, per_head, dim):
        """Some tiles are whole, others lack a few keys or all, which are masked or have weight 0 and hold NaN."""
        (query, key, value, cause), _ = Case(batch=1, heads=2, key_heads=1, queries=260, keys=260, dim=dim).make()
        masked, removed = (slice(70, 75), slice(190, 260)), (slice(135, 137), slice(0, 66))
        key_mask = torch.ones(1, 260, dtype=torch.bool)
        cause = cause[:, None].repeat(1, 2 if per_head else 1, 1)
        for keys in masked:
            key_mask[:, keys] = False
        for keys in removed:
            cause[..., keys] = -1.0
        leaves = [tensor.to(dtype) for tensor in (query, key, value)]
        doubles = [leaf.double() for leaf in (*leaves, cause)]
        truth = gradients(lambda *xs: biased_attention(*xs, key_mask=key_mask, backend="reference"), doubles)
        for absent in (*masked, *removed):
            for tensor in leaves[1:]:
                tensor[:, :, absent] = float("nan")
        got = gradients(lambda *xs: self.attend(*xs, key_mask=key_mask), (*leaves, cause))
        for name, expected, actual in zip(("output", "query", "key", "value"), truth, got, strict=False):
            torch.testing.assert_close(
                actual.double(),
                expected,
                rtol=TOLERANCE[dtype],
                atol=TOLERANCE[dtype],
                msg=lambda m, n=name: f"{n}: {m}",
            )

    @pytest.mark.skipif(ON_DEVICE, reason="the emulator counts launches")
    @pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
    @pytest.mark.parametrize("what", ["cause_grad", "cause", "mask", "neither"])
    def test_number_of_launches(self, emulation, what, packed):
        """Of a forward and a backward pass; every operator of torch that would launch a kernel counts, too."""
        most = {"cause_grad": 5, "cause": 4, "mask": 4, "neither": 3}[what]
        (query, key, value, cause), options = packed_case([7, 20], [7, 20])
        operator = biased_attention_varlen
        if not packed:
            query, key, value = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
            options, cause, operator = {"key_mask": options["key_mask"][None]}, cause[None], biased_attention
        options |= {"seed": torch.tensor(3), "dropout_p": 0.1}
        if what != "mask":
            del options["key_mask"]
        leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
        weighted = cause.requires_grad_(what == "cause_grad") if "cause" in what else None
        grad_output = torch.ones_like(query)
        launches = counter(emulation, "launches")
        before = launches()
        with CountLaunches() as counted:
            output = operator(*leaves, weighted, **options, backend=self.backend)
            output.backward(grad_output)
        assert launches() - before + len(counted.operators) == most, counted.operators
        assert all(leaf.grad is not None for leaf in leaves)

    @pytest.mark.skipif(ON_DEVICE, reason="the emulator counts products")
    def test_padding_is_not_computed(self, emulation):
        """Tiles of keys that are all absent take no matrix product, at either end of a sequence: neither forward nor in the
        gradients of query, key and value. (The gradient of a cause is also that of keys with weight 0.)"""
        products = counter(emulation, "products")

        def count(keys, begin=0, end=None):
            tensors = Case(batch=1, queries=40, keys=keys, dim=32, dtype=torch.bfloat16).make()[0][:3]
            key_mask = torch.zeros(1, keys, dtype=torch.bool)
            key_mask[:, begin:end] = True
            before = products()
            gradients(lambda *xs: self.attend(*xs, key_mask=key_mask, causal=False), tensors)
            return products() - before

        assert count(128) == count(512, begin=256, end=384) == count(512, end=128) == count(512, begin=384) > 0
        assert count(256) > count(128)

    @pytest.mark.parametrize("longest", [25, 7, 5000])
    @pytest.mark.parametrize("wrong", WRONG_SUMS)
    @pytest.mark.parametrize("names", [["cu_seqlens_q"], ["cu_seqlens_k"], ["cu_seqlens_q", "cu_seqlens_k"]])
    def test_prefix_sums_that_do_not_fit_lead_nowhere(self, names, wrong, longest):
        """The backend does not wait for the GPU to check prefix sums. Whatever they are, the kernels stay inside the
        tensors, which the emulator checks, and a sequence with correct sums has correct results."""
        tensors, options = packed_case([6, 25], [6, 25])
        expected = self.attend(*tensors, operator=biased_attention_varlen, **options)
        options |= {name: torch.tensor(wrong, dtype=torch.int32) for name in names}
        options |= {"max_seqlen_q": longest, "max_seqlen_k": longest}
        output, *_ = gradients(
            lambda *leaves: self.attend(*leaves, operator=biased_attention_varlen, **options), tensors
        )
        if wrong[:2] == [0, 6]:
            assert torch.equal(output[:6], expected[:6])

    @pytest.mark.parametrize(
        "case",
        [
            Case(batch=1, heads=4, key_heads=2, queries=3, keys=700, dim=20),
            Case(batch=1, heads=4, key_heads=2, queries=3, keys=700, dim=21, dtype=torch.bfloat16),
            Case(batch=1, heads=4, key_heads=2, queries=3, keys=700, dim=20, per_head=True),
            Case(
                batch=1, heads=6, key_heads=1, queries=4, keys=700, dim=20, dtype=torch.bfloat16
            ),  # three heads at a time
            Case(batch=1, heads=20, key_heads=1, queries=1, keys=700, dim=20, dtype=torch.bfloat16),
            Case(batch=1, heads=2, key_heads=1, queries=2, keys=600, causal=False, masked=True, dtype=torch.float16),
            Case(batch=1, heads=2, key_heads=1, queries=2, keys=700, query_offset=100),  # later parts see no key
            Case(batch=1, heads=2, key_heads=1, queries=16, keys=700, query_offset=-3),  # first rows see no key
            Case(batch=9, heads=4, key_heads=4, queries=2, keys=300),  # enough blocks without
        ],
        ids=[
            "grouped",
            "odd head size",
            "weights per head",
            "some heads together",
            "more heads than rows",
            "fp16",
            "cache longer than it is full",
            "dead rows",
            "one part",
        ],
    )
    def test_decoding_in_several_parts(self, case):
        self.assert_close(case)
