"""The CPU kernels beside the eager formula and torch's own attention: `pytest benchmarks --benchmark-only`.

Each case is first checked against fp64; a case that is wrong is not timed. Compare within one run, as ratios: the machine's speed
cancels.
"""

import pytest
import torch

from empcause import biased_attention
from empcause.ops.reference import biased_attention_reference

# batch, heads, key heads, length, head size
SHAPES = {
    "train 8x12x64x64": (8, 12, 12, 64, 64),
    "train 16x12x128x64": (16, 12, 12, 128, 64),
    "grouped 8x9/3x128x64": (8, 9, 3, 128, 64),
    "long 1x12x1024x64": (1, 12, 12, 1024, 64),
}
STRENGTH = 0.5


def eager_formula(query, key, value, cause):
    """What engineers write today: eager probabilities, multiplied and renormalised."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    logits = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    future = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
    probability = logits.masked_fill(future, float("-inf")).softmax(-1)
    biased = probability * (1 + STRENGTH * cause[:, None, None]).to(query.dtype)
    return (biased / biased.sum(-1, keepdim=True)) @ value


def sdpa_log_bias(query, key, value, cause):
    """torch's fused attention with the bias as an additive mask (no gradient of cause is asked for)."""
    length = query.shape[2]
    future = torch.full((length, length), float("-inf")).triu(1)
    mask = future + torch.log1p(STRENGTH * cause)[:, None, None].to(query.dtype)
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask.to(query.dtype), enable_gqa=True
    )


def fused(query, key, value, cause):
    """This package."""
    return biased_attention(query, key, value, cause, strength=STRENGTH, backend="cpu")


PEERS = {"empcause": fused, "eager formula": eager_formula, "sdpa with log bias": sdpa_log_bias}


CASES = [
    pytest.param(peer, direction, shape, dtype, id=f"{peer}|{direction}|{shape}|{name}")
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    for shape in SHAPES
    for direction in ("forward", "forward+backward")
    for peer in PEERS
]


@pytest.mark.parametrize(("peer", "direction", "shape", "dtype"), CASES)
def test_attention(benchmark, peer, direction, shape, dtype):
    call = PEERS[peer]
    batch, heads, key_heads, length, dim = SHAPES[shape]
    torch.manual_seed(0)
    query = torch.randn(batch, heads, length, dim).to(dtype)
    key, value = (torch.randn(batch, key_heads, length, dim).to(dtype) for _ in range(2))
    cause = torch.rand(batch, length)
    expected = biased_attention_reference(query.double(), key.double(), value.double(), cause, strength=STRENGTH)[0]
    error = float((call(query, key, value, cause).double() - expected).abs().max())
    assert error < (1e-4 if dtype == torch.float32 else 0.05)
    leaves = [tensor.requires_grad_(True) for tensor in (query, key, value)]
    grad_output = torch.randn(batch, heads, length, dim).to(dtype)

    def run():
        if direction == "forward":
            with torch.no_grad():
                call(query, key, value, cause)
        else:
            torch.autograd.grad(call(query, key, value, cause), leaves, grad_output)

    benchmark.group = f"{direction}, {dtype}, {shape}"
    benchmark.extra_info["error"] = error
    benchmark(run)
