"""EmpatheticDialogues and EmoCause, read row by row; a malformed row is named by file and line."""

import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import combinations
from operator import itemgetter
from typing import Any, NoReturn

from empcause.data.dialogue import LISTENER, SPEAKER, Dialogue, response_pairs
from empcause.data.records import EMOTIONS, SPLITS, CauseAnnotation
from empcause.data.source import EMOCAUSE, EMPATHETIC_DIALOGUES, read_split
from empcause.data.words import locate_words
from empcause.errors import UserError

# The header of the original files, and the columns of it that are needed; others may be missing or added, in any order.
COLUMNS = ("conv_id", "utterance_idx", "context", "prompt", "speaker_idx", "utterance", "selfeval", "tags")
NEEDED = ("conv_id", "utterance_idx", "context", "prompt", "utterance")

# Receives the place ("file:line") and what is wrong there.
Report = Callable[[str, str], None]

# A whole field in quotes as writers of ordinary csv make it: what is a quote of the text is doubled.
_QUOTED_FIELD = re.compile(r'"(?<![^,\r\n]")([^"]*+(?:""[^"]*+)*+)"(?![^,\r\n])')
_RATINGS = re.compile(r"(?:[\d|_]*[|_][\d|_]*)?")


def load_dialogues(split: str, data: str | os.PathLike[str] | None = None) -> list[Dialogue]:
    """Load a split of EmpatheticDialogues.

    Args:
        split: "train", "valid" or "test".
        data: "sample" (embedded), a path, or None (`$EMPCAUSE_DATA_DIR`, otherwise the download).

    Raises:
        UserError: the data is missing, or a row is malformed (named by file and line).
    """
    _check_split(split)
    return _parse_dialogues(*read_split(EMPATHETIC_DIALOGUES, split, data), _refuse)


def load_annotations(split: str, data: str | os.PathLike[str] | None = None) -> list[CauseAnnotation]:
    """Load a split of EmoCause; situations without an annotated word are left out.

    Args:
        split: "valid" or "test"; the embedded sample has "train" as well.
        data: see `load_dialogues`.

    Raises:
        UserError: the data is missing, or a record is malformed (named by file and number).
    """
    _check_split(split)
    return _parse_annotations(*read_split(EMOCAUSE, split, data), _refuse)


@dataclass
class DataCheck:
    """What `check_data` found: counts per file, and every problem as `file:line: what is wrong`."""

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

    told: dict[str, set[tuple[str, tuple[str, ...]]]] = {}
    for split in SPLITS:
        text, name = read_split(EMPATHETIC_DIALOGUES, split, data)
        dialogues = _parse_dialogues(text, name, collect)
        told[name] = {(dialogue.situation, dialogue.turns) for dialogue in dialogues}
        result.counts[f"EmpatheticDialogues {split}"] = {
            "conversations": len(dialogues),
            "utterances": sum(len(dialogue.turns) for dialogue in dialogues),
            "response pairs": len(response_pairs(dialogues)),
            "emotions": len({dialogue.emotion for dialogue in dialogues}),
        }
    for one, other in combinations(told, 2):
        if common := len(told[one] & told[other]):
            collect(other, f"{common} of its {len(told[other])} conversations are in {one} too.")
    for split in ("valid", "test"):
        annotations = _parse_annotations(*read_split(EMOCAUSE, split, data), collect)
        result.counts[f"EmoCause {split}"] = {
            "situations": len(annotations),
            "cause words": sum(len(annotation.gold) for annotation in annotations),
            "emotions": len({annotation.emotion for annotation in annotations}),
        }
    return result


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise UserError(f"Unknown split {split!r}; expected one of {', '.join(SPLITS)}.")


def _refuse(place: str, problem: str) -> NoReturn:
    raise UserError(f"{place}: {problem}")


