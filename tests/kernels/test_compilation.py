"""Every kind of call compiles for every architecture; the figures of what is shipped are benchmarks/results/resources.csv's.

The interpreter never compiles, so this runs in a process without it.
"""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.slow

CODE = """
import sys
import torch
from empcause.kernels.aot import launches

def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")

arch, dim, causal = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "causal"
batch, heads, key_heads, keys = 2, 6, 2, 100
compiled = 0
# Few queries go to the decoding kernels. Heads before rows, and rows that begin at no multiple of 16 elements.
CALLS = [
    (90, 0.0, False, False, True),
    (90, 0.1, True, True, True),
    (90, 0.1, False, False, False),
    (2, 0.0, False, True, True),
    (2, 0.0, True, False, True),
    (2, 0.0, False, False, False),
]
for queries, dropout_p, packed, per_head, weighted in CALLS:
    query = meta(batch, heads, queries, dim + 1, dtype=torch.bfloat16)[..., 1:]
    key = meta(batch, key_heads, keys, dim, dtype=torch.bfloat16)
    cause, key_mask = meta(batch, keys), None if per_head else meta(batch, keys, dtype=torch.bool)
    offset, sums, longest = meta(dtype=torch.int64), None, (0, 0)
    if packed:
        query, key = query.transpose(1, 2).flatten(0, 1), key.transpose(1, 2).flatten(0, 1)
        cause, key_mask, offset = cause.flatten(), None if per_head else key_mask.flatten(), None
        sums, longest = meta(batch + 1, dtype=torch.int32), (queries, keys)
    if not weighted:
        cause = key_mask = None
    calls = launches(
        arch,
        weighted,
        query=query,
        key=key,
        value=key,
        cause=cause,
        strength=0.5,
        head_strength=meta(heads) if per_head else None,
        key_mask=key_mask,
        cu_seqlens_q=sums,
        cu_seqlens_k=sums,
        max_seqlen_q=longest[0],
        max_seqlen_k=longest[1],
        causal=causal,
        scale=0.1,
        dropout_p=dropout_p,
        seed=meta(dtype=torch.int64) if dropout_p else None,
        query_offset=offset,
    )
    for launch in calls.values():
        kernel = launch.compiled(arch)
        assert kernel.metadata.shared <= {80: 163, 86: 99, 90: 227, 100: 227}[arch] * 1024, kernel.name
        compiled += 1
print(compiled, "compiled")
"""


@pytest.mark.parametrize("causal", ["causal", "every key"])
@pytest.mark.parametrize("dim", [15, 80, 256])
@pytest.mark.parametrize("arch", [80, 86, 90, 100])
def test_every_kind_of_call(arch, dim, causal):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", CODE, str(arch), str(dim), causal]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "compiled" in done.stdout
