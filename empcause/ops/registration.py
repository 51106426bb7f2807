"""What torch needs to know of a backend's raw operators: schemas, shapes (fake kernels), gradients and `torch.vmap`.

Each backend with kernels has the same two operators, `attention` and `attention_backward`, under a namespace of its own:
`torch.ops.empcause_cpu`, `empcause_triton` and `empcause_cuda`. Those of the C++ backends are defined where they are compiled
(csrc/torch/operators.h). Tensors are `[B, H, N, D]`, or `[N, H, D]` where prefix sums of packed sequences are given.

Kernels give first derivatives in reverse mode. Forward mode and second derivatives are refused by name.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch._ops import OpOverload
from torch.autograd import forward_ad
from torch.autograd.forward_ad import _set_fwd_grad_enabled


def _by_rows(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`[B, H, N, D]` laid out as `[B, N, H, D]`, as the kernels allocate; packed tensors are contiguous."""
    if like.dim() == 3:
        return like.new_empty(like.shape, dtype=dtype)
    batch, heads, rows, dim = like.shape
    return like.new_empty((batch, rows, heads, dim), dtype=dtype).transpose(1, 2)


def _make_forward_shapes(namespace: str) -> Callable:
    def forward_shapes(query: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
        *batch, heads, rows = query.shape[:-1] if query.dim() == 4 else (query.shape[1], query.shape[0])
        # Of rows in 16 bits only the CPU's kernels leave all digits: two parts of LSE, and, if the last argument says that a
        # backward pass follows, what rounding took from the output.
        full, on_cpu = query.dtype == torch.float32, namespace == "empcause_cpu"
        rounds = on_cpu and not full and others[-1]
        rounding = _by_rows(query, torch.int16) if rounds else query.new_empty(0, dtype=torch.int16)
        parts = 2 if full or on_cpu else 1
        return _by_rows(query), rounding, query.new_empty((*batch, heads, parts, rows), dtype=torch.float32)

    return forward_shapes


def _backward_shapes(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    rounding: Tensor,
    statistics: Tensor,
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


def _make_backward(operator: OpOverload) -> Callable:
    def backward(ctx: Any, grad_output: Tensor | None, *_: Tensor | None) -> tuple:
        query, key, value, output, rounding, statistics, cause, head_strength, key_mask, *tensors = ctx.saved_tensors
        nothing = [None] * (4 + len(ctx.rest))
        if grad_output is None:
            return (None, None, None, None, *nothing)
        rest = list(ctx.rest)
        for place, tensor in zip(ctx.places, tensors, strict=True):
            rest[place] = tensor
        wants_cause = cause is not None and ctx.needs_input_grad[3]
        inputs = (query, key, value, output, rounding, statistics, cause, ctx.strength, head_strength, key_mask)
        grads = operator(grad_output, *inputs, *rest, wants_cause)
        return (*grads[:3], grads[3] if wants_cause else None, *nothing)

    return backward


def _refuse(what: str, operator: OpOverload) -> Callable:
    """A formula that raises: this derivative is not there."""

    def formula(ctx: Any, *_: Any) -> NoReturn:
        raise RuntimeError(
            f"{operator.name()} has first derivatives in reverse mode alone, not {what}; "
            'biased_attention(..., backend="reference") has all, with memory quadratic in the length.'
        )

    return formula


def _differentiable(operator: OpOverload, setup_context: Callable, backward: Callable) -> Callable:
    """What stands before a raw operator where derivatives are recorded.

    `torch.library.register_autograd` would do, but it drops tangents without a word and cannot be used within `torch.func`.
    """

    def forward(ctx: Any, *inputs: Any) -> Any:
        # Here both modes are off; but below may be another transformation of torch.func, with derivatives of its own.
        with torch.enable_grad(), _set_fwd_grad_enabled(True), torch._C._AutoDispatchBelowAutograd():
            output = operator(*inputs)
        setup_context(ctx, inputs, output)
        return output

    formulas = {"forward": forward, "backward": backward, "jvp": _refuse("forward mode (jvp, jacfwd)", operator)}
    function: Any = type(operator.name(), (torch.autograd.Function,), {k: staticmethod(f) for k, f in formulas.items()})
    # Not Function.apply: within torch.func it would ask anew which transformation comes first, which the dispatcher has done.
    apply = super(torch.autograd.Function, function).apply

    def kernel(*inputs: Any) -> Any:
        recorded = torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs)
        if recorded or forward_ad._current_level >= 0:  # tensors may carry tangents
            with enable_single_level_autograd_function():
                return apply(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*inputs)

    return kernel


def _vmap(operator: OpOverload) -> Callable:
    """`torch.vmap` of a raw operator: sample by sample, so that everything may differ, dropout's seed and packing too."""

    def rule(info: Any, in_dims: tuple, *inputs: Any) -> tuple:
        if info.batch_size == 0:
            raise RuntimeError(f"{operator.name()} takes no torch.vmap over 0 samples.")
        samples = [
            operator(*(x if dim is None else x.select(dim, index) for x, dim in zip(inputs, in_dims, strict=True)))
            for index in range(info.batch_size)
        ]
        return tuple(torch.stack(results) for results in zip(*samples, strict=True)), (0,) * len(samples[0])

    return rule


OPERATORS = ("attention", "attention_backward")
registered: set[str] = set()  # namespaces that `define` or `register` has seen
_libraries: list[torch.library.Library] = []  # a definition lasts as long as its library


def define(namespace: str, module: ModuleType, dispatch_keys: list[str]) -> None:
    """Make the functions of a module, named like the raw operators and with type hints, operators of torch."""
    registered.add(namespace)
    library = torch.library.Library(namespace, "DEF")
    for name in OPERATORS:
        function = getattr(module, name)
        library.define(name + torch.library.infer_schema(function, mutates_args=()))
        for dispatch_key in dispatch_keys:
            library.impl(name, function, dispatch_key)
    _libraries.append(library)


def register(namespace: str) -> None:
    """Tell torch the shapes and derivatives of a namespace's raw operators; once, after they were defined."""
    registered.add(namespace)
    library = torch.library.Library(namespace, "FRAGMENT")
    _libraries.append(library)
    forward, backward = (getattr(getattr(torch.ops, namespace), name).default for name in OPERATORS)
    torch.library.register_fake(f"{namespace}::attention", _make_forward_shapes(namespace))
    torch.library.register_fake(f"{namespace}::attention_backward", _backward_shapes)
    library.impl("attention", _differentiable(forward, _setup_context, _make_backward(backward)), "Autograd")
    once = _refuse("second derivatives", forward)
    library.impl("attention_backward", _differentiable(backward, lambda *_: None, once), "Autograd")
    for operator in (forward, backward):
        torch.library.register_vmap(operator, _vmap(operator), lib=library)
