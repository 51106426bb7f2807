"""Arguments and errors of the operator, and its behaviour under autograd, torch.compile and random seeds."""

import math
import subprocess
import sys

import pytest
import torch

import empcause
from empcause.ops import biased_attention, biased_attention_varlen
from empcause.testing import Case, gradients, measured
from ops.arguments import pack

HAS_CPU = empcause.info()["cpu"].runs
needs_cpu = pytest.mark.skipif(not HAS_CPU, reason="the CPU kernels are not built")


def tensors(**options):
    return Case(**options).make()[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.randn(2, 4, 33)}, r"query must be \[B, H, Q, D\]"),
        ({"key": torch.randn(2, 3, 33, 16), "value": torch.randn(2, 3, 33, 16)}, "must divide the query heads"),
        ({"value": torch.randn(2, 2, 30, 16)}, "same shape"),
        ({"key": torch.randn(2, 2, 33, 16).half()}, "share a dtype"),
        ({"key": torch.randn(3, 2, 33, 16), "value": torch.randn(3, 2, 33, 16)}, "share the batch"),
        ({"cause": torch.rand(2, 32)}, r"cause must be \[B or 1, K\]"),
        ({"cause": torch.rand(33)}, r"cause must be \[B or 1, K\]"),
        ({"cause": torch.rand(())}, r"cause must be \[B or 1, K\]"),
        ({"cause": torch.rand(3, 33)}, r"cause must be \[B or 1, K\]"),
        ({"cause": torch.rand(2, 3, 33)}, r"cause must be \[B or 1, K\]"),
        ({"cause": torch.rand(1, 2, 4, 33)}, r"cause must be \[B or 1, K\]"),
        ({"cause": torch.ones(2, 33, dtype=torch.long)}, "cause must be floating"),
        ({"key_mask": torch.ones(2, 33)}, "key_mask must be bool"),
        ({"key_mask": torch.ones(2, 30, dtype=torch.bool)}, r"key_mask must be bool \[B, K\] = \[2, 33\]"),
        ({"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\)"),
        ({"dropout_p": -0.1}, r"dropout_p must be in \[0, 1\)"),
        ({"dropout_p": math.nan}, r"dropout_p must be in \[0, 1\)"),
        ({"strength": math.inf}, "finite number"),
        ({"strength": torch.rand(3)}, r"\[H\] = \[4\]"),
        ({"query_offset": torch.tensor(1.0)}, "query_offset must be an int"),
        ({"dropout_p": 0.1, "seed": torch.tensor([1])}, "seed must be an int"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    query, key, value, cause = tensors()
    arguments = {"query": query, "key": key, "value": value, "cause": cause} | change
    with pytest.raises(ValueError, match=message):
        biased_attention(**arguments)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_cpu)])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -3.0])
def test_values_of_cause_are_checked_where_attended(backend, bad):
    query, key, value, cause = tensors()
    cause = cause.abs()
    cause[1, 7] = bad
    with pytest.raises(RuntimeError, match="cause"):
        biased_attention(query, key, value, cause, backend=backend)
    mask = torch.ones(2, 33, dtype=torch.bool)
    mask[1, 7] = False
    assert biased_attention(query, key, value, cause, key_mask=mask, backend=backend).isfinite().all()


def test_unknown_and_unfit_backends():
    query, key, value, _ = tensors()
    with pytest.raises(RuntimeError, match="Unknown backend 'gpu'"):
        biased_attention(query, key, value, backend="gpu")
    with pytest.raises(RuntimeError, match="backend 'cpu' cannot run this"):
        biased_attention(query.double(), key.double(), value.double(), backend="cpu")
    assert biased_attention(query.double(), key.double(), value.double()).dtype == torch.float64


def test_varlen_arguments_are_checked():
    query = torch.randn(5, 2, 8)
    sums = torch.tensor([0, 5])
    with pytest.raises(ValueError, match="cu_seqlens_q must be int32"):
        biased_attention_varlen(
            query, query, query, cu_seqlens_q=sums, cu_seqlens_k=sums, max_seqlen_q=5, max_seqlen_k=5
        )


