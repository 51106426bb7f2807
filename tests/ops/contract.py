"""The tests that every backend with kernels must pass.

Each backend derives a class from `Contract` and adds cases of its own: test_cpu.py, tests/kernels for Triton, tests/csrc for
CUDA C++.
"""

from dataclasses import replace
from typing import ClassVar

import pytest
import torch

from empcause.ops import biased_attention, biased_attention_varlen
from empcause.ops.philox import dropout_keep_mask
from empcause.ops.reference import biased_attention_reference
from empcause.ops.registration import OPERATORS
from empcause.testing import Case, assert_close, exact, gradients, measured
from ops.arguments import move, pack, raw_arguments

PROBLEM = (
    "Tensor? cause, float strength, Tensor? head_strength, Tensor? key_mask, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, bool causal, float scale, float dropout_p, Tensor? seed, Tensor? query_offset"
)
SCHEMAS = {
    "attention": f"(Tensor query, Tensor key, Tensor value, {PROBLEM}, bool for_backward) -> (Tensor, Tensor, Tensor, Tensor)",
    "attention_backward": "(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor output, Tensor rounding, "
    f"Tensor statistics, Tensor weights, {PROBLEM}, bool cause_grad) -> (Tensor, Tensor, Tensor, Tensor)",
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}


def packed_case(lengths_q, lengths_k, dim=12, dtype=torch.float32, heads=2):
    """Return query, key, value and cause of packed sequences, and the options that describe them."""
    case = Case(
        batch=len(lengths_q),
        heads=heads,
        key_heads=1,
        queries=max(lengths_q),
        keys=max(lengths_k),
        dim=dim,
        dtype=dtype,
    )
    (query, key, value, cause), _ = case.make()
    mask = torch.rand(cause.shape, generator=torch.Generator().manual_seed(2)) > 0.2
    packed = (pack(query, lengths_q), pack(key, lengths_k), pack(value, lengths_k), pack(cause, lengths_k))
    sums = [torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (lengths_q, lengths_k)]
    return packed, {
        "cu_seqlens_q": sums[0],
        "cu_seqlens_k": sums[1],
        "max_seqlen_q": max(lengths_q),
        "max_seqlen_k": max(lengths_k),
        "key_mask": pack(mask, lengths_k),
        "strength": 0.5,
        "seed": 9,
    }


# By argument, a pattern of the names that its refusal may use: its own or that of an argument with which it is inconsistent.
FITS = {
    "query": "query|key",
    "key": "key|value",
    "value": "value",
    "cu_seqlens_q": "cu_seqlens_q|cu_seqlens_k",
}
OTHER_DTYPE = {
    torch.float32: torch.float64,
    torch.float16: torch.float64,
    torch.bool: torch.uint8,
    torch.int16: torch.int32,
    torch.int32: torch.int64,
    torch.int64: torch.int32,
}
READ_AS_THEY_LIE = ("cause", "head_strength", "key_mask", "cu_seqlens_q", "cu_seqlens_k", "statistics", "weights")
WRONG_OPTIONS = [
    ("dropout_p", -0.1, r"dropout_p must be in \[0, 1\)"),
    ("dropout_p", 1.0, r"dropout_p must be in \[0, 1\)"),
    ("dropout_p", float("nan"), r"dropout_p must be in \[0, 1\)"),
    ("seed", None, "dropout needs a seed"),
    ("scale", float("inf"), "scale must be finite in fp32"),
    ("scale", float("nan"), "scale must be finite in fp32"),
    ("scale", 1e39, "scale must be finite in fp32"),
    ("cause", None, "cause_grad without cause"),
]
NO_SUMS = torch.zeros(0, dtype=torch.int32)
WRONG_PACKING = [
    ("max_seqlen_q", -1, "max_seqlen_q and max_seqlen_k must not be negative"),
    ("max_seqlen_k", -1, "max_seqlen_q and max_seqlen_k must not be negative"),
    ("cu_seqlens_q", NO_SUMS, "cu_seqlens_q must have a number per sequence and one more"),
    ("cu_seqlens_q", None, "cu_seqlens_q and cu_seqlens_k come together"),
    ("cu_seqlens_k", None, "cu_seqlens_q and cu_seqlens_k come together"),
]
WRONG_WITHOUT_PACKING = [
    ("max_seqlen_q", 5, "max_seqlen_q and max_seqlen_k must be 0 without cu_seqlens_q and cu_seqlens_k"),
    ("max_seqlen_k", 7, "max_seqlen_q and max_seqlen_k must be 0 without cu_seqlens_q and cu_seqlens_k"),
    ("cu_seqlens_q", NO_SUMS, "cu_seqlens_q and cu_seqlens_k come together"),
    ("cu_seqlens_k", NO_SUMS, "cu_seqlens_q and cu_seqlens_k come together"),
]
WRONG_NUMBERS = {False: WRONG_OPTIONS + WRONG_WITHOUT_PACKING, True: WRONG_OPTIONS + WRONG_PACKING}


