"""The cases of `empcause bench` under pytest-benchmark: `pytest benchmarks --benchmark-only`, with `-k` to choose.

Each peer is first judged on the very tensors that are timed; one that is wrong fails, one that cannot run is skipped. Compare
within one run, as ratios: the machine's speed cancels.
"""

from functools import lru_cache
from typing import Any

import pytest

from empcause.benchmarks import cpu
from empcause.benchmarks.comparison import Prepared, prepare

PEERS = {peer.name: peer for peer in cpu.chosen_peers()}
CASES = {f"{case.name}|{dtype}": case for dtype in cpu.DTYPES for case in cpu.chosen_cases(dtypes=[dtype])}


@lru_cache(maxsize=1)
def prepared(case: str, peer: str) -> list[Prepared]:
    """Return what can be timed of a peer, kept for the next direction."""
    return list(prepare(CASES[case], [PEERS[peer]], "cpu"))


@pytest.mark.parametrize("direction", ["forward", "forward+backward", "forward+backward+cause"])
@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("case", CASES)
def test_attention(benchmark: Any, case: str, peer: str, direction: str) -> None:
    found = prepared(case, peer)
    for item in found:
        if item.refused and not item.peer.ours:
            pytest.skip(item.status)
        assert item.status == "ok"
    calls = {item.direction: item.call for item in found}
    if direction not in calls:
        pytest.skip(f"{peer} has no {direction} here")
    benchmark.group = f"{case}, {direction}"
    benchmark(calls[direction])
