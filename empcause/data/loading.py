"""EmpatheticDialogues and EmoCause, read row by row; a malformed row is named by file and line."""

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import IO, Any

from empcause.data.records import EMOTIONS, LISTENER, SPEAKER, SPLITS, CauseAnnotation, Dialogue, response_pairs
from empcause.data.source import EMOCAUSE, EMPATHETIC_DIALOGUES, open_split
from empcause.data.words import locate_words
from empcause.errors import UserError

COLUMNS = ("conv_id", "utterance_idx", "context", "prompt", "speaker_idx", "utterance", "selfeval", "tags")

# Receives the place ("file:line") and what is wrong there.
Report = Callable[[str, str], None]


def load_dialogues(split: str, data: str | os.PathLike[str] | None = None) -> list[Dialogue]:
    """Load a split of EmpatheticDialogues.

    Args:
        split: "train", "valid" or "test".
        data: "sample" (embedded), a path, or None (`$EMPCAUSE_DATA_DIR`, otherwise the download).

    Raises:
        UserError: the data is missing, or a row is malformed (named by file and line).
    """
    _check_split(split)
    with open_split(EMPATHETIC_DIALOGUES, split, data) as (stream, name):
        return _parse_dialogues(stream, name, _refuse)


def load_annotations(split: str, data: str | os.PathLike[str] | None = None) -> list[CauseAnnotation]:
    """Load a split of EmoCause; situations without an annotated word are left out.

    Args:
        split: "valid" or "test"; the embedded sample has "train" as well.
        data: see `load_dialogues`.

    Raises:
        UserError: the data is missing, or a record is malformed (named by file and number).
    """
    _check_split(split)
    with open_split(EMOCAUSE, split, data) as (stream, name):
        return _parse_annotations(stream, name, _refuse)


@dataclass
class DataCheck:
    """What `check_data` found: counts per file, and every malformed row as `file:line: what is wrong`."""

    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def check_data(data: str | os.PathLike[str] | None = None) -> DataCheck:
    """Read everything, counting instead of stopping at the first malformed row.

    Raises:
        UserError: a split of EmpatheticDialogues, or EmoCause's valid or test split, is missing altogether.
    """
    result = DataCheck()

    def collect(place: str, problem: str) -> None:
        result.problems.append(f"{place}: {problem}")

    for split in SPLITS:
        with open_split(EMPATHETIC_DIALOGUES, split, data) as (stream, name):
            dialogues = _parse_dialogues(stream, name, collect)
        result.counts[f"EmpatheticDialogues {split}"] = {
            "conversations": len(dialogues),
            "utterances": sum(len(dialogue.turns) for dialogue in dialogues),
            "response pairs": len(response_pairs(dialogues)),
            "emotions": len({dialogue.emotion for dialogue in dialogues}),
        }
    for split in ("valid", "test"):
        with open_split(EMOCAUSE, split, data) as (stream, name):
            annotations = _parse_annotations(stream, name, collect)
        result.counts[f"EmoCause {split}"] = {
            "situations": len(annotations),
            "cause words": sum(len(annotation.gold) for annotation in annotations),
            "emotions": len({annotation.emotion for annotation in annotations}),
        }
    return result


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise UserError(f"Unknown split {split!r}; expected one of {', '.join(SPLITS)}.")


def _refuse(place: str, problem: str) -> None:
    raise UserError(f"{place}: {problem}")


