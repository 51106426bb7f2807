"""Launches of kernels that spare most of the time of Triton's own launcher.

Triton's launcher, `kernel[grid](*arguments)`, looks at every argument of every launch to find out for which types, alignments and
constants it has to compile, and returns the compiled kernel. That one can be called as it is, `compiled[grid](*arguments)`, which
is faster. So compiled kernels are kept here under all that decides about their code, and Triton's launcher is called for what is
new, and wherever the decision is its own.
"""

import inspect
from functools import cache
from operator import itemgetter
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel

from empcause.kernels.attention import UNSPECIALIZED

# What else decides about the code in the versions of Triton that were read. Where a name is missing, Triton's launcher decides.
KNOWN = all(hasattr(triton.knobs.runtime, name) for name in ("debug", "add_stages_inspection_hook")) and hasattr(
    triton.knobs.compilation, "instrumentation_mode"
)

_compiled: dict[tuple, CompiledKernel] = {}


def launch(kernel: Any, programs: int, arguments: tuple, options: dict[str, Any], device: torch.device) -> None:
    """Launch a kernel on the current device.

    Args:
        kernel: made by `triton.jit` with `do_not_specialize=UNSPECIALIZED`; the names of its constants are in capitals.
        programs: 1 or more.
        arguments: all of them, in the order of the kernel's parameters, constants included. Integers are not negative.
        options: those of Triton's compiler, by name.
        device: the current device.
    """
    key = compilation_key(kernel, arguments, options, device)
    known = None if key is None else _compiled.get(key)
    if known is not None:
        known[(programs, 1, 1)](*arguments)
        return
    compiled = kernel[(programs,)](*arguments, **options)
    # Triton's interpreter returns None.
    if key is not None and isinstance(compiled, CompiledKernel):
        _compiled[key] = compiled


def compilation_key(kernel: Any, arguments: tuple, options: dict[str, Any], device: torch.device) -> tuple | None:
    """Returns what decides about the code that Triton compiles for a launch, None where its own launcher has to decide.

    Launches with equal keys have the same code: of tensors the dtype and whether they begin at a multiple of 16 bytes, of
    integers whether they are 1 or a multiple of 16, of constants the value, and of all whether they are None.
    """
    knobs = triton.knobs
    if not KNOWN or getattr(kernel, "pre_run_hooks", True) or knobs.runtime.add_stages_inspection_hook is not None:
        return None
    constants, counts, others = _kinds(kernel.fn)
    if max(counts(arguments)) >= 2**31:
        return None  # one has 64 bits
    key: list[Any] = [kernel.fn, device, knobs.runtime.debug, knobs.compilation.instrumentation_mode, *options.items()]
    key.append(constants(arguments))
    for argument in others(arguments):
        kind = type(argument)
        if kind is int:
            if argument >= 2**31:
                return None
            key.append(2 if argument == 1 else argument % 16 == 0)
        elif isinstance(argument, Tensor):
            key.append(argument.dtype)
            key.append(argument.data_ptr() % 16 == 0)
        elif argument is None or kind is float:
            key.append(kind)
        else:
            return None
    return tuple(key)


@cache
def _kinds(function: Any) -> tuple[itemgetter, itemgetter, itemgetter]:
    """Returns what takes from the arguments the constants, the counts that the code does not depend on, and the others."""
    names = list(inspect.signature(function).parameters)
    constants = [place for place, name in enumerate(names) if name.isupper()]
    counts = [place for place, name in enumerate(names) if name in UNSPECIALIZED]
    others = [place for place in range(len(names)) if place not in constants and place not in counts]
    return itemgetter(*constants), itemgetter(*counts), itemgetter(*others)
