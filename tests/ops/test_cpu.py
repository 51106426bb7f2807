"""The CPU kernels against fp64, over shapes, masks, strides and precisions."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.accuracy import against_torch
from ops.cases import Case, assert_close, exact, gradients, measured, pack
from ops.contract import EveryBackend

import empcause
from empcause.ops import biased_attention, biased_attention_varlen
from empcause.ops.philox import dropout_keep_mask

CPU = empcause.info()["cpu"]
if not CPU.runs and os.environ.get("EMPCAUSE_REQUIRE_CPU") != "1":
    pytest.skip(f"no CPU kernels: {CPU.reason}", allow_module_level=True)


class TestCpu(EveryBackend):
    backend = device = "cpu"


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
    assert_close(case, "cpu")


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
def test_notable_cases(case):
    assert_close(case, "cpu")


@pytest.mark.parametrize(("queries", "keys", "batch"), [(0, 5, 2), (5, 0, 2), (0, 0, 1), (4, 4, 0)])
def test_empty_inputs(queries, keys, batch):
    output, *grads = measured(Case(queries=queries, keys=keys, batch=batch, causal=False), "cpu")
    assert output.shape == (batch, 4, queries, 16)
    assert not output.any()
    assert all(not grad.any() for grad in grads)


def test_output_layout():
    tensors, options = Case().make()
    assert biased_attention(*tensors, **options, backend="cpu").transpose(1, 2).is_contiguous()


def test_nan_in_masked_keys_reaches_nothing():
    case = Case(masked=True, queries=40, keys=40)
    clean = measured(case, "cpu")
    (query, key, value, cause), options = case.make()
    hidden = ~options["key_mask"]
    key, value, cause = key.clone(), value.clone(), cause.clone()
    for tensor in (key, value):
        tensor.transpose(1, 2)[hidden] = float("nan")
    cause[hidden] = float("nan")
    got = gradients(lambda *leaves: biased_attention(*leaves, **options, backend="cpu"), (query, key, value, cause))
    for expected, actual in zip(clean, got, strict=True):
        assert torch.equal(expected, actual)


def test_nan_in_an_attended_key_is_seen():
    (query, key, value, cause), options = Case().make()
    key[0, 0, 3, 0] = float("nan")
    output = biased_attention(query, key, value, cause, **options, backend="cpu")
    assert output[0, 0, 3:].isnan().all()
    assert not output[0, 0, :3].isnan().any()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_removed_key(backend):
    """cause = -1 / strength gives weight 0: the key is gone exactly, yet its cause has a gradient."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 12, 8) for _ in range(3))
    strength = 0.3
    cause = torch.zeros(1, 12)
    cause[0, 4] = -1 / strength
    keep = torch.arange(12) != 4
    expected = biased_attention(query, key, value, key_mask=keep[None], backend=backend)
    poisoned_key, poisoned_value = key.clone(), value.clone()
    poisoned_key[:, :, 4], poisoned_value[:, :, 4] = float("nan"), float("nan")
    removed = biased_attention(query, poisoned_key, poisoned_value, cause, strength=strength, backend=backend)
    torch.testing.assert_close(removed, expected, rtol=0, atol=0 if backend == "cpu" else 1e-6)

    def loss(c):
        return biased_attention(
            query.double(), key.double(), value.double(), c, strength=strength, backend="reference"
        ).sum()

    step = torch.zeros(1, 12, dtype=torch.float64)
    step[0, 4] = 1e-6
    numeric = float((loss(cause.double() + 2 * step) - loss(cause.double())) / 2e-6)
    leaf = cause.clone().requires_grad_(True)
    output = biased_attention(query, key, value, leaf, strength=strength, backend=backend)
    grad = torch.autograd.grad(output.sum(), leaf)[0]
    assert float(grad[0, 4]) == pytest.approx(numeric, rel=1e-2, abs=1e-3)


