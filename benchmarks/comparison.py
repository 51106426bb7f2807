"""One case of attention: its peers are checked, then those that are right are timed in turn."""

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from empcause.benchmarks.figures import Row
from empcause.benchmarks.gate import Gate, first_sentence
from empcause.benchmarks.peers import Inputs, Peer, make_inputs
from empcause.benchmarks.shapes import Case
from empcause.benchmarks.timing import ROUNDS_SECONDS, Stopwatch


@dataclass(frozen=True)
class Yardstick:
    """Something that shows what the machine does at most, timed in turn with the peers.

    Attributes:
        run: does `work` FLOPs, or reads as many bytes.
        needs: how much of that a case takes, for a direction.
    """

    name: str
    run: Callable[[], object]
    work: float
    needs: Callable[[Case, str], float]


def directions(inputs: Inputs, peer: Peer, call: Callable[..., torch.Tensor]) -> dict[str, Callable[[], object]]:
    """What is timed of a peer."""

    def forward() -> None:
        with torch.no_grad():
            call(*inputs.leaves)

    def with_gradients(number: int) -> Callable[[], object]:
        leaves = [leaf.detach().requires_grad_(index < number) for index, leaf in enumerate(inputs.leaves)]
        return lambda: torch.autograd.grad(call(*leaves), leaves[:number], inputs.grad_output)

    found: dict[str, Callable[[], object]] = {"forward": forward}
    if peer.backward and not inputs.case.decoding:
        found["forward+backward"] = with_gradients(3)
        if peer.weighted and peer.cause_gradient:
            found["forward+backward+cause"] = with_gradients(4)
    return found


def time_case(
    case: Case,
    candidates: list[Peer],
    device: str,
    stopwatch: Stopwatch,
    seconds: float = float("inf"),
    patience: float = float("inf"),
    rounds_seconds: float = ROUNDS_SECONDS,
    yardstick: Yardstick | None = None,
) -> Iterator[Row]:
    """Check the peers on a case, as many as the seconds suffice for, then time those that are right, in turn.

    Args:
        patience: a peer whose check takes longer than this many seconds is left out.
        rounds_seconds: what timing one direction may take.
        yardstick: gets a row of the time that it would take for this case.
    """
    begun = time.monotonic()
    torch.compiler.reset()
    inputs = make_inputs(case, device)
    gate = Gate(inputs)
    name = f"{case.name}, {str(case.dtype).removeprefix('torch.')}"
    calls: dict[str, dict[str, Callable[[], object]]] = {}
    for peer in candidates:
        verdict: str | None = "not reached"
        if time.monotonic() - begun < seconds:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # a peer that refuses also says so in an error
                    call = peer.prepare(inputs, case.dropout_p)
                    checked = time.monotonic()
                    verdict = gate.verdict(peer, call)
                    checked = time.monotonic() - checked
                    if verdict is None and checked > patience and not peer.ours:
                        verdict = f"right, but too slow: its check took {checked:.0f} s"
                    if verdict is None:
                        for direction, timed in directions(inputs, peer, call).items():
                            timed()
                            calls.setdefault(direction, {})[peer.name] = timed
            except Exception as error:  # peers refuse in many ways
                verdict = f"does not run: {first_sentence(error)}"
        if verdict is not None:
            yield Row("attention", name, "all", peer.name, peer.weighted, verdict)
    weighted = {peer.name: peer.weighted for peer in candidates}
    for direction, found in calls.items():
        if yardstick is not None:
            found[yardstick.name] = yardstick.run
        for peer_name, timing in stopwatch.interleave(found, rounds_seconds).items():
            if yardstick is not None and peer_name == yardstick.name:
                timing = timing.scaled(yardstick.needs(case, direction) / yardstick.work)
            gflops = case.flops(direction) / timing.median / 1e6
            same = weighted.get(peer_name, False)
            yield Row("attention", name, direction, peer_name, same, "ok", timing, gflops, shape=case)