def wrong_shapes(tensor):
    """Yield the tensor with one dimension more, and with one element fewer in each of its dimensions."""
    yield tensor[None]
    if tensor.dim() == 0:
        yield tensor.expand(2)
    for axis, size in enumerate(tensor.shape):
        if size > 0:
            yield tensor.narrow(axis, 0, size - 1).contiguous()


class Contract:
    """Tests whose tensors are made on the CPU, moved to `device` and back.

    Decoding kernels compute calls with few queries, general kernels the others; tests with the ids "decoding" and "general" run
    on both.
    """

    backend: str
    device: str
    dtypes: list[torch.dtype]
    # The absolute value of all queries and keys in `test_large_logits`, by dtype. For fp32 it makes logits of 1e10, well within
    # fp32's range. It is smaller for 16 bits on a GPU, where the backward pass, as in FlashAttention, has the logsumexp in one
    # fp32 number, whose rounding error grows with it.
    largest: ClassVar = {torch.float32: 49152.0, torch.float16: 32.0}
    # The exception and the message that a forbidden cause raises when the kernels run on the host.
    assertion: type[Exception] = RuntimeError
    assertion_message = "cause must be finite with 1 \\+ strength \\* cause >= 0 wherever key_mask is True"

    def pytest_generate_tests(self, metafunc):
        given = {
            name for mark in metafunc.definition.iter_markers("parametrize") for name in str(mark.args[0]).split(",")
        }
        if "dtype" in metafunc.fixturenames and "dtype" not in given:
            metafunc.parametrize("dtype", self.dtypes, ids=str)

    @pytest.fixture(autouse=True)
    def _poisoned_memory(self):
        """Fill allocated memory with NaN, so that elements that a kernel does not write are noticed."""
        torch.use_deterministic_algorithms(True, warn_only=True)
        yield
        torch.use_deterministic_algorithms(False)

    def moved(self, value):
        return move(value, self.device)

    def attend(self, *tensors, operator=biased_attention, **options):
        """Run the operator on `device` for tensors on the CPU, and return its output on the CPU."""
        options = {name: self.moved(value) for name, value in options.items()}
        return operator(*map(self.moved, tensors), **options, backend=self.backend).cpu()

    def measured(self, case):
        """Return the output and the gradients of the kernels for a case."""
        return measured(case, self.backend, self.device)

    def assert_close(self, case):
        assert_close(case, self.backend, self.device)

    def leave_memory_alone(self, monkeypatch):
        """Do not fill the memory that a test allocates, so that its untouched pages take no memory."""
        monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)

    def raw_arguments(self, name, packed=False, dtype=torch.float32):
        return raw_arguments(f"empcause_{self.backend}", name, packed, self.device, dtype)

    def refused(self, name, arguments, message):
        """Assert that the raw operator refuses these arguments with this message, whatever devices the tensors are on."""
        operator = getattr(getattr(torch.ops, f"empcause_{self.backend}"), name).default
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA if self.device == "cuda" else torch._C.DispatchKey.CPU)
        with pytest.raises(RuntimeError, match=f"empcause: {message}"):
            operator.redispatch(keys, *(arguments[argument.name] for argument in operator._schema.arguments))

    def test_schemas_are_those_of_every_backend(self):
        for name in OPERATORS:
            operator = getattr(getattr(torch.ops, f"empcause_{self.backend}"), name).default
            assert str(operator._schema) == f"empcause_{self.backend}::{name}{SCHEMAS[name]}"

    @pytest.mark.parametrize("kept", [torch.float32, torch.float16], ids=str)
    @pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
    @pytest.mark.parametrize("name", OPERATORS)
    def test_raw_operators_refuse_every_tensor_that_does_not_fit(self, name, packed, kept):
        """It has another dtype or shape, is on another device, or is not contiguous though the kernels assume that it is."""
        arguments = self.raw_arguments(name, packed, kept)
        tensors = {argument: value for argument, value in arguments.items() if isinstance(value, torch.Tensor)}
        assert len(tensors) == 8 + 2 * packed + 5 * name.endswith("backward")
        row_axis = 0 if packed else 2
        for argument, tensor in tensors.items():
            message = f"({FITS.get(argument, argument)}) must be"
            wrong = [tensor.to(OTHER_DTYPE[tensor.dtype]), *wrong_shapes(tensor)]
            if argument == "query":  # Any number of queries is right in itself.
                wrong = [
                    other
                    for other in wrong
                    if other.dim() != tensor.dim() or other.shape[row_axis] == tensor.shape[row_axis]
                ]
            else:
                wrong.append(tensor.to("meta"))
            for other in wrong:
                self.refused(name, arguments | {argument: other}, message)
            if argument in READ_AS_THEY_LIE:
                apart = torch.stack([tensor, tensor], -1)[..., 0]
                self.refused(name, arguments | {argument: apart}, f"{argument} must be contiguous")

    @pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
    @pytest.mark.parametrize("name", OPERATORS)
    def test_raw_operators_refuse_numbers_out_of_range(self, name, packed):
        arguments = self.raw_arguments(name, packed)
        for argument, value, message in WRONG_NUMBERS[packed]:
            if "cause_grad" in arguments or argument != "cause":
                self.refused(name, arguments | {argument: move(value, self.device)}, message)

    def test_raw_operators_refuse_sizes_that_no_kernel_takes(self):
        def rows(*sizes):
            return torch.zeros(1, 1, 1, 1, device=self.device).expand(sizes)

        arguments = self.raw_arguments("attention")
        for sizes in ((3, 4, 5, 257), (3, 4, 5, 0)):
            self.refused("attention", arguments | {"query": rows(*sizes)}, "query must be .* head sizes up to 256")
        key = rows(3, 3, 7, 8)
        self.refused("attention", arguments | {"key": key, "value": key}, "key must be .* with Hkv a divisor of 4")
        key = rows(2**30, 1, 2**15, 8)
        many = {"query": rows(2**30, 2**15, 1, 8), "key": key, "value": key}
        many |= {"cause": None, "head_strength": None, "key_mask": None}
        self.refused("attention", arguments | many, "there are too many rows")

    def test_a_gradient_of_any_strides_is_read_as_it_is(self):
        """The gradient is an expanded single element, and a tensor whose last two dimensions are transposed in memory."""
        arguments = self.raw_arguments("attention_backward")
        operator = getattr(torch.ops, f"empcause_{self.backend}").attention_backward
        expected = operator(**arguments)
        one = torch.ones(1, 1, 1, 1, device=self.device).expand(arguments["grad_output"].shape)
        for grad_output in (one, one.mT.contiguous().mT):
            for ours, theirs in zip(operator(**arguments | {"grad_output": grad_output}), expected, strict=True):
                assert torch.equal(ours, theirs)

    def against_fp64(self, tensors, options, tolerance, names="oqkvc"):
        """Assert that output and gradients are finite and close to the reference in fp64, relative to the largest of each."""
        doubles = tuple(tensor.double() for tensor in tensors)
        truth = gradients(lambda *leaves: biased_attention_reference(*leaves, **options)[0], doubles)
        for backend, device in ((self.backend, self.device), ("reference", "cpu")):

            def call(*leaves, backend=backend, device=device):
                return biased_attention(*(move(leaf, device) for leaf in leaves), **options, backend=backend).cpu()

            for name, expected, got in zip(names, truth, gradients(call, tensors), strict=False):
                assert got.isfinite().all(), (backend, name)
                error = float((got.double() - expected).abs().max() / expected.abs().max())
                assert error < tolerance, (backend, name, error)

    @pytest.mark.parametrize("queries", [3, 33], ids=["decoding", "general"])
    @pytest.mark.parametrize("largest", [1e6, 1e30, 3.4e38])
    def test_large_causes(self, largest, queries):
        """The sum of some weights overflows fp32; rows that see none of these keys keep their accuracy."""
        (query, key, value, cause), _ = Case(batch=2, queries=queries, causal=True).make()
        cause[0, 6::3] = largest * torch.linspace(0.1, 1, 9)
        cause[1] = largest
        # With weights of 1e38 the gradient of the cause is subnormal, so it is not compared.
        names = "oqkvc" if largest < 1e38 else "oqkv"
        self.against_fp64((query, key, value, cause), {}, 1e-4, names)
        self.against_fp64((query, key, value, (cause / largest).clamp(min=0.0)), {"strength": largest}, 1e-4, names)

    @pytest.mark.parametrize("queries", [3, 33], ids=["decoding", "general"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_large_logits(self, queries, dtype):
        """In every row the largest logit, or several equal ones, take all of the probability."""
        (query, key, value, _), _ = Case(queries=queries, dtype=dtype).make()
        largest = self.largest[dtype]
        query, key = query.sign() * largest, key.sign() * largest
        self.against_fp64((query, key, value / 64), {}, 2e-3)

    @pytest.mark.parametrize("queries", [3, 33], ids=["decoding", "general"])
    def test_the_gradient_of_a_weight_of_0_is_capped_as_in_the_reference(self, queries):
        """Where the removed key's logit x is far above the logsumexp of the others, x - LSE is capped at 80."""
        (query, key, value, cause), _ = Case(batch=1, queries=queries).make()
        query, key = query.abs(), key.abs()
        key[:, :, 2] *= 500
        cause[0, 2] = -1.0
        self.against_fp64((query, key, value, cause), {}, 1e-3)

    def test_allocated_memory_is_full_of_nan(self):
        assert torch.zeros(1, device=self.device).new_empty(4).isnan().all()

    @pytest.mark.parametrize(("queries", "keys", "batch"), [(0, 5, 2), (20, 0, 2), (3, 0, 2), (0, 0, 1), (4, 4, 0)])
    def test_empty_inputs(self, queries, keys, batch):
        output, *grads = self.measured(Case(queries=queries, keys=keys, batch=batch, causal=False))
        assert output.shape == (batch, 4, queries, 16)
        assert not output.any()
        assert all(not grad.any() for grad in grads)

    def test_output_layout(self):
        tensors, options = Case(batch=1).make()
        output = biased_attention(*map(self.moved, tensors), **options, backend=self.backend)
        assert output.transpose(1, 2).is_contiguous()

    @pytest.mark.parametrize("queries", [2, 40], ids=["decoding", "general"])
    def test_nan_in_masked_keys_reaches_nothing(self, dtype, queries):
        case = Case(batch=1, masked=True, queries=queries, keys=40, dtype=dtype)
        clean = self.measured(case)
        (query, key, value, cause), options = case.make()
        hidden = ~options["key_mask"]
        key, value, cause = key.clone(), value.clone(), cause.clone()
        for tensor in (key, value):
            tensor.transpose(1, 2)[hidden] = float("nan")
        cause[hidden] = float("nan")
        got = gradients(lambda *leaves: self.attend(*leaves, **options), (query, key, value, cause))
        for expected, actual in zip(clean, got, strict=True):
            assert torch.equal(expected, actual)

    @pytest.mark.parametrize("queries", [3, 33], ids=["decoding", "general"])
    def test_nan_in_an_attended_key_is_seen(self, dtype, queries):
        (query, key, value, cause), options = Case(batch=1, queries=queries, dtype=dtype).make()
        first = 33 - queries + 1  # the key that the second row is the first to see
        key[0, 0, first, 0] = float("nan")
        leaves = tuple(tensor.requires_grad_() for tensor in (query, key, value, cause))
        output = self.attend(*leaves, **options)
        assert output[0, 0, 1:].isnan().all()
        assert not output[0, 0, :1].isnan().any()
        assert not output[0, 2:].isnan().any(), "heads of the other key head"
        grads = torch.autograd.grad(output.sum(), leaves)
        assert grads[0][0, 0, 1:].isnan().all(), "capping the exponent does not hide it"
        assert all(grad.isnan().any() for grad in grads)

    @pytest.mark.parametrize("queries", [3, 33], ids=["decoding", "general"])
    @pytest.mark.parametrize("cause_shape", ["11K", "1HK"])
    def test_nan_in_a_removed_key_reaches_nothing(self, dtype, cause_shape, queries):
        """A weight of 0 removes the key in all heads, or in one head while the other still attends to it."""
        (query, key, value, cause), options = Case(
            batch=1, heads=2, key_heads=1, cause_shape=cause_shape, dtype=dtype
        ).make()
        query = query[:, :, -queries:]
        removed = 5
        cause[0, 0, removed] = -1 / options["strength"]
        clean = gradients(lambda *leaves: self.attend(*leaves, **options), (query, key, value, cause))
        key[0, 0, removed], value[0, 0, removed] = float("nan"), float("nan")
        got = gradients(lambda *leaves: self.attend(*leaves, **options), (query, key, value, cause))
        heads = slice(None) if cause_shape == "11K" else slice(0, 1)
        others = torch.arange(33) != removed
        assert torch.equal(got[0][:, heads], clean[0][:, heads])
        assert torch.equal(got[1][:, heads], clean[1][:, heads])
        if cause_shape == "11K":
            assert torch.equal(got[2], clean[2])
            assert torch.equal(got[3], clean[3])
        else:
            assert got[0][:, 1].isnan().any(), "the other head does attend to the key"
        assert torch.equal(got[4][0, 0, others], clean[4][0, 0, others])

    @pytest.mark.parametrize("queries", [12, 40], ids=["decoding", "general"])
    def test_removed_key(self, queries):
        """cause = -1 / strength gives weight 0: the key is gone exactly, yet its cause has a gradient."""
        generator = torch.Generator().manual_seed(0)
        query, key, value = (torch.randn(1, 2, queries, 8, generator=generator) for _ in range(3))
        strength = 0.3
        cause = torch.zeros(1, queries)
        cause[0, 4] = -1 / strength
        keep = torch.arange(queries) != 4
        expected = self.attend(query, key, value, key_mask=keep[None])
        assert torch.equal(self.attend(query, key, value, cause, strength=strength), expected)

        def gradient(cause, backend, dtype):
            leaf = cause.to(dtype).requires_grad_(True)
            tensors = (query.to(dtype), key.to(dtype), value.to(dtype), leaf)
            output = biased_attention(*map(self.moved, tensors), strength=strength, backend=backend)
            return torch.autograd.grad(output.sum(), leaf)[0]

        truth = gradient(cause, "reference", torch.float64)
        assert float(truth[0, 4].abs()) > 1e-3
        torch.testing.assert_close(gradient(cause, self.backend, torch.float32), truth.float(), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("queries", [12, 40], ids=["decoding", "general"])
    def test_a_weight_that_rounding_leaves_below_zero_counts_as_zero(self, queries):
        (query, key, value, cause), _ = Case(batch=1, queries=queries, keys=40).make()
        cause = torch.zeros_like(cause)
        cause[0, 4] = -(1 + 5e-7)
        assert -1e-6 < float(1 + cause[0, 4]) < 0
        output, *grads = gradients(self.attend, (query, key, value, cause))
        keep = torch.arange(40) != 4
        assert torch.equal(output, self.attend(query, key, value, key_mask=keep[None]))
        assert all(grad.isfinite().all() for grad in grads)

    @pytest.mark.parametrize("queries", [3, 20], ids=["decoding", "general"])
    def test_huge_logits_of_a_removed_key_stay_finite(self, queries):
        query, key, value = (torch.ones(1, 1, queries, 4) for _ in range(3))
        key[:, :, 0] = 500.0
        cause = torch.zeros(1, queries)
        cause[0, 0] = -1.0
        output, *grads = gradients(self.attend, (query, key, value, cause))
        assert torch.equal(output[0, 0, 0], torch.zeros(4)), "the only key of the first row is removed"
        assert all(grad.isfinite().all() for grad in grads)

    @pytest.mark.parametrize("queries", [8, 30], ids=["decoding", "general"])
    def test_nan_in_dead_rows_reaches_nothing(self, dtype, queries):
        """Rows that see no key give 0, even if their query and their gradient of the output are NaN."""
        tensors, options = Case(batch=1, queries=queries, keys=5, cause_shape="1K", dtype=dtype).make()
        dead = queries - 5

        def call(*leaves):
            return self.attend(*leaves, **options)

        clean = gradients(call, tensors)
        query = tensors[0].clone()
        query[:, :, :dead] = float("nan")
        leaves = [tensor.detach().requires_grad_(True) for tensor in (query, *tensors[1:])]
        output = call(*leaves)
        assert torch.equal(output, clean[0])
        assert not output[:, :, :dead].any()
        grad_output = torch.randn(output.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(
            dtype
        )
        grad_output[:, :, :dead] = float("nan")
        for expected, actual in zip(clean[1:], torch.autograd.grad(output, leaves, grad_output), strict=True):
            assert torch.equal(expected, actual)

    @pytest.mark.parametrize("queries", [3, 33], ids=["decoding", "general"])
    def test_every_key_masked(self, queries):
        case = Case(batch=2, queries=queries, extra={"key_mask": torch.tensor([[False] * 33, [True] * 33])})
        output, *grads = self.measured(case)
        assert not output[0].any()
        assert output[1].any()
        assert all(not grad[0].any() for grad in grads)
        self.assert_close(case)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -2.0])
    def test_a_forbidden_cause_is_refused(self, value):
        if self.device == "cuda":
            pytest.skip("a failed assertion ends the use of the CUDA device by this process")
        (query, key, _, cause), options = Case(batch=1).make()
        cause[0, 7] = value
        with pytest.raises(self.assertion, match=self.assertion_message):
            self.attend(query, key, key, cause, **options)
        options["key_mask"] = (torch.arange(33) != 7)[None]
        assert self.attend(query, key, key, cause, **options).isfinite().all()

    @pytest.mark.parametrize("queries", [5, 20])
    def test_dropout_uses_the_common_bits(self, dtype, queries):
        """All backends drop the same probabilities.

        With equal logits and one-hot values the output shows which probabilities are kept, and the value's gradient of its sum
        shows how many are kept per key.
        """
        keys, p, seed = 24, 0.4, 123 + 2**40
        query, key = torch.zeros(2, 3, queries, 24, dtype=dtype), torch.zeros(2, 3, keys, 24, dtype=dtype)
        value = torch.eye(24, dtype=dtype).expand(2, 3, keys, 24).contiguous().requires_grad_(True)
        output = self.attend(query, key, value, causal=False, dropout_p=p, seed=seed)
        keep = dropout_keep_mask(seed, p, 2, 3, queries, keys)
        torch.testing.assert_close(output.float(), keep / keys / (1 - p), rtol=0.01, atol=0)
        grad = torch.autograd.grad(output.sum(), value)[0]
        kept = (keep / keys / (1 - p)).sum(2)[..., None].expand(grad.shape)
        torch.testing.assert_close(grad.float(), kept, rtol=0.01, atol=0)

    @pytest.mark.parametrize("causal", [True, False])
    @pytest.mark.parametrize(
        ("lengths_q", "lengths_k", "dropout_p"),
        [
            ([5, 0, 37, 1], [9, 4, 37, 1], 0.0),
            ([5, 0, 37, 1], [9, 4, 37, 1], 0.3),
            ([1, 3, 0, 2], [300, 7, 5, 2], 0.0),
        ],
        ids=["training", "dropout", "decoding"],
    )
    def test_varlen(self, lengths_q, lengths_k, dropout_p, dtype, causal):
        tensors, options = packed_case(lengths_q, lengths_k, dtype=dtype)
        options |= {"dropout_p": dropout_p, "causal": causal}
        got = gradients(lambda *leaves: self.attend(*leaves, operator=biased_attention_varlen, **options), tensors)
        doubles = tuple(tensor.double() for tensor in tensors)
        truth = gradients(lambda *leaves: biased_attention_varlen(*leaves, **options, backend="reference"), doubles)
        tolerance = TOLERANCE[dtype]
        for expected, actual in zip(truth, got, strict=True):
            torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance * 12**0.5)

    @pytest.mark.parametrize("queries", [3, 20], ids=["decoding", "general"])
    def test_packed_sequence_without_keys(self, queries):
        tensors, options = packed_case([queries, 2, 5], [queries, 3, 5])
        without = options | {"cu_seqlens_k": torch.tensor([0, queries, queries, queries + 5], dtype=torch.int32)}
        shorter = tuple(torch.cat([tensor[:queries], tensor[-5:]]) for tensor in (*tensors[1:], options["key_mask"]))
        without["key_mask"] = shorter[3]
        got = gradients(
            lambda *leaves: self.attend(*leaves, operator=biased_attention_varlen, **without),
            (tensors[0], *shorter[:3]),
        )
        expected = gradients(lambda *leaves: self.attend(*leaves, operator=biased_attention_varlen, **options), tensors)
        rows = torch.arange(len(tensors[0]))
        others = (rows < queries) | (rows >= queries + 2)
        assert not got[0][~others].any()
        assert not got[1][~others].any()
        assert torch.equal(got[0][others], expected[0][others])
        assert torch.equal(got[1][others], expected[1][others])
        for ours, theirs in zip(got[2:], expected[2:], strict=True):
            assert torch.equal(ours, torch.cat([theirs[:queries], theirs[-5:]]))

    @pytest.mark.parametrize("dim", [32, 27, 64, 96, 128, 256, 250])
    def test_decoding_equals_the_last_rows(self, dtype, dim):
        """One query over a cache has the output of the full pass, up to the order of summation."""
        case = Case(batch=1, queries=300, keys=300, heads=2, key_heads=1, dim=dim, dtype=dtype)
        (query, key, value, cause), options = case.make()
        full = self.attend(query[:, :, -20:], key, value, cause, **options)
        last = self.attend(query[:, :, -1:], key, value, cause, **options)
        tolerance = 1e-5 if dtype == torch.float32 else 0.02
        torch.testing.assert_close(last, full[:, :, -1:], rtol=tolerance, atol=tolerance)

    @pytest.mark.parametrize("queries", [2, 20], ids=["decoding", "general"])
    def test_offsets_beyond_32_bits(self, queries, monkeypatch):
        """The rows are so far apart that offsets within a tile exceed 2 ** 31; only the pages that are touched take memory."""
        self.leave_memory_alone(monkeypatch)
        keys, dim, stride = 64, 16, 2**25 + 2**20
        assert (keys - 1) * stride > 2**31
        storage = torch.empty(keys * stride, dtype=torch.float16, device=self.device)
        far = storage.as_strided((1, 1, keys, dim), (1, 1, stride, 1))
        far.copy_(torch.randn(far.shape, generator=torch.Generator().manual_seed(0)))
        near = far.contiguous()

        def call(query, key, value):
            return biased_attention(query, key, value, backend=self.backend)

        got = gradients(call, (far[:, :, -queries:], far, far))
        expected = gradients(call, (near[:, :, -queries:], near, near))
        for ours, theirs in zip(got, expected, strict=True):
            assert torch.equal(ours, theirs)

    def test_half_precision_gradients_of_cause_are_accumulated_in_fp32(self):
        case = Case(batch=1, heads=2, key_heads=1, dtype=self.dtypes[-1], queries=128, keys=128, dim=32)
        got, truth = self.measured(case)[4], exact(case)[4]
        assert got.dtype == torch.float32
        assert float((got.double() - truth).abs().max() / truth.abs().max()) < 0.02

    @pytest.mark.parametrize("queries", [4, 80], ids=["decoding", "general"])
    def test_bitwise_deterministic(self, queries):
        """Two runs give the same bits, whatever the order in which the blocks run."""
        dropout_p = 0.0 if queries == 4 else 0.2
        case = Case(batch=1, queries=queries, keys=260, masked=True, dtype=self.dtypes[-1], dropout_p=dropout_p)
        for first, second in zip(self.measured(case), self.measured(case), strict=True):
            assert torch.equal(first, second)

    def test_gradients_only_of_what_asks_for_them(self):
        (query, key, value, cause), options = Case(batch=1).make()
        query.requires_grad_(True)
        self.attend(query, key, value, cause, **options).sum().backward()
        assert query.grad.isfinite().all()
        assert cause.grad is None

    @pytest.mark.parametrize("requires_grad", [False, True])
    def test_opcheck(self, requires_grad):
        operators = getattr(torch.ops, f"empcause_{self.backend}")
        tensors, _ = Case(queries=7, keys=9).make()
        leaves = [self.moved(tensor).requires_grad_(requires_grad) for tensor in tensors]
        mask, seed = self.moved(torch.rand(2, 9) > 0.2), self.moved(torch.tensor(3))
        options = (0.7, None, mask, None, None, 0, 0, True, 0.25, 0.1, seed, None, True)
        torch.library.opcheck(operators.attention, (*leaves, *options))
        sums = self.moved(torch.tensor([0, 3, 7], dtype=torch.int32))
        packed = [self.moved(torch.randn(7, heads, 16)).requires_grad_(requires_grad) for heads in (4, 2, 2)]
        packed_cause = self.moved(torch.rand(7)).requires_grad_(requires_grad)
        options = (0.7, None, None, sums, sums, 4, 4, True, 0.25, 0.0, None, None, True)
        torch.library.opcheck(operators.attention, (*packed, packed_cause, *options))

    def test_case_bound_can_fail(self):
        """A result with another strength differs by far more than the tolerance, so the comparison can notice it."""
        case = Case(batch=1)
        wrong = replace(case, extra={"strength": 0.9})
        for got, expected in zip(self.measured(wrong), exact(case), strict=True):
            assert float((got.double() - expected).abs().max()) > 1e-3
