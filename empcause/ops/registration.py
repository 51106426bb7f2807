"""Tells torch the schemas, shapes (fake kernels), gradients and `torch.vmap` of the raw operators of backends.

Each backend with kernels has the same two operators, `attention` and `attention_backward`, under a namespace of its own:
`torch.ops.empcause_cpu`, `empcause_triton` and `empcause_cuda`. Those of the C++ backends are defined where they are compiled
(csrc/torch/operators.h). Tensors are `[B, H, N, D]`, or `[N, H, D]` where prefix sums of packed sequences are given.

Kernels give first derivatives in reverse mode. Forward mode and second derivatives are refused by name.
"""

import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor

from empcause.ops.torch_internals import (
    HAS_FORMULAS,
    at_one_level,
    below_autograd,
    forward_mode_active,
    forward_mode_enabled,
)


def _by_rows(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Returns a tensor of this shape as the kernels allocate it: `[B, H, N, D]` lies as `[B, N, H, D]`, packed is contiguous."""
    if like.dim() == 3:
        return like.new_empty(like.shape, dtype=dtype)
    batch, heads, rows, dim = like.shape
    return like.new_empty((batch, rows, heads, dim), dtype=dtype).transpose(1, 2)


def cause_sizes(cause: Tensor | None, packed: bool) -> tuple[int, int]:
    """Returns the batch and the heads of a cause, each 1 where it is the same for all.

    Args:
        cause: `[B or 1, K]` or `[B or 1, H or 1, K]`, packed `[M]` or `[H or 1, M]`; or None.
        packed: whether the sequences are packed.
    """
    if cause is None:
        return 1, 1
    with_heads = cause.dim() + packed == 3
    return 1 if packed else cause.shape[0], cause.shape[-2] if with_heads else 1


FLAGGED_KEYS = 128  # keys that share a flag


def num_flags(keys: int) -> int:
    """Returns how many flags the Triton kernels keep behind the weights of this many keys (kernels/weights.py)."""
    return (keys + FLAGGED_KEYS - 1) // FLAGGED_KEYS


def _make_forward_shapes(namespace: str) -> Callable:
    def forward_shapes(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cause: Tensor | None,
        strength: float,
        head_strength: Tensor | None,
        key_mask: Tensor | None,
        *others: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        *batch, heads, rows = query.shape[:-1] if query.dim() == 4 else (query.shape[1], query.shape[0])
        # For fp16 and bf16 only the CPU's kernels return all digits: the log-sum-exp in two parts and, if the last argument says
        # that a backward pass follows, what rounding took from the output.
        is_fp32, on_cpu = query.dtype == torch.float32, namespace == "empcause_cpu"
        rounds = on_cpu and not is_fp32 and others[-1]
        rounding = _by_rows(query, torch.int16) if rounds else query.new_empty(0, dtype=torch.int16)
        parts = 2 if is_fp32 or on_cpu else 1
        statistics = query.new_empty((*batch, heads, parts, rows), dtype=torch.float32)
        # The weights of the keys, which a GPU's backends leave out where all are 1. Those of Triton are followed by flags.
        keys = key.shape[0 if key.dim() == 3 else 2]
        sizes: tuple[int, ...] = (0,)
        if on_cpu or cause is not None or key_mask is not None:
            cause_batch, cause_heads = cause_sizes(cause, query.dim() == 3)
            per_head = cause_heads != 1 or (cause is not None and head_strength is not None)
            outer = batch[0] if batch and (cause_batch != 1 or key_mask is not None) else 1
            flags = num_flags(keys) if namespace == "empcause_triton" else 0
            sizes = (outer, heads if per_head else 1, keys + flags)
        return _by_rows(query), rounding, statistics, query.new_empty(sizes, dtype=torch.float32)

    return forward_shapes


def _backward_shapes(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    rounding: Tensor,
    statistics: Tensor,
    weights: Tensor,
    cause: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = cause.shape if rest[-1] and cause is not None else (0,)
    return _by_rows(query), _by_rows(key), _by_rows(value), query.new_empty(shape, dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    query, key, value, cause, strength, head_strength, key_mask, *rest, _ = inputs
    if ctx.needs_input_grad[5]:
        raise RuntimeError("head_strength gets no gradient; detach it.")
    tensors = [value for value in rest if isinstance(value, Tensor)]
    ctx.save_for_backward(query, key, value, *output, cause, head_strength, key_mask, *tensors)
    ctx.strength = strength
    # Tensors among the other arguments are put back into their places in the backward pass.
    ctx.rest = [None if isinstance(value, Tensor) else value for value in rest]
    ctx.places = [place for place, value in enumerate(rest) if isinstance(value, Tensor)]
    ctx.set_materialize_grads(False)


def _make_backward(operator: Callable) -> Callable:
    def backward(ctx: Any, grad_output: Tensor | None, *_: Tensor | None) -> tuple:
        query, key, value, output, rounding, statistics, weights, cause, head_strength, key_mask, *tensors = (
            ctx.saved_tensors
        )
        nothing = [None] * (4 + len(ctx.rest))
        if grad_output is None:
            return (None, None, None, None, *nothing)
        rest = list(ctx.rest)
        for place, tensor in zip(ctx.places, tensors, strict=True):
            rest[place] = tensor
        wants_cause = cause is not None and ctx.needs_input_grad[3]
        results = (output, rounding, statistics, weights)
        options = (cause, ctx.strength, head_strength, key_mask, *rest)
        grads = operator(grad_output, query, key, value, *results, *options, wants_cause)
        return (*grads[:3], grads[3] if wants_cause else None, *nothing)

    return backward


def _refuse(what: str, name: str) -> Callable:
    """Returns a formula that raises: the operator of this name does not have this derivative."""

    def formula(*_: Any) -> NoReturn:
        raise RuntimeError(
            f"{name} has first derivatives in reverse mode alone, not {what}; "
            'biased_attention(..., backend="reference") has all, with memory quadratic in the length.'
        )

    return formula


def _refuse_forward_mode(name: str) -> Callable:
    return _refuse("forward mode (jvp, jacfwd)", name)


def _differentiable(name: str, operator: Callable, setup_context: Callable, backward: Callable) -> Callable:
    """Returns a kernel that stands before a raw operator where derivatives are recorded."""

    def forward(ctx: Any, *inputs: Any) -> Any:
        # Here both modes are off; but below may be another transformation of torch.func, with derivatives of its own.
        with torch.enable_grad(), forward_mode_enabled(), below_autograd():
            output = operator(*inputs)
        setup_context(ctx, inputs, output)
        return output

    formulas = {"forward": forward, "backward": backward, "jvp": _refuse_forward_mode(name)}
    apply = at_one_level(name, formulas)

    def kernel(*inputs: Any) -> Any:
        recorded = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
        if recorded or forward_mode_active():
            return apply(*inputs)
        with below_autograd():
            return operator(*inputs)

    return kernel


def _refuse_in_forward_mode(library: torch.library.Library, name: str) -> None:
    """Let the kernels of an operator refuse to run in forward mode, where they would drop tangents without a word."""
    refuse = _refuse_forward_mode(name)
    for key in ("CPU", "CUDA"):
        kernel = find_kernel(name, key)
        if kernel is None:
            continue

        def checked(dispatch_keys: Any, *inputs: Any, kernel: Any = kernel) -> Any:
            if forward_mode_active():
                refuse()
            return kernel.call_boxed(dispatch_keys, *inputs)

        with warnings.catch_warnings(action="ignore"):  # torch warns of every kernel that is replaced
            library.impl(name, checked, key, with_keyset=True, allow_override=True)


def _register_derivatives(
    library: torch.library.Library, name: str, operator: Callable, setup_context: Callable | None, backward: Callable
) -> None:
    """Register the first derivatives of a raw operator in reverse mode, and refuse the others.

    Where torch has not what a formula of our own needs, its documented registration takes its place. That one cannot be used
    within `torch.func`, which torch refuses.
    """
    if HAS_FORMULAS:
        formula = _differentiable(name, operator, setup_context or (lambda *_: None), backward)
        library.impl(name, formula, "Autograd")
    else:
        torch.library.register_autograd(name, backward, setup_context=setup_context, lib=library)
        _refuse_in_forward_mode(library, name)


def find_kernel(name: str, dispatch_key: str) -> Any:
    """Returns the kernel that a raw operator has for a kind of device, None if it has none.

    Args:
        name: with its namespace, as in "empcause_cpu::attention".
        dispatch_key: "CPU" or "CUDA".
    """
    try:
        return torch.library.get_kernel(name, dispatch_key)
    except RuntimeError:
        return None


def _vmap(name: str, operator: Callable) -> Callable:
    """Returns the rule for `torch.vmap`: sample by sample, so that everything may differ, dropout's seed and packing too."""

    def rule(info: Any, in_dims: tuple, *inputs: Any) -> tuple:
        if info.batch_size == 0:
            raise RuntimeError(f"{name} takes no torch.vmap over 0 samples.")
        samples = [
            operator(*(x if dim is None else x.select(dim, index) for x, dim in zip(inputs, in_dims, strict=True)))
            for index in range(info.batch_size)
        ]
        return tuple(torch.stack(results) for results in zip(*samples, strict=True)), (0,) * len(samples[0])

    return rule


OPERATORS = ("attention", "attention_backward")
registered: set[str] = set()  # namespaces that were given to `define` or `register`
_libraries: list[torch.library.Library] = []  # what is defined in a library lasts as long as the library


def define(namespace: str, module: ModuleType, dispatch_keys: list[str]) -> None:
    """Make functions the raw operators of a backend that is written in Python.

    Args:
        namespace: of the operators, "empcause_" and the backend's name.
        module: has a function for each of `OPERATORS`, of the same name and with type hints.
        dispatch_keys: for the kinds of device whose tensors the functions take, "CPU" or "CUDA".
    """
    registered.add(namespace)
    library = torch.library.Library(namespace, "DEF")
    for name in OPERATORS:
        function = getattr(module, name)
        library.define(name + torch.library.infer_schema(function, mutates_args=()))
        for dispatch_key in dispatch_keys:
            library.impl(name, function, dispatch_key)
    _libraries.append(library)


def register(namespace: str) -> None:
    """Tell torch the shapes and derivatives of the raw operators of a namespace; to be called once, after they were defined."""
    registered.add(namespace)
    library = torch.library.Library(namespace, "FRAGMENT")
    _libraries.append(library)
    forward, backward = (getattr(getattr(torch.ops, namespace), name).default for name in OPERATORS)
    attention, attention_backward = (f"{namespace}::{name}" for name in OPERATORS)
    torch.library.register_fake(attention, _make_forward_shapes(namespace))
    torch.library.register_fake(attention_backward, _backward_shapes)
    _register_derivatives(library, attention, forward, _setup_context, _make_backward(backward))
    once = _refuse("second derivatives", attention)
    _register_derivatives(library, attention_backward, backward, None, once)
    for name, operator in ((attention, forward), (attention_backward, backward)):
        torch.library.register_vmap(name, _vmap(name, operator), lib=library)
