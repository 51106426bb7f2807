"""The folder of a reproduction: which units it holds, what each was made of, and whether that is still the same.

A unit is the training or the evaluation of one system with one seed. Its name is the path of its folder. What it was made of (its
*subject*) is in the record of the run folder: the options of its recipe, digests of the data, of the systems that it needs and of
the code.
"""

import ast
import hashlib
import importlib.util
import re
from collections.abc import Collection, Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any

import empcause
from empcause.data.loading import find_corpus, load_annotations, load_dialogues
from empcause.data.origin import fingerprint
from empcause.errors import UserError
from empcause.evaluation.items import digest
from empcause.outputs import LOCK, RECORD, Record, check_ours, checksum, remove_made, write_record

MADE_BY = "empcause reproduce"

Subject = dict[str, dict[str, Any]]


class RunFolder:
    """A folder in which `empcause reproduce` works; the process must hold its lock (`working_in`).

    Args:
        path: the folder.
        written: names of what the command writes directly in it.
        accept_code: go on with units that other code made.

    Raises:
        UserError: something else wrote such names there.
    """

    def __init__(self, path: Path, written: Collection[str], accept_code: bool) -> None:
        self.path = path
        self._written = written
        self._accept_code = accept_code
        self._units = check_ours(path, MADE_BY, re.compile("|".join(map(re.escape, written)))).about.get("units", {})
        self._save()

    def _save(self) -> None:
        write_record(self.path, Record(MADE_BY, dict.fromkeys(self._written), {"units": self._units}))

    def begin(self, unit: str, subject: Subject, redo: str) -> bool:
        """Note what a unit is made of before it is made, or compare that with what the folder holds of it.

        Args:
            unit: name of the unit.
            subject: what it is made of, by kind: "recipe", "data", "systems", "code".
            redo: the system's name, for the message.

        Returns:
            Whether the unit is finished, and as it was then.

        Raises:
            UserError: the folder holds a unit of this name that was made of something else, or was changed afterwards.
        """
        known = self._units.get(unit)
        if known is None:
            if (self.path / unit).exists():
                raise UserError(
                    f"{self.path / unit} exists, and {self.path} does not say how it was made; remove it, or choose another "
                    "--output_dir."
                )
            self._units[unit] = {"subject": subject}
            self._save()
            return False
        problem = _changed(known["subject"], subject, without=["code"] if self._accept_code else [])
        if problem:
            raise UserError(
                f"{self.path / unit} {problem}; --redo {redo} makes it anew, another --output_dir keeps it"
                f"{', --accept_code goes on with it' if 'code' in problem else ''}."
            )
        finished = known.get("finished")
        for name, expected in (finished or {}).items():
            path = self.path / unit / name
            if not path.is_file() or checksum(path) != expected:
                raise UserError(f"{path} is not as it was saved; --redo {redo} makes it anew.")
        if finished is None and known["subject"]["code"] != subject["code"]:
            known.setdefault("continued by", []).append(digest(subject["code"]))
            self._save()
        return finished is not None

    def finish(self, unit: str, files: Collection[str]) -> None:
        """Note that a unit is finished, with the checksums of its files."""
        self._units[unit]["finished"] = {name: checksum(self.path / unit / name) for name in files}
        self._save()

    def is_finished(self, unit: str) -> bool:
        """Whether a unit is finished."""
        return "finished" in self._units.get(unit, {})

    def made(self, unit: str) -> dict[str, Any]:
        """How a finished unit was made: digests of its files and of the code."""
        known = self._units[unit]
        codes = [digest(known["subject"]["code"]), *known.get("continued by", [])]
        return {"files": digest(known["finished"]), "code": codes, "recipe": known["subject"]["recipe"]}

    def remove(self, system: str) -> None:
        """Remove all units of a system, with what they wrote.

        Raises:
            UserError: the folder holds none.
        """
        units = [unit for unit, each in self._units.items() if each["subject"]["recipe"]["system"] == system]
        if not units:
            raise UserError(f"--redo {system}: {self.path} holds nothing of it.")
        for unit in units:
            folder = self.path / unit
            # A system of several parts has trained each in a folder of its own inside of the unit's; inner ones come first.
            for made in sorted((path.parent for path in folder.rglob(RECORD)), key=lambda path: -len(path.parts)):
                remove_made(made)
                (made / LOCK).unlink(missing_ok=True)
                with suppress(OSError):  # where something else is in it, it stays
                    made.rmdir()
            del self._units[unit]
            self._save()


def _changed(old: Subject, new: Subject, without: Collection[str]) -> str | None:
    """Say in which of its parts a unit's subject is another one, as the middle of a sentence; None if it is the same."""
    words = {
        "recipe": "was made with {name} {old}, and its recipe has {new} now",
        "data": "was made of other data (the split {name} is another one)",
        "systems": "was made with another system {name}",
        "code": "was made by other code ({name} has changed)",
    }
    for kind, sentence in words.items():
        if kind in without:
            continue
        before, now = old[kind], new[kind]
        for name in {**before, **now}:
            if before.get(name) != now.get(name):
                return sentence.format(name=name, old=before.get(name), new=now.get(name))
    return None


def data_digests(data: str | None) -> dict[str, str]:
    """Digest of every split of the data, by its name.

    Raises:
        UserError: data are missing or malformed.
    """
    corpus, _ = find_corpus(data)
    found = {}
    for split in corpus.dialogues.splits:
        found[f"{split} of the dialogues"] = fingerprint(load_dialogues(split, data))
    for split in corpus.annotations.splits if corpus.annotations else ():
        found[f"{split} of the annotations"] = fingerprint(load_annotations(split, data))
    return found


def code_digests(module: str) -> dict[str, str]:
    """Digest of every module of this package that a module imports, itself and those in between included, by its path."""
    root = Path(empcause.__file__).parent
    seen: dict[str, str] = {}
    waiting = [module]
    while waiting:
        path = _source(waiting.pop())
        if path is None or not path.is_relative_to(root):
            continue
        name = path.relative_to(root.parent).as_posix()
        if name in seen:
            continue
        text = path.read_bytes()
        seen[name] = hashlib.sha256(text).hexdigest()[:16]
        waiting += _imported(ast.parse(text))
    return dict(sorted(seen.items()))


def _imported(tree: ast.AST) -> Iterator[str]:
    """Full names of everything of this package that a module imports, and of the packages above it."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            parts = name.split(".")
            if parts[0] == "empcause":
                yield from (".".join(parts[:end]) for end in range(2, len(parts) + 1))


def _source(module: str) -> Path | None:
    """The source file of a module; None for a name that is no module."""
    try:
        spec = importlib.util.find_spec(module)
    except (ModuleNotFoundError, ValueError):
        return None
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


def versions() -> dict[str, str]:
    """Versions of what results depend on, by name."""
    names = ("empcause", "torch", "transformers", "tokenizers", "numpy")
    return {"python": python_version()} | {name: version(name) for name in names}
