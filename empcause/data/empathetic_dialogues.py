"""EmpatheticDialogues (Rashkin and others, 2019): dialogues in csv; a malformed row is named by file and line."""

import csv
import io
import re
from collections.abc import Iterator, Sequence
from operator import itemgetter

from empcause.data.dataset import Dataset, Licence, Report, is_text, refuse
from empcause.data.dialogue import LISTENER, SPEAKER, Dialogue, response_pairs

EMOTIONS = tuple(
    "afraid angry annoyed anticipating anxious apprehensive ashamed caring confident content devastated disappointed "
    "disgusted embarrassed excited faithful furious grateful guilty hopeful impressed jealous joyful lonely nostalgic "
    "prepared proud sad sentimental surprised terrified trusting".split()
)

# The header of the original files, and the columns of it that are needed; others may be missing or added, in any order.
COLUMNS = ("conv_id", "utterance_idx", "context", "prompt", "speaker_idx", "utterance", "selfeval", "tags")
NEEDED = ("conv_id", "utterance_idx", "context", "prompt", "utterance")

# A whole field in quotes, as writers of ordinary csv make it; a quote inside the text is doubled.
_QUOTED_FIELD = re.compile(r'"(?<![^,\r\n]")([^"]*+(?:""[^"]*+)*+)"(?![^,\r\n])')
_RATINGS = re.compile(r"(?:[\d|_]*[|_][\d|_]*)?")


def _parse(text: str, name: str, report: Report) -> list[Dialogue]:
    if "\n" not in text:
        text = text.replace("\r", "\n")  # line ends of old Macintosh systems
    rows = _csv_rows(text, name, report) if _is_csv(text, name) else _original_rows(text)
    _, header = next(rows, (1, []))
    if missing := [column for column in NEEDED if header.count(column) != 1]:
        refuse(f"{name}:1", f"the header lacks {', '.join(missing)}, or has it twice; expected {','.join(COLUMNS)}.")
    needed = itemgetter(*map(header.index, NEEDED))
    readable = is_text(text)
    # Per conversation: utterance_idx, emotion, situation and utterance of its rows.
    conversations: dict[str, list[tuple[int, str, str, str]]] = {}
    broken = set()
    for number, fields in rows:
        problem = None if len(fields) == len(header) else _fields_problem(fields, header)
        if problem is None:
            conv_id, index, emotion, situation, utterance = needed(fields)
            problem = _row_problem(conv_id, index, emotion, situation, utterance)
            if not readable and not is_text("".join(needed(fields))):
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
    # Two unrelated quotes on different lines look like one field over several lines, so such fields decide nothing.
    lines = [match[1] for match in enclosed if "\n" not in match[1]]
    ordinary = sum("," in line or '""' in line for line in lines)
    undecided = ordinary or len(lines) < len(enclosed) or len(enclosed) >= text.rstrip().count("\n")
    if ordinary == letters and undecided:
        line = text.count("\n", 0, enclosed[0].start()) + 1
        problem = "it cannot be told whether the quotes enclose this text or belong to it"
        refuse(f"{name}:{line}", f"{problem}; write the file as csv with the header and every text in quotes.")
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
    # A stray comma in a text moves all fields behind it by one.
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
        return f"unknown emotion {emotion!r} in the column context; expected one of the {len(EMOTIONS)} of EmpatheticDialogues."
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


def _count(dialogues: Sequence[Dialogue]) -> dict[str, int]:
    return {
        "conversations": len(dialogues),
        "utterances": sum(len(dialogue.turns) for dialogue in dialogues),
        "response pairs": len(response_pairs(dialogues)),
        "emotions": len({dialogue.emotion for dialogue in dialogues}),
    }


EMPATHETIC_DIALOGUES = Dataset(
    name="empatheticdialogues",
    title="EmpatheticDialogues",
    emotions=EMOTIONS,
    licence=Licence("cc-by-nc-4.0", "CC BY-NC 4.0: non-commercial use only, which a model trained on it inherits"),
    language="en",
    splits=("train", "valid", "test"),
    extension="csv",
    archive="empatheticdialogues.tar.gz",
    url="https://dl.fbaipublicfiles.com/parlai/empatheticdialogues/empatheticdialogues.tar.gz",
    sha256="56f234d77b7dd1f005fd365bb17769cfe346c3c84295b69bc069c8ccb83be03d",
    parse=_parse,
    count=_count,
    published=frozenset(
        (
            "ab0ebfd3de74d71b1c270d983bfadffa1a8cf6a81999bbc7f34d4631c4e5207d",
            "acf298b30f16436f9faa6e62f442de89406d8d71b6f9fc084451dc345d4ead34",
            "3ebb145f0e3aba0943cdd1b40d17d2cb2ca2bb5e9761cd24246b9ced45296a7b",
        )
    ),
)
