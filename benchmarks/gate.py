"""A check of every peer before it is timed: outputs and gradients against fp64, on the very tensors that are timed."""

from collections.abc import Sequence

import torch
from torch import Tensor

from empcause.benchmarks.peers import SEED, STRENGTH, Call, Inputs, Peer, formula
from empcause.benchmarks.shapes import Case
from empcause.ops.philox import dropout_keep_mask
from empcause.ops.reference import biased_attention_reference
from empcause.testing import disagreement, gradients

ROWS = 512  # of keys, that are judged at least: few values have no error of typical size
# Of sequences with more keys than this, the last rows alone are judged: no earlier query sees the last keys, so that the exact
# gradients of these keys follow from the last queries.
LONGEST = 8192
LAST_ROWS = 256


class Gate:
    """Judges peers on the very tensors that are timed.

    The last sequences of the batch are compared, without their padding, of long ones the last rows. Dropout is checked where its
    bits are known, that is in this package; other peers are checked without it. Decoding and some peers have no backward pass.
    """

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self._expected: dict[tuple[bool, float], tuple[list[Tensor], list[Tensor]]] = {}

    def verdict(self, peer: Peer, call: Call) -> str | None:
        """Say what is wrong with a peer, whose `call` was prepared with the case's dropout; None if nothing is."""
        case = self.inputs.case
        dropout_p = case.dropout_p if peer.ours else 0.0
        if dropout_p != case.dropout_p:
            call = peer.prepare(self.inputs, dropout_p)
        if case.decoding or not peer.backward:
            with torch.no_grad():
                got = [call(*self.inputs.leaves)]
        else:
            number = 4 if peer.weighted and peer.cause_gradient else 3
            got = gradients(call, self.inputs.leaves, self.inputs.grad_output, number)
        key = peer.weighted, dropout_p
        if key not in self._expected:
            truth, plain = (
                _joined([_expected(self.inputs, index, dropout_p, peer.weighted, dtype) for index in _judged(case)])
                for dtype in (torch.float64, None)
            )
            self._expected[key] = truth, plain
        truth, plain = self._expected[key]
        judged = _joined([_last_rows(case, _sequence(case, got, index)) for index in _judged(case)])
        return disagreement(truth, judged, plain, case.dtype)


def first_sentence(error: BaseException) -> str:
    """Return the first line of an error's message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:160]


def _judged(case: Case) -> list[int]:
    """Return the numbers of the last sequences of the batch, as many as it takes to have `ROWS` keys."""
    last = case.batch - 1
    while last > 0 and sum(case.lengths[last:]) < ROWS:
        last -= 1
    return list(range(last, case.batch))


def _sequence(case: Case, tensors: Sequence[Tensor], index: int) -> list[Tensor]:
    """Return one sequence's part of tensors like query or cause, without padding: `[1, H, N, D]` or `[1, N]`."""
    length = case.lengths[index]
    if case.packed:
        rows = slice(sum(case.lengths[:index]), sum(case.lengths[: index + 1]))
        return [(x[rows].transpose(0, 1) if x.dim() == 3 else x[rows])[None] for x in tensors]
    return [x[index, None, :, :length] if x.dim() == 4 else x[index, None, :length] for x in tensors]


def _last_rows(case: Case, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return of a sequence's tensors `[1, H, N, D]` or `[1, N]` the rows that are judged."""
    if case.queries != case.keys or case.keys <= LONGEST or case.dropout_p:
        return list(tensors)
    return [x[:, :, -LAST_ROWS:] if x.dim() == 4 else x[:, -LAST_ROWS:] for x in tensors]


def _joined(sequences: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Return the tensors `[1, H, N, D]` and `[1, N]` of several sequences as one each: `[rows, D]` and `[rows]`."""
    return [
        torch.cat([x.flatten(0, -2) if x.dim() == 4 else x[0] for x in same]) for same in zip(*sequences, strict=True)
    ]


def _expected(inputs: Inputs, index: int, dropout_p: float, weighted: bool, dtype: torch.dtype | None) -> list[Tensor]:
    """Return output and gradients for one sequence, of a long one for the rows that are judged.

    Args:
        dtype: of the reference; None: the formula in plain torch in the dtype of the case.
    """
    case = inputs.case
    *tensors, cause, grad_output = _sequence(case, (*inputs.leaves, inputs.grad_output), index)
    tensors[0], grad_output = _last_rows(case, [tensors[0], grad_output])
    cause = cause if weighted else torch.zeros_like(cause)
    keep = torch.ones((), dtype=torch.bool, device=cause.device).expand(1, case.heads, 1, 1)
    if dropout_p:
        shape = (case.batch, case.heads, tensors[0].shape[2], tensors[1].shape[2])
        keep = dropout_keep_mask(SEED, dropout_p, *shape, device=cause.device)[index, None]
    group = case.heads // case.key_heads
    parts: list[list[Tensor]] = []
    for head in range(case.key_heads):
        rows = slice(head * group, (head + 1) * group)
        kept = keep[:, rows]

        def exactly(*leaves: Tensor, kept: Tensor = kept) -> Tensor:
            return biased_attention_reference(*leaves, strength=STRENGTH, dropout_p=dropout_p, keep=kept)[0]

        def plainly(query: Tensor, key: Tensor, value: Tensor, cause: Tensor, kept: Tensor = kept) -> Tensor:
            return formula(query, key, value, cause, None, lambda probability: probability * kept / (1 - dropout_p))

        leaves = (tensors[0][:, rows], tensors[1][:, head : head + 1], tensors[2][:, head : head + 1], cause)
        grad = grad_output[:, rows]
        if dtype is None:
            parts.append(gradients(plainly, leaves, grad))
        else:
            parts.append(gradients(exactly, [leaf.to(dtype) for leaf in leaves], grad.to(dtype)))
    heads = [torch.cat(tensors, 1) for tensors in list(zip(*parts, strict=True))[:4]]
    return _last_rows(case, [*heads, torch.stack([part[4] for part in parts]).sum(0)])
