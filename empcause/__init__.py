"""Empathetic conversation generation enhanced by emotion cause.

Importing the package registers the attention implementation "empcause" with transformers.
"""

__version__ = "0.1.0"

import sys
from types import TracebackType

_excepthook = sys.excepthook


def _without_traceback(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("empcause: error: interrupted; nothing had begun.", file=sys.stderr)
    else:
        _excepthook(kind, error, traceback)


sys.excepthook = _without_traceback  # torch and transformers take seconds to import, in which people press Ctrl-C

from empcause.integration import check_model, steer  # noqa: E402
from empcause.ops import biased_attention, biased_attention_varlen, info, use_backend  # noqa: E402

sys.excepthook = _excepthook

__all__ = ["__version__", "biased_attention", "biased_attention_varlen", "check_model", "info", "steer", "use_backend"]
