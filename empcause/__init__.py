"""Empathetic conversation generation enhanced by emotion cause.

Importing the package imports neither torch nor transformers. As soon as they are imported, before or after, transformers knows
the attention implementation "empcause" and the configurations and models of this package, and torch its operators.
"""

import importlib
from typing import TYPE_CHECKING, Any

from empcause.on_import import watch_imports

__version__ = "0.1.0"

if TYPE_CHECKING:
    from empcause.integration import Emphasis, Passage, check_model, emphasis, steer
    from empcause.ops import biased_attention, biased_attention_varlen, info, use_backend

__all__ = [
    "Emphasis",
    "Passage",
    "__version__",
    "biased_attention",
    "biased_attention_varlen",
    "check_model",
    "emphasis",
    "info",
    "steer",
    "use_backend",
]

# By name: the package that it is from, which is imported when somebody asks for it.
_PACKAGES = {
    "Emphasis": "integration",
    "Passage": "integration",
    "biased_attention": "ops",
    "biased_attention_varlen": "ops",
    "check_model": "integration",
    "emphasis": "integration",
    "info": "ops",
    "steer": "integration",
    "use_backend": "ops",
}

if not TYPE_CHECKING:  # type checkers would take any name for one of ours

    def __getattr__(name: str) -> Any:
        if name in _PACKAGES.values():
            return importlib.import_module(f"empcause.{name}")
        if name not in _PACKAGES:
            raise AttributeError(f"module 'empcause' has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(f"empcause.{_PACKAGES[name]}"), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


watch_imports()