def _parse_dialogues(stream: Iterable[str], name: str, report: Report) -> list[Dialogue]:
    """The file is not quoted csv: lines are split at commas, a comma in a text is written `_comma_`."""
    conversations: dict[str, list[tuple[int, str, str, str]]] = {}
    broken = set()
    for number, line in enumerate(stream, start=1):
        fields = line.rstrip("\r\n").split(",")
        if number == 1:
            if missing := [column for column in COLUMNS if column not in fields]:
                raise UserError(f"{name}:1: the header lacks {', '.join(missing)}; expected {','.join(COLUMNS)}.")
            continue
        problem = _row_problem(fields)
        if problem is None:
            conv_id, index, emotion, prompt, _, utterance = fields[:6]
            row = (int(index), emotion, prompt.replace("_comma_", ","), utterance.replace("_comma_", ","))
            rows = conversations.setdefault(conv_id, [])
            if rows and row[0] <= rows[-1][0]:
                problem = f"utterance_idx is {index} after {rows[-1][0]} of the same conversation; it must grow."
            elif rows and emotion != rows[0][1]:
                problem = f"the emotion is {emotion!r}, but {rows[0][1]!r} earlier in the same conversation."
            else:
                rows.append(row)
        if problem is not None:
            broken.add(fields[0])
            report(f"{name}:{number}", problem)
    if not conversations:
        report(f"{name}:1", "the file holds no dialogue.")
    return [
        Dialogue(
            conv_id,
            emotion=rows[0][1],
            situation=rows[0][2].strip(),
            turns=tuple(row[3].strip() for row in rows),
            # Who speaks is the parity of utterance_idx; speaker_idx is arbitrary in the original files.
            roles=tuple(SPEAKER if row[0] % 2 else LISTENER for row in rows),
        )
        for conv_id, rows in conversations.items()
        if conv_id not in broken
    ]


def _row_problem(fields: list[str]) -> str | None:
    if not len(COLUMNS) <= len(fields) <= len(COLUMNS) + 1:
        return f"{len(fields)} fields; expected 8 (or 9 with candidates), commas inside a text written _comma_."
    conv_id, index, emotion, prompt, _, utterance = fields[:6]
    if not conv_id:
        return "conv_id is empty."
    if not index.isdecimal() or int(index) < 1:
        return f"utterance_idx is {index!r}; expected a number from 1."
    if emotion not in EMOTIONS:
        return f"unknown emotion {emotion!r} in the column context; expected one of the 32 of EmpatheticDialogues."
    if not prompt.strip():
        return "the situation (column prompt) is empty."
    if not utterance.strip():
        return "the utterance is empty."
    return None


def _parse_annotations(stream: IO[str], name: str, report: Report) -> list[CauseAnnotation]:
    try:
        records = json.load(stream)
    except json.JSONDecodeError as error:
        raise UserError(f"{name}:{error.lineno}: not valid JSON: {error.msg}.") from error
    if not isinstance(records, list):
        raise UserError(f"{name}:1: expected a JSON list of situations, not a {type(records).__name__}.")
    annotations = []
    for number, record in enumerate(records, start=1):
        try:
            annotations.append(_annotation(record))
        except UserError as error:
            report(f"{name}, record {number}", str(error))
    if not annotations:
        report(f"{name}:1", "the file holds no situation.")
    return [annotation for annotation in annotations if annotation.gold]


def _annotation(record: Any) -> CauseAnnotation:
    needed = ("original_situation", "tokenized_situation", "emotion", "conv_id", "annotation")
    if not isinstance(record, dict) or (missing := [key for key in needed if key not in record]):
        raise UserError(f"the record lacks {', '.join(missing) if isinstance(record, dict) else 'its keys'}.")
    situation, tokens, annotated = (record[key] for key in ("original_situation", "tokenized_situation", "annotation"))
    if not isinstance(situation, str) or not situation.strip():
        raise UserError("the situation is empty.")
    emotion = str(record["emotion"]).strip("_")
    if emotion not in EMOTIONS:
        raise UserError(f"unknown emotion {record['emotion']!r}; expected one of the 32, written like __sad__.")
    words = locate_words(situation, tokens)
    for word, index in annotated:
        if not 0 <= index < len(tokens) or tokens[index] != word:
            raise UserError(f"the annotation [{word!r}, {index}] does not point at that word of tokenized_situation.")
    return CauseAnnotation(
        str(record["conv_id"]), emotion, situation, tuple(words), tuple(index for _, index in annotated)
    )
