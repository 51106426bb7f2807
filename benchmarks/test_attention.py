"""The cases of `empcause bench` under pytest-benchmark: `pytest benchmarks --benchmark-only`, with `-k` to choose.

Each peer is first checked against fp64 on the very tensors that are timed; one that is wrong fails, one that cannot run is
skipped. Compare within one run, as ratios: the machine's speed cancels.
"""

from dataclasses import replace

import pytest

from empcause.benchmarks.comparison import directions
from empcause.benchmarks.cpu import DTYPES, SUITES
from empcause.benchmarks.gate import Gate, first_sentence
from empcause.benchmarks.peers import FLEX, cpu_peers, make_inputs

PEERS = {peer.name: peer for peer in cpu_peers() if peer.name != FLEX}
CASES = {
    f"{case.name}|{name}": replace(case, dtype=dtype)
    for cases in SUITES.values()
    for case in cases
    for name, dtype in DTYPES.items()
}


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("direction", ["forward", "forward+backward", "forward+backward+cause"])
@pytest.mark.parametrize("case", CASES)
def test_attention(benchmark, case, direction, peer):
    inputs = make_inputs(CASES[case], "cpu")
    try:
        call = PEERS[peer].prepare(inputs, inputs.case.dropout_p)
        verdict = Gate(inputs).verdict(PEERS[peer], call)
    except (RuntimeError, ValueError) as error:
        if PEERS[peer].ours:
            raise
        pytest.skip(first_sentence(error))
    assert verdict is None
    timed = directions(inputs, PEERS[peer], call)
    if direction not in timed:
        pytest.skip(f"{peer} has no {direction} here")
    benchmark.group = f"{case}, {direction}"
    benchmark(timed[direction])
