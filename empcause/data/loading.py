"""Which data `--data` names, loading them, and checking that they are complete."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from empcause.data.annotation import CauseAnnotation
from empcause.data.dataset import Corpus, Dataset, Licence
from empcause.data.dialogue import Dialogue
from empcause.data.emocause import EMOCAUSE
from empcause.data.empathetic_dialogues import EMPATHETIC_DIALOGUES
from empcause.data.source import SAMPLE, read_split, resolve_data
from empcause.errors import Missing, UserError

# The paper's data. A folder that has the name of no other corpus is read as these.
PAPERS = Corpus("empatheticdialogues", EMPATHETIC_DIALOGUES, EMOCAUSE)
# All corpora that are known by name.
CORPORA = (PAPERS,)
# What `empcause data download` fetches.
DATASETS: tuple[Dataset[Any], ...] = tuple(
    each for corpus in CORPORA for each in (corpus.dialogues, corpus.annotations) if each is not None
)
# Small data of the same format inside of this package, with a licence of their own. All their situations are annotated.
EMBEDDED = Corpus(
    "sample",
    EMPATHETIC_DIALOGUES,
    replace(EMOCAUSE, splits=("train", "valid", "test")),
    "the sample embedded in empcause",
    Licence("apache-2.0", "Apache-2.0"),
)


def find_corpus(data: str | os.PathLike[str] | None = None) -> tuple[Corpus, Path]:
    """Find the corpus that `--data` names, and where its files are.

    Args:
        data: one of:
            - "sample": the data embedded in this package;
            - a folder or an archive: a copy of the corpus of that name or with a data set of that name, otherwise of the paper's
              data;
            - the name of a corpus, where there is no folder of that name: its files in `$EMPCAUSE_DATA_DIR`, or, if that is not
              set, in the folder of `empcause data download`;
            - None: the paper's data, in the same places.

    Returns:
        The corpus, and the folder or archive with its files.

    Raises:
        UserError: there is no such folder; the message says how to get the data.
    """
    if data == EMBEDDED.name:
        return EMBEDDED, SAMPLE
    name = os.path.basename(os.path.abspath(data or ""))
    called = [each for each in CORPORA if each.name == name] or [each for each in CORPORA if name in _file_names(each)]
    corpus = called[0] if data and called else PAPERS
    somewhere = data is None or (str(data) == corpus.name and not Path(data).exists())
    place = resolve_data(None if somewhere else data)
    return (EMBEDDED if place == SAMPLE else corpus), place


def _file_names(corpus: Corpus) -> set[str]:
    """Names of the folders and archives of a corpus' data sets."""
    return {name for each in (corpus.dialogues, corpus.annotations) if each for name in (each.name, each.archive)}


def load_dialogues(split: str, data: str | os.PathLike[str] | None = None) -> list[Dialogue]:
    """Load dialogues.

    Args:
        split: "train", "valid" or "test".
        data: see `find_corpus`.

    Raises:
        Missing: there is no file of this split.
        UserError: there is no such folder, or a row is malformed (named by file and line).
    """
    corpus, place = find_corpus(data)
    return corpus.dialogues.load(split, place, corpus.annotations)


def load_annotations(split: str, data: str | os.PathLike[str] | None = None) -> list[CauseAnnotation]:
    """Load situations with annotated causes; those without an annotated word are left out.

    Args:
        split: "valid" or "test"; the embedded sample has "train" as well.
        data: see `find_corpus`.

    Raises:
        Missing: there are no annotations, or no word is marked in them.
        UserError: a record is malformed (named by file and number), or its emotion is none of the dialogues'.
    """
    corpus, place = find_corpus(data)
    if corpus.annotations is None:
        raise Missing(f"{corpus.dialogues.title} has no annotated causes; give other --data.")
    annotations = corpus.annotations.load(split, place, corpus.dialogues)
    if not annotations:
        raise Missing(f"No word is marked as a cause in {place} (split {split}); give other --data.")
    if problem := _emotions_problem(annotations, corpus):
        raise UserError(f"{corpus.annotations.title} in {place} (split {split}): {problem}")
    return annotations


def _emotions_problem(annotations: Sequence[CauseAnnotation], corpus: Corpus) -> str | None:
    """What is wrong with the emotions of annotations, which an extractor learns together with those of the dialogues."""
    unknown = dict.fromkeys(each.emotion for each in annotations if each.emotion not in corpus.emotions)
    if not unknown:
        return None
    return (
        f"{', '.join(unknown)} are no emotions of {corpus.dialogues.title}, whose names annotations have to use: "
        f"{', '.join(corpus.emotions)}."
    )


@dataclass
class DataCheck:
    """What `check_data` found: counts per file, and every problem as `file:line: what is wrong`."""

    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def check_data(data: str | os.PathLike[str] | None = None) -> DataCheck:
    """Read every split, count its items, and collect all problems instead of stopping at the first one.

    Args:
        data: see `find_corpus`.

    Raises:
        Missing: there is no file of a split.
        UserError: there is no such folder.
    """
    result = DataCheck()

    def collect(where: str, problem: str) -> None:
        result.problems.append(f"{where}: {problem}")

    corpus, place = find_corpus(data)
    told: dict[str, set[tuple[str, tuple[str, ...]]]] = {}
    for split in corpus.dialogues.splits:
        text, name = read_split(corpus.dialogues, split, place, corpus.annotations)
        dialogues = corpus.dialogues.parse(text, name, collect)
        told[name] = {(dialogue.situation, dialogue.turns) for dialogue in dialogues}
        result.counts[f"{corpus.dialogues.title} {split}"] = corpus.dialogues.count(dialogues)
    for one, other in combinations(told, 2):
        if common := len(told[one] & told[other]):
            collect(other, f"{common} of its {len(told[other])} conversations are in {one} too.")
    if (annotated := corpus.annotations) is not None:
        for split in annotated.splits:
            text, name = read_split(annotated, split, place, corpus.dialogues)
            annotations = annotated.parse(text, name, collect)
            if problem := _emotions_problem(annotations, corpus):
                collect(name, problem)
            result.counts[f"{annotated.title} {split}"] = annotated.count(annotations)
    return result