def test_huge_logits_of_a_removed_key_stay_finite():
    query, key, value = torch.ones(1, 1, 3, 4), torch.ones(1, 1, 3, 4), torch.ones(1, 1, 3, 4)
    key[:, :, 0] = 500.0
    cause = torch.tensor([[-1.0, 0.0, 0.0]], requires_grad=True)
    output = biased_attention(query, key, value, cause, backend="cpu")
    assert torch.equal(output[0, 0, 0], torch.zeros(4)), "the only key of the first row is removed"
    grad = torch.autograd.grad(output.sum(), cause)[0]
    assert grad.isfinite().all()


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_bitwise_deterministic_over_threads(dropout_p):
    case = Case(batch=3, heads=6, key_heads=3, queries=200, keys=200, dim=24, dropout_p=dropout_p, masked=True)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            results.append(measured(case, "cpu"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_dropout_uses_the_common_bits():
    """With identical logits and one-hot values the output shows which probabilities survived."""
    keys, p, seed = 24, 0.4, 123
    query, key = torch.zeros(2, 3, 5, 24), torch.zeros(2, 3, keys, 24)
    value = torch.eye(24).expand(2, 3, keys, 24)
    output = biased_attention(query, key, value, causal=False, dropout_p=p, seed=seed, backend="cpu")
    keep = dropout_keep_mask(seed, p, 2, 3, 5, keys)
    torch.testing.assert_close(output, keep / keys / (1 - p))


def test_seed_from_torchs_generator():
    tensors, options = Case(dropout_p=0.5).make()
    options.pop("seed")
    torch.manual_seed(5)
    first = biased_attention(*tensors, **options)
    second = biased_attention(*tensors, **options)
    torch.manual_seed(5)
    assert torch.equal(first, biased_attention(*tensors, **options))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
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
            # Earlier sequences in the batch keep this one's number, which the dropout bits depend on.
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


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1, 4, 8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_errors_beside_those_of_torch(dtype, scale):
    """Queries times 16 make rows that are nearly one-hot."""
    against_torch(dtype, scale, range(100))


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512_bf16"])
def test_every_instruction_set(isa):
    """Each unit in a process of its own, over a few cases; skipped where the processor lacks it."""
    code = f"""
import os; os.environ["EMPCAUSE_CPU_ISA"] = {isa!r}
import empcause, torch
cpu = empcause.info()["cpu"]
if not cpu.runs:
    print("SKIP", cpu.reason); raise SystemExit
assert {isa!r} in cpu.reason
from ops.cases import Case, assert_close
for case in [Case(), Case(queries=70, keys=140, dim=33, masked=True, dropout_p=0.2), Case(dtype=torch.bfloat16, dim=64),
             Case(dtype=torch.float16), Case(causal=False, cause_shape="BHK", dim=5)]:
    assert_close(case, "cpu")
print("FINE")
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.path.dirname(os.path.dirname(__file__))},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    if done.stdout.startswith("SKIP"):
        pytest.skip(done.stdout)
    assert "FINE" in done.stdout


def test_unknown_instruction_set_is_refused():
    code = "import empcause; print(empcause.info())"
    environment = os.environ | {"EMPCAUSE_CPU_ISA": "mmx"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert "this processor runs" in done.stdout + done.stderr


def test_memory_is_linear():
    """4096 x 4096 logits of 8 heads would be 512 MiB in fp32; the kernel's whole process growth stays far below."""
    import resource

    tensors = [torch.randn(1, 8, 4096, 16, requires_grad=True) for _ in range(3)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    biased_attention(*tensors, torch.rand(1, 4096), backend="cpu").sum().backward()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 128 * 2**20


def test_half_precision_gradients_of_cause_are_accumulated_in_fp32():
    case = Case(dtype=torch.bfloat16, queries=128, keys=128, dim=32)
    got, truth = measured(case, "cpu")[4], exact(case)[4]
    assert got.dtype == torch.float32
    assert float((got.double() - truth).abs().max() / truth.abs().max()) < 0.02


def test_case_bound_can_fail():
    """The comparison itself notices a wrong result."""
    case = Case()
    wrong = replace(case, extra={"strength": 0.9})
    errors = [
        float((got.double() - expected).abs().max())
        for expected, got in zip(exact(case), measured(wrong, "cpu"), strict=True)
    ]
    assert min(errors) > 1e-3