def _parse_dialogues(text: str, name: str, report: Report) -> list[Dialogue]:
    if "\n" not in text:
        text = text.replace("\r", "\n")  # lines of an old Macintosh
    rows = _csv_rows(text, name, report) if _is_csv(text, name) else _original_rows(text)
    _, header = next(rows, (1, []))
    if missing := [column for column in NEEDED if header.count(column) != 1]:
        _refuse(f"{name}:1", f"the header lacks {', '.join(missing)}, or has it twice; expected {','.join(COLUMNS)}.")
    needed = itemgetter(*map(header.index, NEEDED))
    readable = _is_text(text)
    # Per conversation: utterance_idx, emotion, situation and utterance of its rows.
    conversations: dict[str, list[tuple[int, str, str, str]]] = {}
    broken = set()
    for number, fields in rows:
        problem = None if len(fields) == len(header) else _fields_problem(fields, header)
        if problem is None:
            conv_id, index, emotion, situation, utterance = needed(fields)
            problem = _row_problem(conv_id, index, emotion, situation, utterance)
            if not readable and not _is_text("".join(needed(fields))):
                problem = "a byte here is NUL or not UTF-8 text."
        if problem is None:
            row = int(index), emotion, situation, utterance.replace("_comma_", ",").strip()
            before = conversations.setdefault(conv_id, [])
            # Of a conversation that has a malformed row, the order is not judged.
            problem = None if conv_id in broken else _order_problem(row, before)
            before.append(row)
        if problem is not None:
            broken.update(fields[header.index("conv_id") :][:1])
            report(f"{name}:{number}", problem)
    if not conversations:
        report(f"{name}:1", "the file holds no dialogue.")
    return [
        Dialogue(
            conv_id=conv_id,
            emotion=rows[0][1],
            situation=rows[0][2].replace("_comma_", ",").strip(),
            turns=tuple([row[3] for row in rows]),
            # Who speaks is the parity of utterance_idx; speaker_idx is arbitrary in the original files.
            roles=tuple([SPEAKER if row[0] % 2 else LISTENER for row in rows]),
        )
        for conv_id, rows in conversations.items()
        if conv_id not in broken
    ]


def _is_csv(text: str, name: str) -> bool:
    """Whether quotes enclose fields, as writers of ordinary csv use them, or are letters, as in the original files.

    Writers of csv enclose what has a comma, a line's end or a quote in it, and double the quotes in it; many enclose
    everything, the header too. So a quote anywhere else is a letter of the original, where commas are `_comma_`.

    Raises:
        UserError: there are quotes, and nothing tells which of the two they are.
    """
    if '"' not in text:
        return False
    if '"' in text[: text.find("\n")]:
        return True
    enclosed = list(_QUOTED_FIELD.finditer(text))
    letters = text.count('"') - sum(match[0].count('"') for match in enclosed)
    # One over several lines may as well begin and end with two unrelated quotes.
    lines = [match[1] for match in enclosed if "\n" not in match[1]]
    ordinary = sum("," in line or '""' in line for line in lines)
    undecided = ordinary or len(lines) < len(enclosed) or len(enclosed) >= text.rstrip().count("\n")
    if ordinary == letters and undecided:
        line = text.count("\n", 0, enclosed[0].start()) + 1
        problem = "it cannot be told whether the quotes enclose this text or belong to it"
        _refuse(f"{name}:{line}", f"{problem}; write the file as csv with the header and every text in quotes.")
    return ordinary > letters


