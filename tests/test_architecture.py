"""Arrows between the parts of the package go one way: no part imports one that stands on it, inside functions neither."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "empcause"

# From the ground up; a module imports its own part and parts of lower levels. Modules of the first level know of no part.
LEVELS = (
    ("__version__", "errors", "files", "hub", "on_import", "outputs", "ranges", "text", "checkpoints"),
    ("_C", "kernels"),
    ("ops",),
    ("data", "integration", "testing"),
    ("__init__", "metrics"),
    ("extractor",),
    ("generator",),
    ("systems",),
    ("evaluation",),
    ("training",),
    ("reproduction",),
    ("benchmarks",),
    ("cli",),
    ("__main__",),
)
LEVEL = {part: level for level, parts in enumerate(LEVELS) for part in parts}


def imports(source: str) -> Iterator[tuple[int, str]]:
    """Line and full name of everything of this package that a module imports, wherever in it.

    Raises:
        ValueError: an import is relative, which this package does without.
    """
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"line {node.lineno} has a relative import; write the full name.")
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "import_module":
            # A name that is put together when the program runs cannot be judged.
            names = [str(word.value) for word in node.args[:1] if isinstance(word, ast.Constant)]
        yield from ((node.lineno, name) for name in names if name.split(".")[0] == "empcause")


def part_of(name: str) -> str:
    """The part that a module or a name in it belongs to; what the package itself offers belongs to its `__init__`."""
    part = (*name.split("."), "__init__")[1]
    is_part = part in LEVEL or (PACKAGE / part).is_dir() or (PACKAGE / f"{part}.py").exists()
    return part if is_part else "__init__"


def wrong_imports(source: str, module: str) -> list[str]:
    """The imports of a module that do not go down, each as a sentence."""
    part = part_of(module)
    if part not in LEVEL:
        return [f"{module}: {part} has no place in LEVELS yet"]
    found = []
    for line, name in imports(source):
        other = part_of(name)
        if other != part and LEVEL.get(other, len(LEVELS)) >= LEVEL[part] > 0:
            found.append(f"{module}, line {line}: imports {name}, but {part} does not stand on {other}")
        elif LEVEL[part] == 0 < LEVEL.get(other, len(LEVELS)):
            found.append(f"{module}, line {line}: imports {name}, but {part} belongs to the ground")
    return found


def test_imports_go_down():
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        names = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found += wrong_imports(path.read_text(encoding="utf-8"), ".".join(names))
    assert not found, "\n".join(found)


def test_an_import_that_goes_up_is_named():
    inside = "def f():\n    from empcause.training import common\n"
    assert wrong_imports(inside, "empcause.systems.own") == [
        "empcause.systems.own, line 2: imports empcause.training.common, but systems does not stand on training"
    ]
    assert wrong_imports(inside, "empcause.cli.train") == []
    named = 'importlib.import_module("empcause.cli.main")'
    assert "imports empcause.cli.main" in wrong_imports(named, "empcause.data.words")[0]
    assert (
        "metrics does not stand on __init__"
        in wrong_imports("from empcause import steer", "empcause.metrics.causes")[0]
    )
    assert wrong_imports("from empcause import __version__", "empcause.ops.backends") == []
    assert wrong_imports("import empcause.data", "empcause.data.words") == []
    sideways = wrong_imports("from empcause.integration import steer", "empcause.data.words")
    assert "data does not stand on integration" in sideways[0]
    assert "text belongs to the ground" in wrong_imports("import empcause.ops", "empcause.text")[0]
    assert wrong_imports("from empcause.errors import UserError", "empcause.text") == []
