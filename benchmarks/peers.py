"""Causal attention with weighted keys: this package's backends, and the other ways to get it, on the same tensors.

A peer is prepared once for the inputs of a case (masks are made, functions compiled) and then called with query, key, value
and cause. A peer that cannot weigh keys computes another function: it is there to compare speed, and `weighted` is False.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import FlexKernelOptions, create_block_mask, flex_attention

from empcause import biased_attention, biased_attention_varlen
from empcause.benchmarks.shapes import Case
from empcause.errors import UserError

STRENGTH = 0.5
SEED = 7
# The logarithm of 0 where a mask is one more feature of the keys: far below all others, yet fp16 holds it.
HIDDEN = -3e4
FLEX = "flex score_mod"
FLEX_FLASH = "flex score_mod, FLASH"
PLAIN = "sdpa, no weights"
# Above this many keys, the mask of FlexAttention's blocks is made by compiled code, which has no matrix of all queries and keys.
MOST_KEYS_AS_MATRIX = 8192

Call = Callable[..., Tensor]


@dataclass
class Inputs:
    """Tensors of a case: `[B, H, N, D]`, or `[N, H, D]` if packed.

    Attributes:
        cause: `[B, K]`, or `[M]` if packed, in [0, 1].
        key_mask: `[B, K]` bool if padded.
        sums: `[B + 1]` int32 prefix sums of the lengths if packed.
    """

    case: Case
    query: Tensor
    key: Tensor
    value: Tensor
    cause: Tensor
    grad_output: Tensor
    key_mask: Tensor | None = None
    sums: Tensor | None = None

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value, self.cause


def make_inputs(case: Case, device: str, seed: int = 0) -> Inputs:
    """Draw the tensors of a case on a device."""
    generator = torch.Generator(device).manual_seed(seed)

    def random(heads: int, rows: int) -> Tensor:
        shape = (sum(case.lengths), heads, case.dim) if case.packed else (case.batch, rows, heads, case.dim)
        tensor = torch.randn(shape, generator=generator, device=device).to(case.dtype)
        return tensor if case.packed else tensor.transpose(1, 2)

    grad_output = random(case.heads, case.queries)
    if case.queries == case.keys and case.heads == case.key_heads:
        # As GPT-2's projection makes them: a token's query, key and value are neighbours.
        query, key, value = random(3 * case.heads, case.keys).chunk(3, dim=1)
    else:
        query = random(case.heads, case.queries)
        key, value = random(case.key_heads, case.keys), random(case.key_heads, case.keys)
    if case.decoding:
        key, value = key.contiguous(), value.contiguous()  # as a cache keeps them
    lengths = torch.tensor(case.lengths, device=device)
    shape = (int(lengths.sum()),) if case.packed else (case.batch, case.keys)
    cause = torch.rand(shape, generator=generator, device=device)
    inputs = Inputs(case, query, key, value, cause, grad_output)
    if case.padded:
        inputs.key_mask = torch.arange(case.keys, device=device) < lengths[:, None]
        # What comes back for padded queries counts nowhere.
        inputs.grad_output.mul_(inputs.key_mask[:, None, :, None])
    if case.packed:
        inputs.sums = nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    return inputs


@dataclass(frozen=True)
class Peer:
    """One way to compute attention.

    Attributes:
        name: in the results.
        prepare: makes the call for some inputs, with this dropout; raises if it cannot do them.
        weighted: whether keys are weighted (the same function), or not (there to compare speed only).
        cause_gradient: whether gradients of cause come back too.
        backward: whether it has a backward pass.
        ours: whether the package does it; then dropout is the seed's and can be checked.
    """

    name: str
    prepare: Callable[[Inputs, float], Call]
    weighted: bool = True
    cause_gradient: bool = True
    backward: bool = True
    ours: bool = False


def this_package(backend: str) -> Peer:
    """Return the peer of a backend of `biased_attention`."""

    def prepare(inputs: Inputs, dropout_p: float) -> Call:
        seed = torch.tensor(SEED, device=inputs.query.device)
        options: dict[str, Any] = {"strength": STRENGTH, "dropout_p": dropout_p, "seed": seed, "backend": backend}
        if not inputs.case.packed:
            return lambda *leaves: biased_attention(*leaves, key_mask=inputs.key_mask, **options)
        longest = max(inputs.case.lengths)
        options |= {"cu_seqlens_q": inputs.sums, "cu_seqlens_k": inputs.sums}
        options |= {"max_seqlen_q": longest, "max_seqlen_k": longest}
        return lambda *leaves: biased_attention_varlen(*leaves, **options)

    return Peer(f"empcause {backend}", prepare, ours=True)


def formula(
    query: Tensor, key: Tensor, value: Tensor, cause: Tensor, key_mask: Tensor | None, drop: Callable[[Tensor], Tensor]
) -> Tensor:
    """Compute the paper's formula step by step in the tensors' dtype: softmax, times the weights, renormalised."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    logits = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    logits = logits.masked_fill(_future(query.shape[2], key.shape[2], query.device), float("-inf"))
    if key_mask is not None:
        logits = logits.masked_fill(~key_mask[:, None, None], float("-inf"))
    weighted = logits.softmax(-1) * (1 + STRENGTH * cause[:, None, None]).to(query.dtype)
    return drop(weighted / weighted.sum(-1, keepdim=True)) @ value


