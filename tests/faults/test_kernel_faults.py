"""Faults of the kernels: reads outside of the tensors, numbers beyond the range of fp32, and loss of accuracy."""

from functools import partial

import pytest
import torch

from empcause.kernels import operators as triton_operators
from empcause.ops import biased_attention
from empcause.ops.reference import biased_attention_reference
from empcause.testing import gradients
from faults.kinds import Guard, fault
from ops.accuracy import against_torch
from ops.arguments import raw_arguments

OPERATORS, BACKWARD = "csrc/torch/operators.h", "csrc/cpu/backward.h"
REFERENCE, TRITON = "empcause/ops/reference.py", "kernels/operators.py"


def raw(name, backend="cpu", **changes):
    """Call a raw operator with valid arguments except for these changes, and return its results."""
    arguments = raw_arguments("empcause_cpu", name) | changes
    operator = getattr(torch.ops.empcause_cpu if backend == "cpu" else triton_operators, name)
    return operator(**arguments)


def inputs(queries=9):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, 2, rows, 16, generator=generator) for rows in (queries, 9, 9)]
    return (*tensors, torch.rand(1, 9, generator=generator))


def in_fp64(tensors):
    return gradients(lambda *leaves: biased_attention_reference(*leaves)[0], tuple(x.double() for x in tensors))


def on(backend, tensors):
    return gradients(partial(biased_attention, backend=backend), tensors)


@fault(
    Guard(OPERATORS, 'check_rows("grad_output", grad_output, dtype_, rows_, a_.num_heads);'),
    Guard(TRITON, 'self.check("grad_output", grad_output, self.dtype, shape)', "pass"),
    cause="a gradient of another shape than the output's",
    place="the raw operators, backward",
    promise="refused by name; nothing outside of the tensors is read, and the right gradient still goes through",
)
def test_grad_output_of_another_shape():
    for backend in ("cpu", "triton"):
        with pytest.raises(
            RuntimeError, match=r"grad_output must be float32 \[3, 4, 5, 8\] on cpu, not float32 \[3, 4, 4, 8\]"
        ):
            raw("attention_backward", backend, grad_output=torch.ones(3, 4, 4, 8))
    expected = raw("attention_backward")
    expanded = raw("attention_backward", grad_output=torch.ones(1).expand(3, 4, 5, 8))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(expanded, expected, strict=True))


@fault(
    Guard(TRITON, " or tensor.device != self.device:", ":"),
    cause="a mask on another device than the query",
    place="the raw operators of a GPU",
    promise="refused with both devices, before a kernel follows the address",
)
def test_a_tensor_on_another_device():
    with pytest.raises(RuntimeError, match=r"key_mask must be bool \[3, 7\] on cpu, not bool \[3, 7\] on meta"):
        raw("attention", "triton", key_mask=torch.ones(3, 7, dtype=torch.bool, device="meta"))


@fault(
    Guard(TRITON, '        _require(tensor.is_contiguous(), f"{name} must be contiguous")\n'),
    cause="a cause with gaps between its values",
    place="the raw operators",
    promise="refused by name, where its neighbours in memory would have been taken for its values",
)
def test_a_cause_with_gaps():
    gaps = torch.rand(3, 7, 2)[..., 0]
    for backend in ("cpu", "triton"):
        with pytest.raises(RuntimeError, match="cause must be contiguous"):
            raw("attention", backend, cause=gaps)


@fault(
    Guard(TRITON, '        _require(0.0 <= dropout_p < 1.0, "dropout_p must be in [0, 1)")\n'),
    cause="a dropout probability of 1, or none at all (NaN)",
    place="the raw operators",
    promise="refused, where everything would have been divided by 0",
)
def test_dropout_out_of_range():
    for backend in ("cpu", "triton"):
        for p in (1.0, -0.5, float("nan")):
            with pytest.raises(RuntimeError, match=r"dropout_p must be in \[0, 1\)"):
                raw("attention", backend, dropout_p=p)


@fault(
    Guard(REFERENCE, "torch.where(weight >= LARGE_WEIGHT,", "torch.where(weight > math.inf,"),
    cause="causes of 1e38, whose weights add up to more than fp32 holds",
    place="the operator, on every backend",
    promise="output and gradients are finite and those of fp64; a row that sees no such key keeps its digits",
)
def test_large_causes():
    query, key, value, cause = inputs()
    cause[0, 3:8] = 3e38
    truth = in_fp64((query, key, value, cause))
    for backend in ("cpu", "reference", "triton"):
        for expected, got in zip(truth[:4], on(backend, (query, key, value, cause)), strict=False):
            torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)


@fault(
    Guard(
        REFERENCE,
        "torch.where(exponent > log_total + LARGEST_EXPONENT, log_total + LARGEST_EXPONENT, exponent)",
        "exponent",
    ),
    Guard(
        REFERENCE, "log_total + LARGEST_EXPONENT, log_total + LARGEST_EXPONENT,", "LARGEST_EXPONENT, LARGEST_EXPONENT,"
    ),
    Guard(BACKWARD, "exp2(capped(relative + log2(inverse)))", "exp2(capped(relative)) * inverse"),
    cause="a key of weight 0 whose logit is hundreds above the others'",
    place="the gradient of its cause",
    promise="finite, and the same number on every backend: x - LSE counts as 80",
)
def test_the_cap_of_a_removed_key():
    query, key, value, cause = inputs()
    query, key = query.abs(), key.abs()
    key[:, :, 2] *= 500
    cause[0, 2] = -1.0
    truth = in_fp64((query, key, value, cause))[4]
    assert truth.isfinite().all()
    assert float(truth[0, 2].abs()) > 1e33
    for backend in ("cpu", "reference", "triton"):
        got = on(backend, (query, key, value, cause))[4]
        torch.testing.assert_close(got.double(), truth, rtol=1e-3, atol=1e-3)


@fault(
    Guard("empcause/ops/attention.py", "rounding,\n", "rounding * 0,\n"),
    cause="rows of attention that are nearly one-hot, in bf16 and fp16",
    place="the CPU's gradients",
    promise="they err at most 1.1 times as much as those of torch's attention, the worst seed at most twice",
)
def test_nearly_one_hot_rows_in_half_precision():
    for dtype in (torch.bfloat16, torch.float16):
        for scale in (1, 8):
            against_torch(dtype, scale, range(5))


@fault(
    Guard(BACKWARD, "alive ? maximum[i] :", "alive ? maximum[i] + 0x1p-20f :"),
    cause="rows of attention that are nearly one-hot, in fp32",
    place="the CPU's gradients",
    promise="they err at most 1.1 times as much as those of torch's attention, the worst seed at most twice",
)
def test_nearly_one_hot_rows_in_fp32():
    for scale in (1, 8):
        against_torch(torch.float32, scale, range(5))


@fault(
    Guard(
        BACKWARD,
        "if (!decodes(g.forward)) return backward_as<T>(g, parallel_for);",
        "if (g.forward.batch >= 0) return backward_as<T>(g, parallel_for);",
    ),
    cause="logits of 1e10, of which fp32 rounds away more than their differences, and few queries",
    place="the CPU's gradients",
    promise="the probabilities of the backward pass are those of the forward pass, and sum to 1",
)
def test_large_logits_of_few_queries():
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, rows, 64, generator=generator) * 2e4 for rows in (2, 30))
    value = torch.randn(1, 2, 30, 64, generator=generator)
    _, _, _, grad_value = on("cpu", (query, key, value))
    grad_output = torch.randn(1, 2, 2, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    torch.testing.assert_close(grad_value.double().sum(2), grad_output.sum(2), rtol=1e-5, atol=1e-5)
