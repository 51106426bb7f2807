"""Results per test item, saved as they come: an evaluation that was cut short goes on from them."""

import json
import os
import re
import signal
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from empcause.data import Causes, Word
from empcause.data.batching import length_batches
from empcause.errors import Interrupted, UserError
from empcause.outputs import (
    CHECKPOINT,
    RECORD,
    Record,
    check_ours,
    checksum,
    read_record,
    remove_made,
    why_not_written,
    working_in,
    write_record,
)
from empcause.systems import Reading, Reads, System

SAVED = "saved-items.jsonl"
# What an evaluation writes into its folder.
_FILES = (SAVED, "metrics.json", "items.json", "responses.json", "report.md", "training.png", "causes.png")
_WRITTEN = re.compile("|".join(map(re.escape, _FILES)))


class SavedItems:
    """Results by part of the evaluation and index of the item, in a file to which every batch is added.

    A line is the checksum and the JSON of a batch; from the first line on that is cut or damaged, all is computed again.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._parts: dict[str, dict[int, Any]] = {}
        whole = 0
        for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
            found, _, text = line.rstrip(b"\n").partition(b" ")
            if not line.endswith(b"\n") or found != _checksum(text):
                break
            whole += len(line)
            part, indices, values = json.loads(text)
            self._parts.setdefault(part, {}).update(zip(indices, values, strict=True))
        if path.exists():
            os.truncate(path, whole)

    def __len__(self) -> int:
        return sum(map(len, self._parts.values()))

    def each(
        self,
        part: str,
        lengths: Sequence[int],
        batch_size: int,
        compute: Callable[[list[int]], Sequence[Any]],
    ) -> list[Any]:
        """The results of one part, in the order of the items; only batches that are not saved yet are computed.

        The batches are the same whether anything was saved or not, and so are the results.

        Args:
            part: its name, also of the progress bar.
            lengths: `[n]`; a batch holds items of similar length.
            batch_size: items per batch.
            compute: from the indices of a batch to one result each, of what JSON can hold.

        Raises:
            OSError: a batch cannot be saved.
        """
        saved = self._parts.setdefault(part, {})
        for batch in tqdm(length_batches(lengths, batch_size), desc=part):
            if any(index not in saved for index in batch):
                values = list(compute(batch))
                text = json.dumps([part, batch, values]).encode()
                with self._path.open("ab") as file:
                    file.write(_checksum(text) + b" " + text + b"\n")
                    file.flush()
                    os.fsync(file.fileno())
                saved.update(zip(batch, values, strict=True))
        return [saved[index] for index in range(len(lengths))]


def _checksum(text: bytes) -> bytes:
    return f"{zlib.crc32(text):08x}".encode()


@contextmanager
def evaluating_in(folder: Path, made_by: str, subject: dict[str, Any], overwrite: bool) -> Iterator[SavedItems]:
    """Have a folder for an evaluation alone, with what an earlier process has saved of the same one.

    Args:
        folder: where results go.
        made_by: the command, for the folder's record.
        subject: by name, all on which the results depend.
        overwrite: remove what another evaluation left there.

    Raises:
        UserError: another process works there; it holds another evaluation or something else; the disk is full.
        Interrupted: Ctrl-C or SIGTERM in the block.
    """
    subject = subject | {f"version of {name}": version(name) for name in ("empcause", "torch", "transformers")}
    with working_in(folder):
        about = check_ours(folder, made_by, _WRITTEN).about
        if about and about != subject and not overwrite:
            other = next(name for name in about | subject if about.get(name) != subject.get(name))
            raise UserError(
                f"output_dir {folder} has the evaluation of something else (another {other}); choose another folder, "
                "or remove it with --overwrite_output_dir true."
            )
        if overwrite:
            remove_made(folder)
        write_record(folder, Record(made_by, dict.fromkeys(_FILES), subject))
        items = SavedItems(folder / SAVED)
        try:
            yield items
        except KeyboardInterrupt as stop:
            number = getattr(stop, "signal", signal.SIGINT)
            raise Interrupted(f"interrupted; {_what_is_saved(items, folder)}.", number) from stop
        except (OSError, RuntimeError) as error:
            if (reason := why_not_written(error)) is None:
                raise
            raise UserError(f"The evaluation stopped ({reason}); {_what_is_saved(items, folder)}.") from error


def _what_is_saved(items: SavedItems, folder: Path) -> str:
    if not len(items):
        return "nothing was saved yet"
    return f"{len(items)} results are saved in {folder}, and the same command goes on from there"


def digest(*parts: Any) -> str:
    """SHA-256 of values that JSON can hold, in hexadecimal."""
    return sha256(json.dumps(parts).encode()).hexdigest()


def model_digests(system: System, output_dir: Path) -> dict[str, str]:
    """Digests of the folders that a system was loaded from, by their names in `system.folders`.

    A digest is over names and contents of all files of which the system's loader may have read any (see `_model_files`).

    Args:
        system: what is evaluated.
        output_dir: where the evaluation writes.

    Raises:
        UserError: `output_dir` is one of these folders, where a report would be taken for a part of the model.
        OSError: a file cannot be read.
    """
    for name, folder in system.folders.items():
        if folder.resolve() == output_dir.resolve():
            raise UserError(
                f"output_dir {output_dir} is the folder of the {name} that is evaluated; choose another folder."
            )
    return {
        name: digest([(file, checksum(folder / file)) for file in _model_files(folder)])
        for name, folder in system.folders.items()
    }


def _model_files(folder: Path) -> list[str]:
    """Paths of a model's files from its folder on, sorted, those of subfolders included.

    Left out is what decides no result: hidden files, Python's caches, this package's records, the README.md, which people edit,
    and folders in which a training keeps a checkpoint or an evaluation its results.
    """
    names: list[str] = []
    visited: set[Path] = set()  # a link may lead back to a folder above it
    for place, subfolders, files in os.walk(folder, followlinks=True):
        subfolders.sort()
        here = Path(place)
        made_by = getattr(read_record(here), "made_by", "") if here != folder else ""
        hidden = here != folder and here.name.startswith((".", "__pycache__"))
        if hidden or made_by == CHECKPOINT or made_by.startswith("empcause evaluate ") or here.resolve() in visited:
            subfolders.clear()
            continue
        visited.add(here.resolve())
        names += [
            (here / name).relative_to(folder).as_posix()
            for name in files
            if name not in (RECORD, "README.md") and not name.startswith(".") and (here / name).is_file()
        ]
    return sorted(names)


def unknown_emotions(system: Reads, annotated: Iterable[str], data: str) -> str | None:
    """Why no emotion accuracy can be measured, as the beginning of a sentence; None where the system knows all emotions.

    Args:
        system: it knows emotions.
        annotated: emotions of the items that are evaluated.
        data: what these are called.
    """
    names = dict.fromkeys(annotated)
    unknown = [name for name in names if name not in system.emotions]
    if not unknown:
        return None
    folder = system.folders.get("extractor", system.folders["model"])
    return (
        f"{folder} knows other emotions ({', '.join(system.emotions)}) than {data}, where {len(unknown)} of {len(names)} are "
        f"unknown to it ({', '.join(unknown)})"
    )


def readings(
    saved: SavedItems, system: Reads, texts: Sequence[str], words: Sequence[Sequence[Word]], batch_size: int
) -> list[Reading]:
    """What a system finds in texts, saved batch by batch.

    Raises:
        UserError: what it finds does not fit the texts, or is not finite; nothing of that batch is saved.
    """

    def compute(batch: list[int]) -> list[Any]:
        found = system.read([texts[index] for index in batch], [words[index] for index in batch], batch_size)
        _check_readings(system, found, [len(words[index]) for index in batch])
        arrays = [(each.emotion_probs, each.word_probs, *(each.causes or (None, None))) for each in found]
        return [[None if array is None else array.tolist() for array in each] for each in arrays]

    return [
        Reading(
            emotion_probs=None if emotion_probs is None else np.array(emotion_probs, np.float32),
            word_probs=None if word_probs is None else np.array(word_probs, np.float32),
            causes=None
            if spans is None
            else Causes(np.array(spans, np.int64).reshape(-1, 2), np.array(probs, np.float32)),
        )
        for emotion_probs, word_probs, spans, probs in saved.each(
            "extracting causes", [len(text) for text in texts], batch_size, compute
        )
    ]


def _check_readings(system: Reads, found: Sequence[Reading], words: Sequence[int]) -> None:
    """Refuse what does not fit texts of so many words."""
    folder = system.folders["model"]
    if len(found) != len(words):
        raise UserError(f"The system in {folder} gave {len(found)} readings of {len(words)} texts.")
    for reading, number in zip(found, words, strict=True):
        sizes = {"emotion": (reading.emotion_probs, len(system.emotions)), "word": (reading.word_probs, number)}
        for name, (probs, size) in sizes.items():
            if probs is not None and (np.shape(probs) != (size,) or not np.isfinite(probs).all()):
                raise UserError(
                    f"The system in {folder} gave {name} probabilities of shape {np.shape(probs)}, or such as are not finite, "
                    f"where {size} finite ones are due."
                )
