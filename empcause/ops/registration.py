"""What torch needs to know of a backend's raw operators: schemas, shapes (fake kernels) and gradients.

Each kernel backend has the same four operators under a namespace of its own: `torch.ops.empcause_cpu`, `empcause_triton`
and `empcause_cuda`. Those of the C++ backends are defined where they are compiled (csrc/operators.h).
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def _by_rows(like: Tensor) -> Tensor:
    """`[B, H, N, D]` laid out as `[B, N, H, D]`, as the kernels allocate; packed tensors are contiguous."""
    if like.dim() == 3:
        return like.new_empty(like.shape)
    batch, heads, rows, dim = like.shape
    return like.new_empty((batch, rows, heads, dim)).transpose(1, 2)


def _forward_shapes(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    shape = query.shape[:-1] if query.dim() == 4 else (query.shape[1], query.shape[0])
    return _by_rows(query), query.new_empty(shape, dtype=torch.float32)


def _backward_shapes(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    cause: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = cause.shape if rest[-1] and cause is not None else (0,)
    return _by_rows(query), _by_rows(key), _by_rows(value), query.new_empty(shape, dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    query, key, value, cause, strength, head_strength, key_mask, *rest = inputs
    tensors = [value for value in rest if isinstance(value, Tensor)]
    ctx.save_for_backward(query, key, value, *output, cause, head_strength, key_mask, *tensors)
    ctx.strength = strength
    # Tensors among the other arguments are put back into their places in the backward pass.
    ctx.rest = [None if isinstance(value, Tensor) else value for value in rest]
    ctx.places = [place for place, value in enumerate(rest) if isinstance(value, Tensor)]
    ctx.set_materialize_grads(False)


def _make_backward(operator: Any) -> Any:
    def backward(ctx: Any, grad_output: Tensor | None, _: Tensor | None) -> tuple:
        query, key, value, output, logsumexp, cause, head_strength, key_mask, *tensors = ctx.saved_tensors
        nothing = [None] * (3 + len(ctx.rest))
        if grad_output is None:
            return (None, None, None, None, *nothing)
        rest = list(ctx.rest)
        for place, tensor in zip(ctx.places, tensors, strict=True):
            rest[place] = tensor
        wants_cause = cause is not None and ctx.needs_input_grad[3]
        saved = (grad_output, query, key, value, output, logsumexp, cause, ctx.strength, head_strength, key_mask)
        grads = operator(*saved, *rest, wants_cause)
        return (*grads[:3], grads[3] if wants_cause else None, *nothing)

    return backward


OPERATORS = ("attention", "attention_backward", "attention_varlen", "attention_varlen_backward")
registered: set[str] = set()  # namespaces that `register` has seen
_libraries: list[torch.library.Library] = []  # a definition lasts as long as its library


def define(namespace: str, module: ModuleType, dispatch_keys: list[str]) -> None:
    """Make the functions of a module, named like the raw operators and with type hints, operators of torch."""
    library = torch.library.Library(namespace, "DEF")
    for name in OPERATORS:
        function = getattr(module, name)
        library.define(name + torch.library.infer_schema(function, mutates_args=()))
        for dispatch_key in dispatch_keys:
            library.impl(name, function, dispatch_key)
    _libraries.append(library)


def register(namespace: str) -> None:
    """Tell torch the shapes and gradients of a namespace's raw operators; once, after they were defined."""
    registered.add(namespace)
    for name in ("attention", "attention_varlen"):
        torch.library.register_fake(f"{namespace}::{name}", _forward_shapes)
        torch.library.register_fake(f"{namespace}::{name}_backward", _backward_shapes)
        backward = _make_backward(getattr(getattr(torch.ops, namespace), f"{name}_backward"))
        torch.library.register_autograd(f"{namespace}::{name}", backward, setup_context=_setup_context)