@pytest.mark.parametrize("shape", [(), (4,), (3, 5), (1, 2, 5)])
def test_varlen_refuses_a_cause_of_another_shape(shape):
    query = torch.randn(5, 2, 8)
    sums = torch.tensor([0, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"cause must be \[M\] or \[H or 1, M\] with K = 5"):
        biased_attention_varlen(
            query,
            query,
            query,
            torch.rand(shape),
            cu_seqlens_q=sums,
            cu_seqlens_k=sums,
            max_seqlen_q=5,
            max_seqlen_k=5,
        )


@needs_cpu
@pytest.mark.parametrize("sums", [[0, 4], [1, 5], [0, 3, 2, 5], [0, 9]])
def test_varlen_refuses_sums_that_do_not_fit(sums):
    query = torch.randn(5, 2, 8)
    sums = torch.tensor(sums, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="cu_seqlens"):
        biased_attention_varlen(
            query, query, query, cu_seqlens_q=sums, cu_seqlens_k=sums, max_seqlen_q=9, max_seqlen_k=9
        )


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_cpu)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_varlen_equals_sequences_one_by_one(backend, dropout_p):
    lengths_q, lengths_k = [5, 0, 37, 3, 1], [9, 4, 37, 0, 1]  # the fourth without keys
    case = Case(batch=5, queries=37, keys=37, dim=12)
    (query, key, value, cause), _ = case.make()
    mask = torch.rand(5, 37, generator=torch.Generator().manual_seed(2)) > 0.2
    packed = (pack(query, lengths_q), pack(key, lengths_k), pack(value, lengths_k), pack(cause, lengths_k))
    sums = [torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (lengths_q, lengths_k)]
    options = {"strength": 0.5, "dropout_p": dropout_p, "seed": 9, "backend": backend}
    got = gradients(
        lambda *leaves: biased_attention_varlen(
            *leaves,
            cu_seqlens_q=sums[0],
            cu_seqlens_k=sums[1],
            max_seqlen_q=37,
            max_seqlen_k=37,
            key_mask=pack(mask, lengths_k),
            **options,
        ),
        packed,
    )

    def one_by_one(query, key, value, cause):
        outputs = []
        for index, (n, m) in enumerate(zip(lengths_q, lengths_k, strict=True)):
            # The earlier sequences stay in the batch, because the dropout bits depend on a sequence's index in it.
            rows = slice(0, index + 1)
            q = torch.stack([query.new_zeros(4, n, 12)] * index + [query[index, :, :n]])
            output = biased_attention(
                q,
                key[rows, :, :m],
                value[rows, :, :m],
                cause[rows, :m],
                key_mask=mask[rows, :m],
                **options,
            )
            outputs.append(output[index].transpose(0, 1))
        return torch.cat(outputs)

    expected = gradients(one_by_one, (query, key, value, cause))
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-6)
    for index, lengths in zip(range(1, 5), (lengths_q, lengths_k, lengths_k, lengths_k), strict=True):
        torch.testing.assert_close(got[index], pack(expected[index], lengths), rtol=1e-4, atol=1e-5)


@needs_cpu
def test_seed_from_torchs_generator():
    tensors, options = Case(dropout_p=0.5).make()
    options.pop("seed")
    torch.manual_seed(5)
    first = biased_attention(*tensors, **options)
    second = biased_attention(*tensors, **options)
    torch.manual_seed(5)
    assert torch.equal(first, biased_attention(*tensors, **options))
    assert not torch.equal(first, second)


@needs_cpu
def test_int_and_tensor_scalars_agree():
    arguments = tensors(dropout_p=0.3)
    as_ints = biased_attention(*arguments, dropout_p=0.3, seed=4, query_offset=2)
    as_tensors = biased_attention(*arguments, dropout_p=0.3, seed=torch.tensor(4), query_offset=torch.tensor(2))
    assert torch.equal(as_ints, as_tensors)


@needs_cpu
def test_compiles_into_one_graph_with_at_most_one_recompilation():
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()

    @torch.compile(backend=counter, fullgraph=True)
    def run(query, key, value, cause):
        return biased_attention(query, key, value, cause, strength=0.5).sum()

    for length in (11, 17, 23, 40, 64):
        query, key, value, cause = tensors(queries=length, keys=length)
        expected = biased_attention(query, key, value, cause, strength=0.5).sum()
        torch.testing.assert_close(run(query, key, value, cause), expected)
    assert counter.frame_count <= 2


@needs_cpu
def test_compiled_gradients_equal_eager_ones():
    torch._dynamo.reset()
    leaves = [tensor.detach().requires_grad_(True) for tensor in tensors(dropout_p=0.2)]

    def call(*arguments):
        return biased_attention(*arguments, strength=0.5, dropout_p=0.2, seed=6)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    eager_grads = torch.autograd.grad(call(*leaves).square().sum(), leaves)
    compiled_grads = torch.autograd.grad(compiled(*leaves).square().sum(), leaves)
    for eager, other in zip(eager_grads, compiled_grads, strict=True):
        torch.testing.assert_close(other, eager)


def test_bf16_cause_is_computed_in_fp32():
    query, key, value, cause = tensors()
    rounded = cause.bfloat16()
    expected = biased_attention(query, key, value, rounded.float())
    assert torch.equal(biased_attention(query, key, value, rounded), expected)


@needs_cpu
def test_no_gradient_for_what_needs_none():
    query, key, value, cause = tensors()
    query.requires_grad_(True)
    output = biased_attention(query, key, value, cause)
    output.sum().backward()
    assert query.grad is not None
    assert cause.grad is None


@needs_cpu
def test_a_second_derivative_is_refused():
    query, key, value = (torch.randn(1, 2, 5, 8, requires_grad=True) for _ in range(3))
    output = biased_attention(query, key, value, backend="cpu")
    (once,) = torch.autograd.grad(output.square().sum(), query, retain_graph=True)
    (recorded,) = torch.autograd.grad(output.square().sum(), query, create_graph=True)
    assert torch.equal(once, recorded)
    with pytest.raises(RuntimeError, match=r'not second derivatives; .*backend="reference"'):
        recorded.sum().backward()


def test_info_names_the_backends():
    text = str(empcause.info())
    assert "cpu" in text
    assert "reference" in text


def test_helpers_are_sound():
    assert len(measured(Case(cause_shape=None), "reference")) == 4


def test_shapes_are_known_whoever_imported_the_module_first():
    code = """
from empcause import _C
import torch
from empcause.ops.backends import info
assert info()["cpu"].runs
query = torch.empty(2, 3, 5, 4, device="meta")
options = (None, 1.0, None, None, None, None, 0, 0, True, 1.0, 0.0, None, None, True)
assert torch.ops.empcause_cpu.attention(query, query, query, *options)[0].shape == query.shape
"""
    subprocess.run([sys.executable, "-c", code], check=True)
