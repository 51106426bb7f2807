"""Takes one guard out of the product in this process and its children; no file is changed.

Python imports this module at its start where this folder is on PYTHONPATH. `remove_guards.py` names the file, its text
without the guard and, for C++, the extension module that was built from such a text.
"""

import importlib.abc
import importlib.machinery
import linecache
import os
import sys
from pathlib import Path

REPLACED = os.environ.get("EMPCAUSE_REPLACED_FILE")
REPLACEMENT = os.environ.get("EMPCAUSE_REPLACEMENT_FILE")


class _Source(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname):
        text = Path(REPLACEMENT).read_text(encoding="utf-8")
        linecache.cache[self.path] = (
            len(text),
            None,
            text.splitlines(keepends=True),
            self.path,
        )  # triton reads sources
        return compile(text, self.path, "exec", dont_inherit=True)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if not fullname.startswith("empcause"):
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is None:
                continue
            if fullname == "empcause._C" and REPLACED.endswith("_C"):
                loader = importlib.machinery.ExtensionFileLoader(fullname, REPLACEMENT)
                return importlib.machinery.ModuleSpec(fullname, loader, origin=REPLACEMENT)
            if spec.origin is not None and os.path.realpath(spec.origin) == REPLACED:
                spec.loader = _Source(fullname, spec.origin)
            return spec
        return None


if REPLACED and REPLACEMENT:
    sys.meta_path.insert(0, _Finder())
