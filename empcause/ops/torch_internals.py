"""Everything that this package uses of torch beyond torch's documented interface, and the versions of torch it is tested with.

Each name is looked up once, when this module is imported. Where the installed torch lacks it, or where it takes or returns
something else, the function here answers by documented means: more slowly or for fewer cases, but never wrongly. What cannot be
had by documented means is refused where somebody wants it.

tests/ops/test_torch_internals.py checks what each name means in the installed torch, runs the package without each of them, and
finds private names of torch in any other module.
"""

import importlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

# The minor versions of torch with which all tests are run: the one that the Makefile installs, in CI too.
TESTED_TORCH = ("2.13",)

Documented = TypeVar("Documented", bound=Callable)

missing: set[str] = set()  # private names that the installed torch lacks, or has in another form


def _find(name: str, fits: Callable[[Any], bool]) -> Any:
    """Returns the object with this full name; None if torch has none, or if it does not fit."""
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
        if fits(found):
            return found
    except (ImportError, AttributeError, TypeError):
        pass
    missing.add(name)
    return None


def _private(name: str, fits: Callable[[Any], bool]) -> Callable[[Documented], Documented]:
    """Replaces a function, which answers by documented means, by the function of torch with this name if there is one that fits.

    The name of torch itself is called then, without a call in between that a small attention would feel.
    """
    found = _find(name, fits)
    return lambda documented: documented if found is None else found


def _gives(kind: type, *arguments: Any) -> Callable[[Any], bool]:
    """Returns a check that a function of torch takes these arguments and returns this type."""
    return lambda function: type(function(*arguments)) is kind


def _opens(*arguments: Any) -> Callable[[Any], bool]:
    """Returns a check that a function of torch takes these arguments and returns a context, which can be entered."""

    def check(function: Any) -> bool:
        with function(*arguments):
            return True

    return check


_NOTHING = torch.empty(0, device="cpu")

_has_level = _find("torch.autograd.forward_ad._current_level", lambda level: type(level) is int) is not None
_single_level = _find("torch._functorch.autograd_function.enable_single_level_autograd_function", _opens())
_single_level_function = _find("torch.autograd.function._SingleLevelFunction", lambda base: callable(base.apply))
_set_forward_mode = _find("torch.autograd.forward_ad._set_fwd_grad_enabled", _opens(True))
_is_wrapped = _find("torch._C._functorch.is_functorch_wrapped_tensor", _gives(bool, _NOTHING))
_unwrap = _find("torch._C._functorch.get_unwrapped", callable)
_function = _find("torch._C._FunctionBase", lambda base: callable(base._sequence_nr))
_namespace = _find("torch._ops._OpNamespace", lambda base: isinstance(torch.ops.aten, base))
_fake = _find("torch._subclasses.fake_tensor.FakeTensor", lambda cls: issubclass(cls, Tensor))


@_private("torch._C._AutoDispatchBelowAutograd", _opens())
def below_autograd() -> AbstractContextManager:
    """A context in which an operator's kernel runs at once: what torch records for derivatives, and a tangent, are passed over.

    Otherwise: a context that does nothing. Operators must then have derivatives by `torch.library.register_autograd`, which
    passes over them itself.
    """
    return nullcontext()


@_private("torch._C._are_functorch_transforms_active", _gives(bool))
def transforms_active() -> bool:
    """Whether the caller runs within `torch.func` or `torch.vmap`.

    Otherwise: True. It may be so, and the operators as torch dispatches them are right everywhere.
    """
    return True


def forward_mode_active() -> bool:
    """Whether derivatives are being computed in forward mode, so that tensors may have tangents.

    Otherwise: the same, from whether torch gives a tensor a tangent.
    """
    if _has_level:
        return forward_ad._current_level >= 0
    try:
        forward_ad.make_dual(_NOTHING, _NOTHING)
    except RuntimeError as error:
        return "no level exists" not in str(error)
    return True