def _eager(inputs: Inputs, dropout_p: float) -> Call:
    _refuse_packed(inputs)
    return lambda q, k, v, c: formula(q, k, v, c, inputs.key_mask, lambda p: nn.functional.dropout(p, dropout_p))


def _sdpa_weighted(kernel: SDPBackend) -> Callable[[Inputs, float], Call]:
    """torch's fused attention with the logarithms of the weights as mask; the mask is made beforehand, in the peer's favour."""

    def prepare(inputs: Inputs, dropout_p: float) -> Call:
        _refuse_packed(inputs)
        case = inputs.case
        mask = _log_weight(inputs.cause, inputs.key_mask)[:, None, None]
        future = _future(case.queries, case.keys, inputs.query.device)
        mask = mask.masked_fill(future, float("-inf")).to(case.dtype)

        def call(query: Tensor, key: Tensor, value: Tensor, cause: Tensor) -> Tensor:
            with sdpa_kernel(kernel):
                return nn.functional.scaled_dot_product_attention(
                    query, key, value, attn_mask=mask, dropout_p=dropout_p, enable_gqa=case.heads != case.key_heads
                )

        return call

    return prepare


def _sdpa_row(inputs: Inputs, dropout_p: float) -> Call:
    """The logarithms of the weights as a mask of one row, `[B, 1, 1, K]`, beside `is_causal`: torch's CPU kernel takes both."""
    _refuse_packed(inputs)
    case = inputs.case
    if case.queries not in (1, case.keys):
        raise ValueError("its causal mask is aligned at the first key")
    mask = _log_weight(inputs.cause, inputs.key_mask)[:, None, None].to(case.dtype)
    return lambda query, key, value, cause: nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout_p,
        is_causal=case.queries > 1,
        enable_gqa=case.heads != case.key_heads,
    )


def _sdpa_plain(kernel: SDPBackend | None) -> Callable[[Inputs, float], Call]:
    """torch's attention without weights, through one of its kernels; None: through the one that it chooses, as users call it."""

    def prepare(inputs: Inputs, dropout_p: float) -> Call:
        case = inputs.case
        # Padding on the right is out of sight of the real queries; a causal mask of one query hides nothing.
        if case.packed:
            return _varlen_plain(inputs, dropout_p, kernel)
        if case.queries not in (1, case.keys):
            raise ValueError("its causal mask is aligned at the first key")

        def call(query: Tensor, key: Tensor, value: Tensor, cause: Tensor) -> Tensor:
            with nullcontext() if kernel is None else sdpa_kernel(kernel):
                return nn.functional.scaled_dot_product_attention(
                    query,
                    key,
                    value,
                    dropout_p=dropout_p,
                    is_causal=case.queries > 1,
                    enable_gqa=case.heads != case.key_heads,
                )

        return call

    return prepare


