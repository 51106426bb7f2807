"""The operator: its two public functions, argument checks, autograd in eager mode."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from empcause.ops.backends import DTYPES
from empcause.ops.choice import choose_backend
from empcause.ops.reference import SMALLEST_WEIGHT, biased_attention_reference
from empcause.ops.torch_internals import (
    all_samples,
    assert_async,
    below_autograd,
    dispatch_modes_active,
    forward_mode_active,
    transforms_active,
    without_wrapper,
)
from empcause.ops.varlen import biased_attention_varlen_reference

MAX_HEAD_DIM = 256
DENSE = torch.strided
LARGEST_SCALE = 1e38  # so that fp32 holds it, in powers of two as well


def biased_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cause: Tensor | None = None,
    *,
    strength: float | Tensor = 1.0,
    key_mask: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    query_offset: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention whose probabilities are multiplied by a weight per key and renormalised (eq 14-18 of the paper).

    `output_i = sum_j b_ij v_j` with `b_ij` proportional to `w_j exp(scale * q_i . k_j)` and
    `w_j = key_mask_j * (1 + strength * cause_j)`. One pass over the keys, memory linear in their number; gradients of
    query, key, value and cause. Accumulates in fp32; bitwise deterministic.

    Derivatives: the kernels have first ones in reverse mode, within `torch.func` and `torch.vmap` too (which runs them sample by
    sample). Forward mode and second derivatives are refused; backend="reference" has them all, that of strength included.

    Args:
        query: `[B, H, Q, D]` fp32, bf16 or fp16 (fp64 on the backend "reference"); any strides. D is at most 256.
        key, value: `[B, Hkv, K, D]`, Hkv divides H.
        cause: `[B or 1, K]` or `[B or 1, H or 1, K]`, floating; finite with `1 + strength * cause >= 0` where key_mask is
            True, ignored elsewhere. None: no bias.
        strength: a number, or `[H]`, one per head; a gradient only on the backend "reference", else refused.
        key_mask: `[B, K]` bool, True = may be attended. None: all.
        causal: query i sees keys j <= i + query_offset.
        scale: factor of the logits; default `D ** -0.5`.
        dropout_p: probability that a renormalised attention probability is dropped, in [0, 1).
        seed: int of 64 bits or 0-d int64 tensor, decides the dropout; None draws one from torch's default generator of
            the tensors' device, so that each replay of a CUDA graph drops other probabilities.
        query_offset: int or 0-d int64 tensor, position of query 0 among the keys; default K - Q. Unused unless causal.
        backend: "cpu", "triton", "cuda" or "reference"; default is that of `use_backend`, else the best one for these tensors.

    Returns:
        `[B, H, Q, D]`, laid out so that `output.transpose(1, 2)` is contiguous. Rows that see no key are 0.

    Raises:
        ValueError: an argument of wrong shape, dtype, device or range.
        RuntimeError: a backend that is not there, a cause whose value is not allowed, or a derivative that the backend lacks.
    """
    return _attention(
        query, key, value, cause, strength, key_mask, None, causal, scale, dropout_p, seed, query_offset, backend
    )