def at_one_level(name: str, formulas: dict[str, Callable]) -> Callable:
    """Returns what a kernel of the dispatcher calls to give an operator derivatives of its own.

    It is `apply` of a `torch.autograd.Function` that does not look for transformations of `torch.func`, as the dispatcher has
    decided which of them comes first. To be called where `HAS_FORMULAS`.

    Args:
        name: of the function, which torch shows in the graph.
        formulas: "forward", "backward" and "jvp".
    """
    function: Any = type(
        name, (_single_level_function,), {kind: staticmethod(formula) for kind, formula in formulas.items()}
    )

    def applied(*inputs: Any) -> Any:
        with _single_level():
            return function.apply(*inputs)

    return applied


def forward_mode_enabled() -> AbstractContextManager:
    """A context in which derivatives in forward mode are computed, even within `torch.autograd.Function.forward`.

    To be entered where `HAS_FORMULAS`.
    """
    return _set_forward_mode(True)


def without_wrapper(operator: Any) -> Callable:
    """Returns what an overload of an operator calls, which spares the time of its Python wrapper.

    Otherwise: the overload.
    """
    called = getattr(operator, "_op", None)
    return called if callable(called) else operator


def all_samples(tensor: Tensor) -> Tensor:
    """Returns the tensor that `torch.vmap` and `torch.func` have wrapped, with the samples of all.

    Otherwise: the tensor as it is, whose values torch refuses to tell within `torch.vmap`.
    """
    if _is_wrapped is not None and _unwrap is not None:
        while _is_wrapped(tensor):
            tensor = _unwrap(tensor)
    return tensor


@_private("torch._C._len_torch_dispatch_stack", _gives(int))
def dispatch_modes_active() -> int:
    """How many things watch the operators that run, for example to trace them, and could not follow a look at values.

    Otherwise: 1. There may be one.
    """
    return 1


@_private("torch._assert_async", _gives(type(None), _NOTHING.any().logical_not(), ""))
def assert_async(condition: Tensor, message: str) -> None:
    """Raise a RuntimeError if a 0-d bool tensor is False; on a GPU that happens on the device, and nobody waits for it.

    Otherwise: wait for it. torch refuses this where it traces.

    Raises:
        RuntimeError: the condition is False.
    """
    if not bool(condition):
        raise RuntimeError(message)


# Returns the node whose backward pass this thread is computing, None outside of backward passes. To be called where `HAS_NODES`.
current_node: Any = _find("torch._C._current_autograd_node", lambda function: function() is None or True)
# Returns the number that the next node of this thread will have: they rise as the thread makes nodes. Where `HAS_NODES`.
next_node_number: Any = _find("torch._C._autograd._get_sequence_nr", _gives(int))


def node_number(node: Any) -> int:
    """Returns the number of a node in the thread that made it. Where `HAS_NODES`."""
    return node._sequence_nr()


def load_on_first_use(name: str, operators: Sequence[str], load: Callable[[], str | None]) -> None:
    """Let `torch.ops.<name>` load its operators when somebody asks for one of them, as a saved program does by name.

    Otherwise: load them now.

    Args:
        name: of the namespace.
        operators: their names in it.
        load: makes the operators known to torch; returns None, or why that cannot be. It may be called several times.
    """
    if _namespace is None:
        load()
        return

    class Namespace(_namespace):  # type: ignore[misc, valid-type]
        __module__ = _namespace.__module__  # operators have it in their names

        def __getattr__(self, operator: str) -> Any:
            if operator in operators and (why_not := load()) is not None:
                raise AttributeError(f"{name} has no operators here: {why_not}.")
            return super().__getattr__(operator)

    setattr(torch.ops, name, Namespace(name))


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor has a shape but no values, as torch makes them to trace a program.

    Otherwise: False. torch refuses to make a tensor of another class of one that is fake.
    """
    return _fake is not None and isinstance(tensor, _fake)


# Whether an operator can have a formula of our own: `at_one_level` and `forward_mode_enabled` can be called.
HAS_FORMULAS = missing.isdisjoint(
    {
        "torch._C._AutoDispatchBelowAutograd",
        "torch._functorch.autograd_function.enable_single_level_autograd_function",
        "torch.autograd.forward_ad._set_fwd_grad_enabled",
        "torch.autograd.function._SingleLevelFunction",
    }
)
# Whether `current_node`, `next_node_number` and `node_number` can be called; there is no documented way to know what they tell.
HAS_NODES = missing.isdisjoint(
    {"torch._C._current_autograd_node", "torch._C._autograd._get_sequence_nr", "torch._C._FunctionBase"}
)
