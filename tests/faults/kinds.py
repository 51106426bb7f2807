"""What a kind of fault is: a cause, a place and a promised outcome, and the guards that keep the promise.

Each test of this folder is one kind and says so with `@fault(...)`. From these marks come the table in
docs/RELIABILITY.md (`make fault-table`) and the proof that the tests see what they claim to see
(`make guards` takes one guard away at a time; its test must fail).
"""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Guard:
    """Lines of the product that keep a promise, and what stands there once they are taken away.

    Attributes:
        path: the file, from the project's root: a module of empcause/ or kernels/, or a source of csrc/ for the CPU.
        text: the guard, as it stands there exactly once.
        without: what replaces it; the file must still parse.
    """

    path: str
    text: str
    without: str = ""

    def removed(self) -> str:
        """The file's text without the guard.

        Raises:
            ValueError: the guard does not stand in the file exactly once.
        """
        source = (ROOT / self.path).read_text(encoding="utf-8")
        if source.count(self.text) != 1:
            raise ValueError(f"{self.path} has this guard {source.count(self.text)} times, not once:\n{self.text}")
        return source.replace(self.text, self.without)


@dataclass(frozen=True)
class Kind:
    """One kind of fault with its test."""

    cause: str
    place: str
    promise: str
    guards: tuple[Guard, ...]
    test: str  # as pytest names it: tests/faults/test_x.py::test_y


def fault(*guards: Guard, cause: str, place: str, promise: str) -> Callable[[FunctionType], FunctionType]:
    """Mark a test function as one kind of fault.

    Args:
        guards: what keeps the promise; the test fails without any one of them.
        cause: what goes wrong, in words of a user ("the disk is full").
        place: where ("empcause train, while a checkpoint is written").
        promise: what happens then ("one sentence; the older checkpoint is whole and resumed from").
    """
    assert guards, "a kind of fault without a guard cannot be shown to be tested"

    def mark(test: FunctionType) -> FunctionType:
        return pytest.mark.fault(*guards, cause=cause, place=place, promise=promise)(test)

    return mark


def kinds() -> Iterator[Kind]:
    """All kinds of this folder, in the order of files and lines."""
    for file in sorted(FOLDER.glob("test_*.py")):
        module = f"{FOLDER.name}.{file.stem}"
        for name, test in vars(importlib.import_module(module)).items():
            for mark in getattr(test, "pytestmark", ()):
                if mark.name == "fault" and test.__module__ == module:
                    node = f"{file.relative_to(ROOT)}::{name}"
                    yield Kind(guards=mark.args, test=node, **mark.kwargs)