def _varlen_plain(inputs: Inputs, dropout_p: float, kernel: SDPBackend | None) -> Call:
    if kernel not in (None, SDPBackend.FLASH_ATTENTION) or dropout_p:
        raise ValueError("torch packs sequences with FlashAttention and without dropout only")
    from torch.nn.attention.varlen import varlen_attn

    longest = max(inputs.case.lengths)
    options: dict[str, Any] = {"enable_gqa": True} if inputs.case.heads != inputs.case.key_heads else {}
    packing: tuple[Any, ...] = (inputs.sums, inputs.sums, longest, longest)

    def call(query: Tensor, key: Tensor, value: Tensor, cause: Tensor) -> Tensor:
        output = varlen_attn(query, key, value, *packing, window_size=(-1, 0), **options)
        assert isinstance(output, Tensor), "it returns more only where it is asked to"
        return output

    return call


def _flash_attn(inputs: Inputs, dropout_p: float) -> Call:
    """The package flash_attn, without weights."""
    package, case = import_module("flash_attn"), inputs.case
    if case.packed:
        longest = max(case.lengths)
        packing = (inputs.sums, inputs.sums, longest, longest)
        return lambda q, k, v, c: package.flash_attn_varlen_func(q, k, v, *packing, dropout_p=dropout_p, causal=True)

    def call(query: Tensor, key: Tensor, value: Tensor, cause: Tensor) -> Tensor:
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return package.flash_attn_func(query, key, value, dropout_p=dropout_p, causal=True).transpose(1, 2)

    return call


