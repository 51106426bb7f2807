"""Chooses the backend of a call: the one that it names, else that of `use_backend`, else the best one for its tensors."""

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from empcause.ops.backends import BACKENDS, find, gpu_default, head_dim_class, why_not_loaded
from empcause.ops.torch_internals import HAS_NODES, current_node, next_node_number, node_number

_REMEMBERED = 10_000  # how many changes of the choice a thread remembers


class _Context:
    """A `use_backend` that has been entered; `again` if a checkpointed function did so, run again by a backward pass."""

    def __init__(self, name: str) -> None:
        self.name, self.thread = name, threading.get_ident()
        self.again = current_node() is not None


class _Thread(threading.local):
    """The changes of the choice that one thread remembers."""

    def __init__(self) -> None:
        self.seen = 0  # how many changes of the choice the thread knows
        # The number of the thread's first autograd node under each choice, and the choice.
        self.history: deque[tuple[int, str | None]] = deque(maxlen=_REMEMBERED)

    def look(self) -> None:
        self.seen = _changes
        self.history.append((next_node_number(), _chosen))


_chosen: str | None = None  # by the innermost use_backend, for the whole process; compiled code guards on it
_open: list[_Context] = []  # outermost first, all of one thread or, `again`, of autograd's threads for it
_lock = threading.Lock()
_changes = 0  # of the choice, so far
_used = False  # whether there were any; apart, as compiled code guards on it
_thread = _Thread()
_latest = _thread.history  # of the thread that made the last change


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Let every call of the operator that names no backend run on this one.

        with empcause.use_backend("reference"):
            loss = model(**batch).loss

    It holds for the whole process: in every thread, and in compiled code, where a graph compiled under one choice is not used
    under another (a graph without guards, as `torch.export` makes, keeps the backend it was traced with). The innermost of
    nested contexts holds. A call's own `backend=` wins.

    Backward passes, wherever they run, are on the backend of the forward pass. So is a checkpointed call that they compute again,
    provided that they run in the forward pass' thread, in one of autograd's own, or in one that has chosen nothing itself. Where
    `torch.compile` is applied to a function within a checkpointed one, run the backward pass in the same context: torch refuses
    what is computed again otherwise.

    Args:
        name: "cpu", "triton", "cuda" or "reference".

    Raises:
        RuntimeError: the backend is unknown or not there; another thread is within a `use_backend`; contexts are not left in the
            reverse order of being entered; a call's tensors are not for the backend; a checkpointed call is computed again in a
            thread that cannot know under which choice it was made; the installed torch does not tell when that happens.
    """
    global _chosen, _used
    _require_known(name)
    if not HAS_NODES:
        raise RuntimeError(
            f"use_backend cannot tell with torch {torch.__version__} what checkpointed calls had chosen when they are computed "
            f"again; pass backend={name!r} to the calls."
        )
    if torch.compiler.is_compiling():  # the graph has the backend: what is left to trace is the variable
        before = _chosen, _used
        _chosen, _used = name, True
        try:
            yield
        finally:
            _chosen, _used = before
        return
    why_not = why_not_loaded(name)
    if why_not is not None:
        raise RuntimeError(f"The backend {name!r} cannot run: {why_not}.")
    context = _Context(name)
    with _lock:
        if _open and _open[0].thread != context.thread and not context.again:
            raise RuntimeError(
                f"use_backend({name!r}) would hold for the whole process, in which another thread is within "
                f"use_backend({_open[-1].name!r}); pass backend={name!r} to the calls of this thread."
            )
        _open.append(context)
        _change(context)
    try:
        yield
    finally:
        with _lock:
            innermost = _open[-1]
            _open.remove(context)
            _change(context)
        if innermost is not context:
            raise RuntimeError(
                f"use_backend({name!r}) was left before use_backend({innermost.name!r}), which was entered within it."
            )


def _change(context: _Context) -> None:
    """Makes the innermost open context the choice, and remembers since which autograd node it holds."""
    global _chosen, _changes, _used, _latest
    _chosen, _used = _open[-1].name if _open else None, True
    if not context.again:
        _changes += 1
        _thread.look()
        _latest = _thread.history


def choose_backend(wanted: str | None, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Returns the name of the backend for tensors of a device, dtype and head size.

    Args:
        wanted: name of the backend that the call asks for, or None.
        device: that of the tensors.
        dtype: of query, key and value.
        head_dim: their last dimension, up to 256.

    Raises:
        RuntimeError: the wanted one is unknown, not built, or cannot take these tensors; or see `use_backend`.
    """
    if wanted is not None:
        _require_known(wanted)
    elif _used:
        wanted = _chosen if torch.compiler.is_compiling() else _choice()
    if wanted is None and device.type == "cuda":
        wanted = _gpu_default(device, dtype, head_dim_class(head_dim))
    chosen, why_not = _find(wanted, device.type, dtype)
    if why_not is not None:
        raise RuntimeError(f"The backend {chosen!r} cannot run this: {why_not}.")
    return chosen


# A compiler takes the results as constants, as it cannot trace how a backend is loaded.
@torch.compiler.assume_constant_result
def _gpu_default(device: torch.device, dtype: torch.dtype, head_dims: int) -> str | None:
    return gpu_default(device, dtype, head_dims)


@torch.compiler.assume_constant_result
def _find(wanted: str | None, device_type: str, dtype: torch.dtype) -> tuple[str, str | None]:
    return find(wanted, device_type, dtype)


def _require_known(name: str) -> None:
    if not isinstance(name, str) or name not in BACKENDS:
        raise RuntimeError(f"Unknown backend {name!r}; expected one of {', '.join(BACKENDS)}.")


def _choice() -> str | None:
    """Returns what `use_backend` has chosen.

    A backward pass computes checkpointed calls again. There the choice is the one that held when the node was made whose backward
    pass runs. It is found by the node's number: nodes are numbered in the order in which their thread made them.
    """
    node = current_node()
    if node is None:
        if _thread.seen != _changes:
            _thread.look()
        return _chosen
    if _open and _open[-1].again:
        return _chosen
    history = _thread.history
    if not history and isinstance(threading.current_thread(), threading._DummyThread):
        history = _latest  # autograd's own threads, for devices, work for that which made the graph
    for first_node, chosen in reversed(history):
        if node_number(node) >= first_node:
            return chosen
    if len(history) in (0, _REMEMBERED):
        raise RuntimeError(
            "A checkpointed call of the operator is computed again in a thread that does not know what use_backend had chosen "
            "when the call was made: run both passes in one thread, or pass backend= to the call."
        )
    return None
