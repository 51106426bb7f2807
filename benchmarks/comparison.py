"""One case of attention: every peer is judged, then those that are right are timed in turn."""

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from empcause.benchmarks.figures import Row
from empcause.benchmarks.gate import Gate, first_sentence
from empcause.benchmarks.peers import Inputs, Peer, make_inputs
from empcause.benchmarks.shapes import Case
from empcause.benchmarks.timing import ROUNDS_SECONDS, Stopwatch, capability


@dataclass(frozen=True)
class Limit:
    """Work that shows the most that the machine does, timed in turn with the peers.

    Attributes:
        run: does `work` FLOPs, or reads as many bytes.
        needs: how much of that work a case takes, for a direction.
    """

    name: str
    run: Callable[[], object]
    work: float
    needs: Callable[[Case, str], float]


@dataclass(frozen=True)
class Prepared:
    """One direction of a peer, judged and ready to be timed; or the reason why there is nothing to time.

    Attributes:
        direction: "forward", "forward+backward", "forward+backward+cause" (with the gradient of cause); "all" without a call.
        call: what is timed. None: see `status`.
        status: "ok", or why there is no call.
        refused: whether the peer itself raised an error.
    """

    peer: Peer
    direction: str
    call: Callable[[], object] | None
    status: str = "ok"
    refused: bool = False


def directions(inputs: Inputs, peer: Peer, call: Callable[..., Tensor]) -> dict[str, Callable[[], object]]:
    """Return what can be timed of a peer, by direction."""

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


def prepare(
    case: Case,
    peers: Sequence[Peer],
    device: str,
    seconds: float = float("inf"),
    patience: float = float("inf"),
    warm: bool = True,
) -> Iterator[Prepared]:
    """Judge peers on the very tensors that are timed, and yield every direction of those that are right.

    Args:
        seconds: after this many, peers that are left are not judged.
        patience: a peer of others whose check takes longer than this many seconds is left out.
        warm: call every direction once.
    """
    begun = time.monotonic()
    torch.compiler.reset()
    inputs = make_inputs(case, device)
    gate = Gate(inputs)
    for peer in peers:
        if time.monotonic() - begun >= seconds:
            yield Prepared(peer, "all", None, "not reached")
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a peer that refuses also says so in an error
                call = peer.prepare(inputs, case.dropout_p)
                checked = time.monotonic()
                wrong = gate.verdict(peer, call)
                checked = time.monotonic() - checked
                if wrong is None and checked > patience and not peer.ours:
                    wrong = f"right, but too slow: its check took {checked:.0f} s"
                found = directions(inputs, peer, call) if wrong is None else {}
                for timed in found.values() if warm else ():
                    timed()
        except ModuleNotFoundError as error:
            yield Prepared(peer, "all", None, f"not installed: {error.name}", refused=True)
            continue
        except Exception as error:  # peers refuse in many ways
            yield Prepared(peer, "all", None, f"does not run: {first_sentence(error)}", refused=True)
            continue
        if wrong is not None:
            yield Prepared(peer, "all", None, wrong)
        yield from (Prepared(peer, direction, timed) for direction, timed in found.items())


def time_case(
    case: Case,
    peers: Sequence[Peer],
    device: str,
    stopwatch: Stopwatch,
    seconds: float = float("inf"),
    patience: float = float("inf"),
    rounds_seconds: float = ROUNDS_SECONDS,
    limit: Limit | None = None,
    section: str = "attention",
) -> Iterator[Row]:
    """Judge the peers (see `prepare`), then time those that are right, in turn; what is not timed has a row with the reason.

    Args:
        rounds_seconds: what timing one direction may take.
        limit: gets a row with the time that it would take for the work of this case.
        section: of the rows. Rates are counted in the section "attention" alone.
    """
    kind: dict[str, Any] = {"capability": capability(device), "dtype": case.dtype_name, "head_dim": case.dim}
    calls: dict[str, dict[str, Callable[[], object]]] = {}
    for item in prepare(case, peers, device, seconds, patience):
        if item.call is None:
            identity = (section, case.title, item.direction, item.peer.name, item.peer.weighted, item.status)
            yield Row(*identity, shape=case, **kind)
        else:
            calls.setdefault(item.direction, {})[item.peer.name] = item.call
    weighted = {peer.name: peer.weighted for peer in peers}
    for direction, found in calls.items():
        if limit is not None:
            found[limit.name] = limit.run
        for peer_name, timing in stopwatch.interleave(found, rounds_seconds).items():
            if limit is not None and peer_name == limit.name:
                timing = timing.scaled(limit.needs(case, direction) / limit.work)
            gflops = case.flops(direction) / timing.median / 1e6 if section == "attention" else None
            identity = (section, case.title, direction, peer_name, weighted.get(peer_name, False), "ok")
            yield Row(*identity, timing, gflops, shape=case, **kind)
