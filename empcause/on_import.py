"""Registers parts of this package with torch and transformers as soon as they are imported, and not before.

Importing torch and transformers takes seconds, so `import empcause` does without. The parts of this package that register
something with them are imported when they are, whoever imports them, before or after `import empcause`.

A part imports more of transformers, whose modules import each other; in the middle of that it would meet modules that are
half made. So it waits until the thread imports no module of torch, transformers or this package any more, and until no other
thread is loading the module that it waits for.
"""

import importlib
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# By the module that must be there: the parts that register something with it.
_waiting: dict[str, tuple[str, ...]] = {
    "torch": ("empcause.ops",),
    "transformers.modeling_utils": ("empcause.integration",),
    "transformers.models.auto.configuration_auto": ("empcause.extractor", "empcause.generator"),
}


class _Thread(threading.local):
    """The imports that one thread is in the middle of.

    Attributes:
        importing: how many modules it is importing, one within the other.
        finding: the modules that it is looking for.
    """

    importing = 0

    def __init__(self) -> None:
        self.finding: set[str] = set()


_thread = _Thread()
_half_made: set[str] = set()  # modules that some thread is loading


class _Loader:
    """A module's own loader; once the module is loaded, it looks for parts that need no longer wait."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def exec_module(self, module: Any) -> None:
        """Load the module. Then, and afterwards, its loader is its own."""
        module.__loader__ = module.__spec__.loader = self.loader
        _thread.importing += 1
        _half_made.add(module.__name__)
        try:
            self.loader.exec_module(module)
        finally:
            _half_made.discard(module.__name__)
            _thread.importing -= 1
        import_parts()


class _Finder:
    """Finds what the other finders find, to be loaded by a `_Loader`."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        watched = name == "torch" or name.partition(".")[0] in ("transformers", "empcause")
        if not watched or name in _thread.finding:  # another finder may ask all finders, as this one does
            return None
        if name == "empcause._C":
            importlib.import_module("torch")  # the compiled module needs torch's libraries and holds no path to them
        _thread.finding.add(name)
        try:
            specs = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
            spec = next(filter(None, specs), None)
        finally:
            _thread.finding.remove(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)  # type: ignore[assignment]
        return spec


_finder = _Finder()


def watch_imports() -> None:
    """Import the parts whose module is there, and the others when theirs is imported."""
    if _waiting and _finder not in sys.meta_path:  # as it may be where the package is loaded again
        sys.meta_path.insert(0, _finder)  # type: ignore[arg-type]
    import_parts()


def import_parts() -> None:
    """Import the parts whose module is there, unless this thread is in the middle of importing."""
    if _thread.importing:
        return
    _thread.importing += 1
    try:
        while ready := next((name for name in list(_waiting) if name in sys.modules.keys() - _half_made), None):
            for part in _waiting.get(ready, ()):
                importlib.import_module(part)
            _waiting.pop(ready, None)  # another thread may have done the same
    finally:
        _thread.importing -= 1
    if not _waiting:
        with suppress(ValueError):
            sys.meta_path.remove(_finder)  # type: ignore[arg-type]