def _original_rows(text: str) -> Iterator[tuple[int, list[str]]]:
    """Line numbers and fields of the original format: a comma in a text is `_comma_`, every other one ends a field."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line := line.removesuffix("\r"):
            yield number, line.split(",")


def _csv_rows(text: str, name: str, report: Report) -> Iterator[tuple[int, list[str]]]:
    """Line numbers (of a row's first line) and fields of ordinary csv."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    while True:
        number = reader.line_num + 1
        try:
            if fields := next(reader):
                yield number, fields
        except StopIteration:
            return
        except csv.Error as error:
            report(f"{name}:{number}", f"not valid csv: {error}.")


def _fields_problem(fields: list[str], header: list[str]) -> str | None:
    """What is wrong with a row that has more or fewer fields than the header."""
    # Rows of the original validation and test files may have one more, without a name: candidates, separated by |.
    original = header == list(COLUMNS)
    if not original or len(fields) != len(COLUMNS) + 1:
        also = " (or 9 with candidates)" if original else ""
        return (
            f"{len(fields)} fields; expected {len(header)}{also}: a text with a comma is in quotes, or the comma is "
            "written _comma_ in a file without such quotes."
        )
    # A comma too many in a text moves what follows by one field.
    _, _, _, _, speaker, _, ratings, tags, candidates = fields
    if "|" not in candidates and not (speaker.isdecimal() and _RATINGS.fullmatch(ratings) and "|" not in tags):
        return "there is a comma too many, which cuts a text short; a comma inside a text is written _comma_."
    return None


def _row_problem(conv_id: str, index: str, emotion: str, situation: str, utterance: str) -> str | None:
    if not conv_id:
        return "conv_id is empty."
    if not index.isdecimal() or len(index) > 9 or int(index) < 1:
        return f"utterance_idx is {index!r}; expected a number from 1."
    if emotion not in EMOTIONS:
        return f"unknown emotion {emotion!r} in the column context; expected one of the 32 of EmpatheticDialogues."
    if not situation.strip():
        return "the situation (column prompt) is empty."
    if not utterance.strip():
        return "the utterance is empty."
    return None


def _order_problem(row: tuple[int, str, str, str], before: list[tuple[int, str, str, str]]) -> str | None:
    """What is wrong with a row after the ones before it of the same conversation."""
    index, emotion, situation, _ = row
    expected = before[-1][0] + 1 if before else 1
    if index != expected:
        return f"utterance_idx is {index}, but {expected} comes next in this conversation."
    if before and emotion != before[0][1]:
        return f"the emotion is {emotion!r}, but {before[0][1]!r} earlier in the same conversation."
    if before and situation != before[0][2] and situation.strip() != before[0][2].strip():
        return "the situation (column prompt) differs from the one earlier in the same conversation."
    return None


def _is_text(value: str) -> bool:
    """False where there is a NUL, or half of a surrogate pair, as which a byte that is not UTF-8 is decoded too."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in value


def _parse_annotations(text: str, name: str, report: Report) -> list[CauseAnnotation]:
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{name}:{error.lineno}: not valid JSON: {error.msg}.") from error
    except (RecursionError, ValueError) as error:
        raise UserError(f"{name}: not valid JSON: {error}.") from error
    if not isinstance(records, list):
        _refuse(f"{name}:1", f"expected a JSON list of situations, not a {type(records).__name__}.")
    annotations: dict[str, CauseAnnotation] = {}
    for number, record in enumerate(records, start=1):
        try:
            annotation = _annotation(record)
            if annotation.conv_id in annotations:
                raise UserError(f"the conv_id {annotation.conv_id!r} is that of an earlier record too.")
            annotations[annotation.conv_id] = annotation
        except UserError as error:
            report(f"{name}, record {number}", str(error))
    if not annotations:
        report(f"{name}:1", "the file holds no situation.")
    return [annotation for annotation in annotations.values() if annotation.gold]


def _annotation(record: Any) -> CauseAnnotation:
    needed = ("original_situation", "tokenized_situation", "emotion", "conv_id", "annotation")
    if not isinstance(record, dict):
        raise UserError(f"the record is a {type(record).__name__}, not an object with keys and values.")
    if missing := [key for key in needed if key not in record]:
        raise UserError(f"the record lacks {', '.join(missing)}.")
    situation, tokens, emotion, conv_id, annotated = map(record.get, needed)
    if not isinstance(conv_id, str) or not conv_id:
        raise UserError(f"conv_id is {conv_id!r}, not a text.")
    if not isinstance(situation, str) or not situation.strip():
        raise UserError("the situation is empty.")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise UserError("tokenized_situation is not a list of words.")
    if not _is_text(conv_id + situation):
        raise UserError("the situation or conv_id has a NUL byte or half a surrogate pair, which is no text.")
    if not isinstance(emotion, str) or (name := emotion.strip("_")) not in EMOTIONS:
        raise UserError(f"unknown emotion {emotion!r}; expected one of the 32, written like __sad__.")
    words = locate_words(situation, tokens)
    if not isinstance(annotated, list):
        raise UserError("annotation is not a list.")
    for entry in annotated:
        match entry:
            case [word, index] if type(index) is int and 0 <= index < len(tokens) and tokens[index] == word:
                continue
        raise UserError(f"the annotation {entry!r} is not a word and its index in tokenized_situation.")
    return CauseAnnotation(conv_id, name, situation, tuple(words), tuple(index for _, index in annotated))