def biased_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cause: Tensor | None = None,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    strength: float | Tensor = 1.0,
    key_mask: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`biased_attention` over packed sequences: no padding, and no sequence sees another.

    Args:
        query: `[N, H, D]`, all sequences one after another.
        key, value: `[M, Hkv, D]`.
        cause: `[M]` or `[H or 1, M]`.
        cu_seqlens_q, cu_seqlens_k: `[sequences + 1]` int32, where each sequence starts; from 0 to N (M).
        max_seqlen_q, max_seqlen_k: bounds of the sequences' lengths. The backends "cpu" and "reference" refuse sums and bounds
            that do not hold; a GPU's kernels would have to be waited for, so there what they leave out is undefined, though
            nothing outside is touched.
        key_mask: `[M]` bool.
        strength, causal, scale, dropout_p, seed, backend: see `biased_attention`. Causal alignment is bottom-right in each
            sequence; dropout counts batch, rows and keys per sequence, so packing changes nothing.

    Returns:
        `[N, H, D]`, contiguous.

    Raises:
        ValueError, RuntimeError: see `biased_attention`.
    """
    packing = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return _attention(
        query, key, value, cause, strength, key_mask, packing, causal, scale, dropout_p, seed, None, backend
    )


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cause: Tensor | None,
    strength: float | Tensor,
    key_mask: Tensor | None,
    packing: tuple[Tensor, Tensor, int, int] | None,
    causal: bool,
    scale: float | None,
    dropout_p: float,
    seed: int | Tensor | None,
    query_offset: int | Tensor | None,
    backend: str | None,
) -> Tensor:
    """Computes both public functions. `packing` has the prefix sums and the longest lengths of packed sequences, or is None."""
    packed = packing is not None
    shape, key_shape, dtype, device = _check_tensors(query, key, value, packed)
    # Packed sequences have one axis of rows in the place of two.
    batch, heads, keys = () if packed else (shape[0],), shape[1], key_shape[0 if packed else 2]
    scale = shape[-1] ** -0.5 if scale is None else scale
    _check_options(strength, causal, scale, dropout_p, heads, device)
    _check_cause(cause, batch, heads, keys, device)
    _check_mask(key_mask, batch, keys, device)
    if packing is not None:
        _check_packing(*packing, device)
    seed = _seed(seed, dropout_p, device)
    offset = None if query_offset is None else _scalar("query_offset", query_offset, 62, device)
    backend = choose_backend(backend, device, dtype, shape[-1])
    if backend == "reference":
        return _reference(query, key, value, cause, strength, key_mask, packing, causal, scale, dropout_p, seed, offset)
    if cause is not None:
        cause = (cause if cause.dtype == torch.float32 else cause.to(torch.float32)).contiguous()
    strength, head_strength = _kernel_strength(strength)
    key_mask = None if key_mask is None else key_mask.contiguous()
    cu_q, cu_k, max_q, max_k = (None, None, 0, 0) if packing is None else packing
    if cu_q is not None and cu_k is not None:
        cu_q, cu_k = cu_q.contiguous(), cu_k.contiguous()
    others = (strength, head_strength, key_mask, cu_q, cu_k, max_q, max_k, causal, scale, dropout_p, seed, offset)
    # Eager mode uses a `torch.autograd.Function`, which takes a third of a registered formula's time; compilers, `torch.func` and
    # forward mode need the registered one (`registration.py`).
    if torch.compiler.is_compiling() or transforms_active() or forward_mode_active():
        operator = getattr(torch.ops, f"empcause_{backend}").attention.default
        return operator(query, key, value, cause, *others, torch.is_grad_enabled())[0]
    operators = _operators(backend)
    if torch.is_grad_enabled() and _needs_grad(query, key, value, cause):
        # torch inspects each argument, but not what is in a tuple, which saves time.
        return _Attention.apply(operators, query, key, value, cause, others)
    with below_autograd():
        return operators[0](query, key, value, cause, *others, False)[0]


def _reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cause: Tensor | None,
    strength: float | Tensor,
    key_mask: Tensor | None,
    packing: tuple[Tensor, Tensor, int, int] | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    offset: Tensor | None,
) -> Tensor:
    options: dict[str, Any] = {
        "strength": strength,
        "key_mask": key_mask,
        "causal": causal,
        "scale": scale,
        "dropout_p": dropout_p,
        "seed": seed,
    }
    if packing is None:
        check_key_weights(cause, strength, key_mask)
        return biased_attention_reference(query, key, value, cause, query_offset=offset, **options)[0]
    check_key_weights(
        None if cause is None else cause[None],
        strength,
        None if key_mask is None else key_mask[None],
    )
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    bounds: dict[str, Any] = dict(zip(names, packing, strict=True))
    return biased_attention_varlen_reference(query, key, value, cause, **bounds, **options)[0]


def check_key_weights(cause: Tensor | None, strength: float | Tensor, key_mask: Tensor | None) -> None:
    """Refuse a cause that is not finite or makes a weight negative where a key may be attended.

    On the CPU the values are read here; elsewhere the check runs on the device, and nothing waits for it.

    Args:
        cause: `[B or 1, K]` or `[B or 1, H or 1, K]`, floating; None passes.
        strength: a number, or `[H]`.
        key_mask: `[B, K]` bool, or None.

    Raises:
        RuntimeError: a forbidden value; on a GPU it surfaces as a device-side assertion.
    """
    if cause is None:
        return
    values = cause.detach().to(torch.float32)
    values = values[:, None] if values.dim() == 2 else values
    factor = strength[:, None] if isinstance(strength, Tensor) else strength
    weight = 1 + factor * values
    fine = torch.isfinite(weight) & (weight >= SMALLEST_WEIGHT)
    if key_mask is not None:
        fine = fine | ~key_mask[:, None]
    message = "cause must be finite with 1 + strength * cause >= 0 wherever key_mask is True"
    if torch.compiler.is_compiling():
        assert_async(fine.all(), message)
        return
    plain = all_samples(fine)
    if not plain.is_cpu or dispatch_modes_active():
        assert_async(plain.all(), message)
    elif not bool(plain.all()):
        if plain is not fine:
            raise RuntimeError(f"{message}.")
        place = torch.nonzero(~fine)[0].tolist()
        value = float(values.expand(fine.shape)[tuple(place)])
        raise RuntimeError(f"{message}; it is {value} at batch {place[0]}, key {place[2]}.")


def _check_tensors(
    query: Tensor, key: Tensor, value: Tensor, packed: bool
) -> tuple[torch.Size, torch.Size, torch.dtype, torch.device]:
    """Returns the shapes of query and key, and the dtype and device of all three: looked up once, as a small call feels it."""
    dims = 3 if packed else 4
    try:
        shape, key_shape, dtype, device = query.shape, key.shape, query.dtype, query.device
        alike = key_shape == value.shape and dtype == key.dtype == value.dtype and device == key.device == value.device
        alike = alike and query.layout is key.layout is value.layout is DENSE
    except (AttributeError, RuntimeError):  # no tensor, or a nested one, which has no shape
        alike = False
    if not alike or len(shape) != dims or len(key_shape) != dims:
        _refuse_tensors(query, key, value, dims)  # apart from the other checks: small calls would feel the loop in it
    if dtype not in DTYPES:
        raise ValueError(f"query, key and value must be fp32, bf16, fp16 or fp64, not {dtype}.")
    if key_shape[-1] != shape[-1] or not 1 <= shape[-1] <= MAX_HEAD_DIM:
        raise ValueError(
            f"query and key must share a head size from 1 to {MAX_HEAD_DIM}, not {shape[-1]} and {key_shape[-1]}."
        )
    if not packed and key_shape[0] != shape[0]:
        raise ValueError(f"query and key must share the batch, not {shape[0]} and {key_shape[0]}.")
    if key_shape[1] < 1 or shape[1] % key_shape[1]:
        raise ValueError(f"the key heads must divide the query heads; there are {key_shape[1]} and {shape[1]}.")
    return shape, key_shape, dtype, device


def _kind(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return "nested" if value.is_nested else f"of layout {value.layout}"


def _refuse_tensors(query: Tensor, key: Tensor, value: Tensor, dims: int) -> None:
    """Raises a ValueError that names the tensor that differs from the others or does not have `dims` dimensions."""
    form, key_form = ("[N, H, D]", "[M, Hkv, D]") if dims == 3 else ("[B, H, Q, D]", "[B, Hkv, K, D]")
    for name, tensor, expected in (("query", query, form), ("key", key, key_form), ("value", value, key_form)):
        if not isinstance(tensor, Tensor) or tensor.is_nested or tensor.layout is not DENSE:
            raise ValueError(f"{name} must be a dense tensor, not {_kind(tensor)}.")
        if tensor.dim() != dims:
            raise ValueError(f"{name} must be {expected}, not {list(tensor.shape)}.")
        if tensor.dtype != query.dtype:
            raise ValueError(f"query, key and value must share a dtype; {name} is {tensor.dtype}, query {query.dtype}.")
        if tensor.device != query.device:
            raise ValueError(f"{name} is on {tensor.device}, query on {query.device}.")
    raise ValueError(f"key and value must have the same shape, not {list(key.shape)} and {list(value.shape)}.")


def _check_options(
    strength: float | Tensor, causal: bool, scale: float, dropout_p: float, heads: int, device: torch.device
) -> None:
    if isinstance(strength, Tensor):
        if strength.shape != (heads,) or not strength.is_floating_point() or strength.device != device:
            raise ValueError(
                f"strength must be a number or a floating tensor [H] = [{heads}] on {device}, "
                f"not {strength.dtype} {list(strength.shape)} on {strength.device}."
            )
    elif not (type(strength) is float or _is_number(strength)) or not math.isfinite(strength):
        raise ValueError(f"strength must be a finite number or a tensor [H], not {strength!r}.")
    if causal is not True and causal is not False:
        raise ValueError(f"causal must be True or False, not {causal!r}.")
    if not (type(scale) is float or _is_number(scale)) or not -LARGEST_SCALE < scale < LARGEST_SCALE:
        raise ValueError(f"scale must be a number between -{LARGEST_SCALE:g} and {LARGEST_SCALE:g}, not {scale!r}.")
    if not (type(dropout_p) is float or _is_number(dropout_p)) or not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), not {dropout_p!r}.")


def _is_number(value: Any) -> bool:
    """Whether it is a real number. Callers test for a float first, as this look-up is felt in a small call."""
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int | Integral | torch.SymInt) and not isinstance(value, bool)


def _check_cause(cause: Tensor | None, batch: tuple[int, ...], heads: int, keys: int, device: torch.device) -> None:
    if cause is None:
        return
    if not isinstance(cause, Tensor) or cause.layout is not DENSE:
        raise ValueError(f"cause must be a dense tensor or None, not {_kind(cause)}.")
    shape = cause.shape
    if shape != (*batch, keys):  # most causes have this shape; the others are listed only where needed
        outer = (batch, (1,) * len(batch))
        if shape not in [(*b, *h, keys) for b in outer for h in ((), (1,), (heads,))]:
            expected = "[B or 1, K] or [B or 1, H or 1, K]" if batch else "[M] or [H or 1, M]"
            raise ValueError(f"cause must be {expected} with K = {keys}, not {list(shape)}.")
    if not cause.is_floating_point() or cause.device != device:
        raise ValueError(f"cause must be floating on {device}, not {cause.dtype} on {cause.device}.")


def _check_mask(key_mask: Tensor | None, batch: tuple[int, ...], keys: int, device: torch.device) -> None:
    if key_mask is None:
        return
    if not isinstance(key_mask, Tensor) or key_mask.layout is not DENSE:
        raise ValueError(f"key_mask must be a dense tensor or None, not {_kind(key_mask)}.")
    shape = (*batch, keys)
    if key_mask.dtype != torch.bool or key_mask.shape != shape or key_mask.device != device:
        expected = "[B, K]" if batch else "[M]"
        raise ValueError(
            f"key_mask must be bool {expected} = {list(shape)} on {device}, "
            f"not {key_mask.dtype} {list(key_mask.shape)} on {key_mask.device}."
        )


def _check_packing(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, device: torch.device
) -> None:
    for name, sums in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if not isinstance(sums, Tensor) or sums.device != device:
            kind = f"on {sums.device}" if isinstance(sums, Tensor) else _kind(sums)
            raise ValueError(f"{name} must be a tensor on {device}, as query is, not {kind}.")
        if sums.dtype != torch.int32 or sums.dim() != 1 or sums.shape[0] < 1 or sums.shape != cu_seqlens_q.shape:
            raise ValueError(
                f"{name} must be int32 [sequences + 1], the same length for both, not {sums.dtype} {list(sums.shape)}."
            )
    for name, longest in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if not _is_integer(longest) or longest < 0:
            raise ValueError(f"{name} must be an int, 0 or more, not {longest!r}.")


def _scalar(name: str, value: int | Tensor, bits: int, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        if value.dim() != 0 or value.dtype != torch.int64:
            raise ValueError(f"{name} must be an int or a 0-d int64 tensor, not {value.dtype} {list(value.shape)}.")
        return value.to(device)
    if not _is_integer(value) or not -(2**bits) <= value < 2**bits:
        raise ValueError(
            f"{name} must be an int from -2**{bits} to 2**{bits} - 1, or a 0-d int64 tensor, not {value!r}."
        )
    return torch.scalar_tensor(value, dtype=torch.int64, device=device)


def _seed(seed: int | Tensor | None, dropout_p: float, device: torch.device) -> Tensor | None:
    if dropout_p == 0.0:
        return None
    if seed is None:
        return torch.randint(0, 2**62, (), dtype=torch.int64, device=device)
    return _scalar("seed", seed, 63, device)


def _kernel_strength(strength: float | Tensor) -> tuple[float, Tensor | None]:
    """Returns strength as the raw operators take it: a number, and None or one number per head `[H]` in fp32."""
    if not isinstance(strength, Tensor):
        return float(strength), None
    if strength.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            'strength gets a gradient on backend="reference" alone; pass strength.detach(), or multiply cause by it.'
        )
    return 1.0, strength.to(torch.float32).contiguous()


@cache
def _operators(backend: str) -> tuple[Callable, Callable]:
    """Returns the raw operators, forward and backward, as eager mode calls them: without the wrappers of torch."""
    operators = getattr(torch.ops, f"empcause_{backend}")
    return without_wrapper(operators.attention.default), without_wrapper(operators.attention_backward.default)


def _needs_grad(query: Tensor, key: Tensor, value: Tensor, cause: Tensor | None) -> bool:
    inputs = query.requires_grad or key.requires_grad or value.requires_grad
    return inputs or (cause is not None and cause.requires_grad)


def _guard() -> AbstractContextManager:
    """A context for the backward pass: the kernels run at once, unless a second derivative is recorded, which is then refused."""
    return nullcontext() if torch.is_grad_enabled() else below_autograd()


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, operators, query, key, value, cause, others):  # type: ignore[no-untyped-def]
        forward, backward = operators
        with below_autograd():
            output, rounding, statistics, weights = forward(query, key, value, cause, *others, True)
        strength, head_strength, key_mask, cu_q, cu_k, max_q, max_k, causal, scale, dropout_p, seed, offset = others
        results = (output, rounding, statistics, weights)
        ctx.save_for_backward(query, key, value, *results, cause, head_strength, key_mask, cu_q, cu_k, seed, offset)
        ctx.constants = backward, strength, max_q, max_k, causal, scale, dropout_p
        return output

    @staticmethod
    def backward(ctx, grad_output):  # type: ignore[no-untyped-def]
        query, key, value, output, rounding, statistics, weights, cause, *options = ctx.saved_tensors
        head_strength, key_mask, cu_q, cu_k, seed, offset = options
        backward, strength, max_q, max_k, causal, scale, dropout_p = ctx.constants
        wants_cause = ctx.needs_input_grad[4]
        # All arguments are written out: putting 20 together from parts is felt in a small call.
        with _guard():
            grad_query, grad_key, grad_value, grad_cause = backward(
                grad_output,
                query,
                key,
                value,
                output,
                rounding,
                statistics,
                weights,
                cause,
                strength,
                head_strength,
                key_mask,
                cu_q,
                cu_k,
                max_q,
                max_k,
                causal,
                scale,
                dropout_p,
                seed,
                offset,
                wants_cause,
            )
        return None, grad_query, grad_key, grad_value, grad_cause if wants_cause else None, None
