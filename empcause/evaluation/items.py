"""Results per test item, saved at once, so that an evaluation that was cut short continues from them."""

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

from empcause.data import Causes, Dialogue, Word
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
from empcause.systems import Reading, Reads, ReadsDialogues, System

SAVED = "saved-items.jsonl"
# What an evaluation writes into its folder.
_FILES = (SAVED, "metrics.json", "items.json", "responses.json", "report.md", "training.png", "causes.png")
_WRITTEN = re.compile("|".join(map(re.escape, _FILES)))


class SavedItems:
    """Results by part of the evaluation and index of the item, in a file to which every batch is added.

    A line is the checksum and the JSON of a batch. The first line that is cut or damaged and all behind it are computed again.

    Args:
        path: the file; it may exist already.
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

    def part(self, name: str) -> dict[int, Any]:
        """The saved results of one part, by index of the item."""
        return dict(self._parts.get(name, {}))

    def each(
        self,
        part: str,
        lengths: Sequence[int],
        batch_size: int,
        compute: Callable[[list[int]], Sequence[Any]],
    ) -> list[Any]:
        """Compute the results of one part, except of batches that are saved already.

        The batches do not depend on what was saved, and so the results do not either.

        Args:
            part: name of the part, also shown at the progress bar.
            lengths: `[n]` lengths of the items; a batch holds items of similar length.
            batch_size: items per batch.
            compute: makes one result, of values that JSON can hold, for each index of a batch.

        Returns:
            One result per item, in the order of the items.

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
    """Reserve a folder for an evaluation, and give what an earlier process has saved there of the same evaluation.

    Args:
        folder: where the results go.
        made_by: the command, for the folder's record.
        subject: everything that the results depend on, by name.
        overwrite: remove what another evaluation left there.

    Yields:
        The saved results.

    Raises:
        UserError: another process works there, the folder holds another evaluation or something else, or the disk is full.
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

    A digest covers the names and contents of all files that the system's loader may have read (see `_model_files`).

    Args:
        system: the system that is evaluated.
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
    """Paths of the files of a model relative to its folder, sorted; files in subfolders are included.

    Files that affect no result are left out: hidden ones, Python's caches, the records of this package, the README.md, which
    people edit, and folders that hold a checkpoint of a training or the results of an evaluation.
    """
    names: list[str] = []
    visited: set[Path] = set()  # links are followed, and one may lead back to a folder above
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
    """Say which of the data's emotions a system does not know, so that its emotion accuracy cannot be measured.

    Args:
        system: a system that finds emotions.
        annotated: the emotions of the items that are evaluated.
        data: what these data are called.

    Returns:
        The beginning of a sentence; None if the system knows all of the emotions.
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
    saved: SavedItems,
    system: Reads,
    texts: Sequence[str] | Sequence[Dialogue],
    words: Sequence[Sequence[Word]],
    batch_size: int,
) -> list[Reading]:
    """Let a system read texts, and save what it finds batch by batch.

    Args:
        saved: where the results go.
        system: the system.
        texts: raw texts, or dialogues, which most systems read as one text.
        words: the words of each text.
        batch_size: texts per batch.

    Raises:
        UserError: what it finds does not fit the texts, or is not finite; nothing of that batch is saved.
    """

    raw = [text.text if isinstance(text, Dialogue) else text for text in texts]
    dialogues = [text for text in texts if isinstance(text, Dialogue)]

    def compute(batch: list[int]) -> list[Any]:
        of_batch = [words[index] for index in batch]
        if dialogues and isinstance(system, ReadsDialogues):
            found = system.read_dialogues([dialogues[index] for index in batch], of_batch, batch_size)
        else:
            found = system.read([raw[index] for index in batch], of_batch, batch_size)
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
            "extracting causes", [len(text) for text in raw], batch_size, compute
        )
    ]


def _check_readings(system: Reads, found: Sequence[Reading], words: Sequence[int]) -> None:
    """Refuse readings of another number or size than the texts and their words, and probabilities that are not finite."""
    folder = system.folders["model"]
    if len(found) != len(words):
        raise UserError(f"The system in {folder} gave {len(found)} readings of {len(words)} texts.")
    for reading, number in zip(found, words, strict=True):
        sizes = {"emotion": (reading.emotion_probs, len(system.emotions)), "word": (reading.word_probs, number)}
        for name, (probs, size) in sizes.items():
            if probs is not None and (np.shape(probs) != (size,) or not np.isfinite(probs).all()):
                raise UserError(
                    f"The system in {folder} gave {name} probabilities of shape {np.shape(probs)} or with values that are not "
                    f"finite; expected {size} finite probabilities."
                )