def _flex(compiled: bool, backend: str = "AUTO") -> Callable[[Inputs, float], Call]:
    """FlexAttention, the logarithm of the weight added by its score function.

    Args:
        compiled: make a kernel of it.
        backend: of FlexAttention. "FLASH" takes a score function that reads a tensor, but gives that tensor no gradient.
    """

    def prepare(inputs: Inputs, dropout_p: float) -> Call:
        if dropout_p:
            raise ValueError("FlexAttention has no dropout")
        options: Any = None
        if backend != "AUTO":
            if "BACKEND" not in FlexKernelOptions.__annotations__:
                raise ValueError(f"FlexAttention of torch {torch.__version__} has no choice of backends")
            options = {"BACKEND": backend}
        case, device = inputs.case, inputs.query.device
        queries, keys, offset = case.queries, case.keys, case.keys - case.queries
        sequence = None
        if case.packed:
            queries = keys = sum(case.lengths)
            sequence = torch.repeat_interleave(torch.tensor(case.lengths, device=device))

        def visible(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return q + offset >= k if sequence is None else (q >= k) & (sequence[q] == sequence[k])

        large = compiled and keys > MOST_KEYS_AS_MATRIX
        mask = create_block_mask(visible, None, None, queries, keys, device=device.type, _compile=large)

        def attend(query: Tensor, key: Tensor, value: Tensor, log_weight: Tensor) -> Tensor:
            if sequence is not None:
                query, key, value = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
                log_weight = log_weight[None]

            def weigh(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
                return score + log_weight[batch, k]

            grouped = case.heads != case.key_heads
            output = flex_attention(query, key, value, weigh, mask, enable_gqa=grouped, kernel_options=options)
            return output if sequence is None else output[0].transpose(0, 1)

        # On the CPU a score function can only read a tensor that is an input of the compiled function.
        on_cpu = device.type == "cpu"
        if compiled and on_cpu:
            attend = torch.compile(attend, dynamic=False, fullgraph=True)

        def call(query: Tensor, key: Tensor, value: Tensor, cause: Tensor) -> Tensor:
            return attend(query, key, value, _log_weight(cause, inputs.key_mask))

        return torch.compile(call, dynamic=False, fullgraph=True) if compiled and not on_cpu else call

    return prepare


def _folded(kernel: SDPBackend) -> Callable[[Inputs, float], Call]:
    """The logarithm of the weight as one more feature: `q' = [q, 1]`, `k' = [k, log w / scale]`, padded to a multiple of 8."""

    def prepare(inputs: Inputs, dropout_p: float) -> Call:
        _refuse_packed(inputs)
        case = inputs.case
        if case.queries not in (1, case.keys):
            raise ValueError("its causal mask is aligned at the first key")
        scale, fill = case.dim**-0.5, -(case.dim + 1) % 8

        def call(query: Tensor, key: Tensor, value: Tensor, cause: Tensor) -> Tensor:
            feature = _log_weight(cause, inputs.key_mask).clamp(min=HIDDEN * scale) / scale
            feature = feature[:, None, :, None].expand(*key.shape[:3], 1).to(key.dtype)
            ones = query.new_ones(()).expand(*query.shape[:3], 1)
            query = nn.functional.pad(torch.cat([query, ones], -1), (0, fill))
            key = nn.functional.pad(torch.cat([key, feature], -1), (0, fill))
            with sdpa_kernel(kernel):
                output = nn.functional.scaled_dot_product_attention(
                    query,
                    key,
                    nn.functional.pad(value, (0, fill + 1)),
                    dropout_p=dropout_p,
                    is_causal=case.queries > 1,
                    scale=scale,
                    enable_gqa=case.heads != case.key_heads,
                )
            return output[..., : case.dim]

        return call

    return prepare


def peers(backends: list[str], kernels: dict[str, SDPBackend], compiled: bool = True) -> list[Peer]:
    """Return all peers: these backends of the package, torch's attention through these kernels, FlexAttention, the formula.

    Args:
        backends: of `biased_attention`.
        kernels: torch's, by their names in the results.
        compiled: compile FlexAttention, which makes a kernel of it.
    """
    found = [this_package(backend) for backend in backends]
    found.append(Peer("eager formula", _eager))
    for name, kernel in kernels.items():
        found.append(Peer(f"folded, sdpa {name}", _folded(kernel)))
        if kernel != SDPBackend.FLASH_ATTENTION:  # it takes no mask
            found.append(Peer(f"sdpa {name}, log-weight mask", _sdpa_weighted(kernel), cause_gradient=False))
    for name, kernel in kernels.items():
        found.append(Peer(f"sdpa {name}, no weights", _sdpa_plain(kernel), weighted=False, cause_gradient=False))
    found.append(Peer(PLAIN, _sdpa_plain(None), weighted=False, cause_gradient=False))
    found.append(Peer("flash_attn, no weights", _flash_attn, weighted=False, cause_gradient=False))
    # The last, since they are compiled for every case.
    found.append(Peer(FLEX, _flex(compiled)))
    found.append(Peer(FLEX_FLASH, _flex(compiled, "FLASH"), cause_gradient=False))
    return found


KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "mem-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


def gpu_peers() -> list[Peer]:
    """Return all peers on a GPU; one that is not built or not installed says so when it is prepared."""
    return peers(["triton", "cuda"], KERNELS)


def cpu_peers() -> list[Peer]:
    """Return all peers on the CPU; the last, FlexAttention, has no backward pass there and is compiled for every case."""
    flash = SDPBackend.FLASH_ATTENTION
    return [
        this_package("cpu"),
        Peer("eager formula", _eager),
        Peer("folded, sdpa", _folded(flash)),
        Peer("sdpa, log-weight mask", _sdpa_weighted(flash), cause_gradient=False),
        Peer("sdpa, log-weight row", _sdpa_row, cause_gradient=False),
        Peer(PLAIN, _sdpa_plain(flash), weighted=False, cause_gradient=False),
        Peer(FLEX, _flex(compiled=True), cause_gradient=False, backward=False),
    ]


def check_names(names: Sequence[str] | None, every: Sequence[Peer]) -> None:
    """Check the names of peers that a user gave.

    Raises:
        UserError: one of them is no peer.
    """
    known = [peer.name for peer in every if not peer.ours]
    for name in names or []:
        if name not in known:
            raise UserError(f"There is no peer {name!r}; expected one of {', '.join(map(repr, known))}.")


def _log_weight(cause: Tensor, key_mask: Tensor | None) -> Tensor:
    log_weight = torch.log1p(STRENGTH * cause)
    return log_weight if key_mask is None else torch.where(key_mask, log_weight, float("-inf"))


def _future(queries: int, keys: int, device: torch.device) -> Tensor:
    position = torch.arange(queries, device=device)[:, None] + (keys - queries)
    return torch.arange(keys, device=device) > position


def _refuse_packed(inputs: Inputs) -> None:
    if inputs.case.packed:
        raise ValueError("it has no packed sequences")
