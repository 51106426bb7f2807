"""Data that are not as they should be: in another format, malformed, damaged, out of reach, or cut off while they come."""

import csv
import gzip
import hashlib
import io
import json
import random
import tarfile
import tempfile
import threading
import time
import zipfile
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from empcause.cli import main
from empcause.data import (
    EMPATHETIC_DIALOGUES,
    CauseAnnotation,
    Corpus,
    Dialogue,
    check_data,
    download,
    load_annotations,
    load_dialogues,
    split_words,
)
from empcause.data import source as data_source
from empcause.data.collation import pad_batch
from empcause.data.loading import PAPERS
from empcause.data.sequences import encode_dialogue
from empcause.errors import Missing, UserError
from empcause.extractor.encoding import encode_text
from faults.injection import unprivileged
from faults.kinds import Guard, fault

DIALOGUE_FILES, CAUSE_FILES = "empcause/data/empathetic_dialogues.py", "empcause/data/emocause.py"
DATASET, LOADING, SOURCE = "empcause/data/dataset.py", "empcause/data/loading.py", "empcause/data/source.py"
COLUMNS = ["conv_id", "utterance_idx", "context", "prompt", "speaker_idx", "utterance", "selfeval", "tags"]

# Per dialogue: its emotion, its situation and its turns. Quotes and commas stand wherever they can trouble a reader.
DIALOGUES = {
    "c:1": ("sad", 'My dog, "Rex", died.', ('"Rex" was old, very old.', 'I\'m "sorry", truly.', '"Thanks."')),
    "c:2": ("joyful", "We won!", ("We won the cup, at last", "Great")),
    "c:3": ("angry", 'They said "no"', ('"No", they said, "never"', "Why?", ",", '"')),
}
RECORD = {
    "original_situation": "My dog died.",
    "tokenized_situation": ["My", "dog", "died", "."],
    "emotion": "__sad__",
    "conv_id": "c:1",
    "annotation": [["dog", 1], ["died", 2]],
}


def rows(dialogues=DIALOGUES):
    """Rows of the eight columns."""
    return [
        [conv_id, str(index), emotion, situation, str(index % 2), turn, "", ""]
        for conv_id, (emotion, situation, turns) in dialogues.items()
        for index, turn in enumerate(turns, start=1)
    ]


def original(table):
    """A file as the original ones are: commas of a text are `_comma_`, quotes are letters."""
    return "".join(",".join(field.replace(",", "_comma_") for field in row) + "\n" for row in [COLUMNS, *table])


def ordinary(table, header=COLUMNS, **options):
    """A file as Python's csv module writes it."""
    stream = io.StringIO(newline="")
    csv.writer(stream, **options).writerows([header, *table])
    return stream.getvalue()


def read(folder, content):
    """The dialogues of a training file with this content, in the form of `DIALOGUES`."""
    content = content if isinstance(content, bytes) else content.encode()
    (folder / "train.csv").write_bytes(content)
    return {one.conv_id: (one.emotion, one.situation, one.turns) for one in load_dialogues("train", folder)}


def refusal(call, *arguments):
    """The sentence with which a call is refused."""
    with pytest.raises(UserError) as caught:
        call(*arguments)
    return str(caught.value)


@fault(
    Guard(DIALOGUE_FILES, """if '"' in text[: text.find("\\n")]:""", "if False:"),
    Guard(DIALOGUE_FILES, "return ordinary > letters", "return False"),
    cause="a csv file is written by an ordinary writer, with quotes around texts and real commas in them",
    place="reading EmpatheticDialogues",
    promise="every text is read whole, whichever fields the writer puts in quotes",
)
def test_ordinary_csv(tmp_path):
    longer = DIALOGUES | {"c:4": ("proud", "Two\nlines, one text", ('He said:\r\n"yes"', "x" * 100_000 + ","))}
    for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC):
        for end in ("\r\n", "\n"):
            content = ordinary(rows(longer), quoting=quoting, lineterminator=end)
            assert read(tmp_path, content) == longer, (quoting, end)
    plain = {"c:1": ("sad", "It rained.", ("All day.", "Oh no."))}
    assert read(tmp_path, ordinary(rows(plain), quoting=csv.QUOTE_ALL)) == plain
    kept = [[field.replace(",", "_comma_") for field in row] for row in rows()]
    assert read(tmp_path, ordinary(kept)) == DIALOGUES


@fault(
    Guard(DIALOGUE_FILES, "return ordinary > letters", "return True"),
    cause="texts of an original file begin or end with a quote",
    place="reading EmpatheticDialogues",
    promise="quotes are letters there, and no line runs into the next one",
)
def test_quotes_of_the_original_files_are_letters(tmp_path):
    assert read(tmp_path, original(rows())) == DIALOGUES
    spanning = {"c:1": ("sad", "Rain", ('"Never" said he', '"And', 'then"', "it ended")), "c:2": DIALOGUES["c:2"]}
    assert read(tmp_path, original(rows(spanning))) == spanning


@fault(
    Guard(DIALOGUE_FILES, "if ordinary == letters and undecided:", "if False:"),
    cause="nothing in a csv file tells whether quotes enclose its texts or belong to them",
    place="reading EmpatheticDialogues",
    promise="the first such line is named, with the form of the file that tells it; in that form it is read",
)
def test_quotes_that_may_be_either(tmp_path):
    table = rows({"c:1": ("sad", "Rain", ("All day", "Oh no"))})
    quoted = [[f'"{field}"' if column in (3, 5) else field for column, field in enumerate(row)] for row in table]
    lines = original(table).replace("Rain", '"Rain', 1).replace("Oh no", 'Oh no"')  # or one text over two lines
    for content in (original(quoted), lines):
        assert "train.csv:2: it cannot be told whether the quotes" in refusal(read, tmp_path, content)
    for dialogue in (table, quoted):
        texts = read(tmp_path, ordinary(dialogue, quoting=csv.QUOTE_ALL))["c:1"]
        assert texts == ("sad", dialogue[0][3], (dialogue[0][5], dialogue[1][5]))


@fault(
    Guard(DIALOGUE_FILES, "itemgetter(*map(header.index, NEEDED))", "itemgetter(0, 1, 2, 3, 5)"),
    Guard(DIALOGUE_FILES, "if header.count(column) != 1", "if column not in header"),
    cause="columns are in another order, missing or duplicated",
    place="reading EmpatheticDialogues",
    promise="columns are found by their names, unknown ones are ignored; missing and duplicated ones are named",
)
def test_columns_go_by_name(tmp_path):
    order = [5, 3, 0, 2, 1]
    table = [[str(number), *(row[column] for column in order)] for number, row in enumerate(rows())]
    header = ["", *(COLUMNS[column] for column in order)]
    assert read(tmp_path, ordinary(table, header)) == DIALOGUES
    assert read(tmp_path, ordinary(table, header, quoting=csv.QUOTE_ALL)) == DIALOGUES
    header[1] = "text"
    assert "train.csv:1: the header lacks utterance, or has it twice" in refusal(
        read, tmp_path, ordinary(table, header)
    )
    header[1] = header[2]
    assert "lacks prompt, utterance, or has it twice" in refusal(read, tmp_path, ordinary(table, header))


@pytest.mark.parametrize("place", ["utterance", "prompt", "number", "end"])
@fault(
    Guard(DIALOGUE_FILES, 'if "|" not in candidates and not (', "if False and not ("),
    cause="a stray comma in a text of an original file",
    place="reading EmpatheticDialogues, whose rows may have a ninth field",
    promise="the line is named; rows with candidates are read as before",
)
def test_stray_comma(tmp_path, place):
    stray = {
        "utterance": "c:1,2,sad,Rain,1,Well, that is bad,5|5|5_2|2|5,\n",
        "prompt": "c:1,2,sad,Rain, much of it,1,Well,5|5|5_2|2|5,\n",
        "number": "c:1,2,sad,Rain,1,It cost 3,500,5|5|5_2|2|5,\n",
        "end": "c:1,2,sad,Rain,1,Well,,5|5|5_2|2|5,\n",
    }[place]
    lines = ",".join(COLUMNS) + "\nc:1,1,sad,Rain,7,All day,5|5|5_2|2|5,\n"
    assert "train.csv:3: there is a comma too many" in refusal(read, tmp_path, lines + stray)
    for ninth in ("one|two_comma_ too", ""):
        assert read(tmp_path, f"{lines}c:1,2,sad,Rain,1,Well,5|5|5_2|2|5,<HI>,{ninth}\n") == {
            "c:1": ("sad", "Rain", ("All day", "Well"))
        }


@fault(
    Guard(DIALOGUE_FILES, "if index != expected:", "if before and index <= before[-1][0]:"),
    Guard(DIALOGUE_FILES, "None if conv_id in broken else _order_problem", "_order_problem"),
    cause="a turn of a dialogue is missing, repeated or out of order",
    place="reading EmpatheticDialogues",
    promise="no dialogue with a gap is read: the line is named, and `empcause data check` lists every such line once",
)
def test_turns_are_complete(tmp_path):
    table = rows()
    faulty = {"missing": [0, 2, 3, 4], "first": [1, 2, 3, 4], "repeated": [0, 1, 1, 2, 3, 4], "order": [0, 2, 1, 3, 4]}
    lines = {"missing": 3, "first": 2, "repeated": 4, "order": 3}
    for name, chosen in faulty.items():
        said = refusal(read, tmp_path, original([table[index] for index in chosen]))
        assert f"train.csv:{lines[name]}: utterance_idx is" in said, name
    table[1][2], table[4][1] = "gloomy", "3"
    whole = rows({"c:8": ("sad", "Rain", ("All day", "Oh"))})
    for split, content in (("train", table), ("valid", whole), ("test", [[*row[:5], "x", "", ""] for row in whole])):
        (tmp_path / f"{split}.csv").write_text(original(content))
    for split in ("valid", "test"):
        (tmp_path / f"{split}.json").write_text(json.dumps([RECORD]))
    found = check_data(tmp_path)
    assert [problem.partition("train.csv:")[2].partition(":")[0] for problem in found.problems] == ["3", "6"]
    assert found.counts["EmpatheticDialogues train"]["conversations"] == 1


@fault(
    Guard(SOURCE, '"utf-8-sig"', '"utf-8"'),
    Guard(DIALOGUE_FILES, 'text = text.replace("\\r", "\\n")', "pass"),
    Guard(DIALOGUE_FILES, 'if line := line.removesuffix("\\r"):', "if True:"),
    cause="a file begins with a byte order mark, has the line ends of another system, or empty lines",
    place="reading EmpatheticDialogues and EmoCause",
    promise="the same dialogues and situations",
)
def test_marks_and_line_ends(tmp_path):
    text = original(rows())
    for content in (
        b"\xef\xbb\xbf" + text.encode(),
        text.replace("\n", "\r\n").encode(),
        text.replace("\n", "\r").encode(),
        text.replace("\n", "\n\n").encode() + b"\r\n\n",
        text.replace("\n", "\r\n", 3).encode().removesuffix(b"\n"),
        b"\xef\xbb\xbf" + ordinary(rows(), quoting=csv.QUOTE_ALL).encode(),
    ):
        assert read(tmp_path, content) == DIALOGUES
    (tmp_path / "test.json").write_bytes(b"\xef\xbb\xbf" + json.dumps([RECORD], indent=1).encode())
    assert load_annotations("test", tmp_path)[0].gold == (1, 2)


@fault(
    Guard(SOURCE, '"surrogateescape"', '"replace"'),
    Guard(DATASET, 'return "\\0" not in value', "return True"),
    Guard(CAUSE_FILES, "if not is_text(conv_id + situation):", "if False:"),
    cause="bytes that are not UTF-8, NUL bytes, or halves of surrogate pairs",
    place="reading EmpatheticDialogues and EmoCause",
    promise="the line or record is named; every other text, emoji included, is read as it is",
)
def test_what_is_no_text(tmp_path):
    fine = {"c:1": ("sad", "naïve 😀 \u2028", ("e\u0301 \u200b", "мой брат"))}
    assert read(tmp_path, original(rows(fine))) == {"c:1": ("sad", "naïve 😀", ("e\u0301 \u200b", "мой брат"))}
    for bad in (b"caf\xe9", b"a\0b", b"\xed\xa0\x80"):
        for content in (original(rows()), ordinary(rows())):
            said = refusal(read, tmp_path, content.encode().replace(b"at last", bad))
            assert "train.csv:5: a byte here is NUL or not UTF-8 text" in said
    for bad in ("\\ud83d", "\\u0000"):
        (tmp_path / "test.json").write_text(json.dumps([RECORD]).replace("My dog", f"My dog {bad}"))
        assert "test.json, record 1: the situation or conv_id has a NUL" in refusal(load_annotations, "test", tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("not an object", "the record is a str, not an object"),
        ({"tokenized_situation": "My dog died."}, "tokenized_situation is not a list of words"),
        ({"tokenized_situation": ["My", None]}, "tokenized_situation is not a list of words"),
        ({"annotation": None}, "annotation is not a list"),
        ({"annotation": ["dog"]}, "the annotation 'dog' is not a word and its index"),
        ({"annotation": [["dog", "1"]]}, "the annotation ['dog', '1'] is not a word and its index"),
        ({"annotation": [["dog", True]]}, "the annotation ['dog', True] is not a word and its index"),
        ({"annotation": [["dog", float("nan")]]}, "the annotation ['dog', nan] is not a word and its index"),
        ({"annotation": [["dog", -3]]}, "the annotation ['dog', -3] is not a word and its index"),
        ({"emotion": 7}, "unknown emotion 7"),
        ({"conv_id": 12}, "conv_id is 12, not a text"),
        ({"conv_id": "c:1"}, "the conv_id 'c:1' is that of an earlier record too"),
        ({"original_situation": ["My"]}, "the situation is empty"),
    ],
)
@fault(
    Guard(CAUSE_FILES, "if type(index) is int and 0 <= index < len(tokens)", "if index < len(tokens)"),
    Guard(
        CAUSE_FILES,
        "if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):",
        "if False:",
    ),
    Guard(CAUSE_FILES, "if annotation.conv_id in annotations:", "if False:"),
    Guard(CAUSE_FILES, "if not isinstance(conv_id, str) or not conv_id:", "if False:"),
    cause="an entry of EmoCause has another type than it should, points nowhere, or is there twice",
    place="reading EmoCause",
    promise="one sentence with the file and the record's number; `empcause data check` goes on to the next",
)
def test_types_of_emocause(tmp_path, change, said):
    second = RECORD | {"conv_id": "c:2"} | change if isinstance(change, dict) else change
    (tmp_path / "test.json").write_text(json.dumps([RECORD, second, second, RECORD | {"conv_id": "c:3"}]))
    assert f"test.json, record 2: {said}" in refusal(load_annotations, "test", tmp_path)


@fault(
    Guard(CAUSE_FILES, "except (RecursionError, ValueError) as error:", "except MemoryError as error:"),
    cause="a file of EmoCause is empty, cut short, not JSON, or nested without an end",
    place="reading EmoCause",
    promise="one sentence with the file",
)
def test_damaged_json(tmp_path):
    for content in ("", "[{]", json.dumps([RECORD])[:-20], "[" * 100_000, "[1" + "0" * 5000 + "]", "{}", "[]"):
        (tmp_path / "test.json").write_text(content)
        assert "test.json:" in refusal(load_annotations, "test", tmp_path)


@fault(
    Guard(SOURCE, "if root.is_file() and not _is_archive(root):", "if False:"),
    cause="--data names one file, though training, validation and test need three",
    place="every command that reads data",
    promise="refused with the layout that works; the same file is never used for two purposes",
)
def test_one_file_for_all_splits(tmp_path, capsys):
    for file in (tmp_path / "train.csv", tmp_path / "train.csv.gz", tmp_path / "data.txt"):
        opener = gzip.open if file.suffix == ".gz" else open
        with opener(file, "wb") as stream:
            stream.write(original(rows()).encode())
        for split in ("train", "valid"):
            said = refusal(load_dialogues, split, file)
            assert (
                f"{file} is one file, but empatheticdialogues has 3 splits: give the folder of train.csv, valid" in said
            )
    assert main(["data", "check", "--data", str(tmp_path / "train.csv")]) == 2
    assert "has 3 splits" in capsys.readouterr().err


def parse_lines(text, name, report):
    """Dialogues of two turns or annotations, one a line; a line does not show which of the two it is."""
    return [Dialogue(tuple(line.split("|")), (0, 1), emotion="glad") for line in text.splitlines()]


def parse_marked(text, name, report):
    lines = text.splitlines()
    return [CauseAnnotation(line, "glad", line, tuple(split_words(line)), (0,)) for line in lines]


@pytest.fixture
def lines(monkeypatch):
    """A corpus of whose files nothing but the place says which of its data sets they belong to."""
    told = replace(
        EMPATHETIC_DIALOGUES, name="letters", title="Letters", emotions=("glad", "glum"), extension="txt",
        archive="letters.zip", parse=parse_lines, count=lambda items: {"letters": len(items)},
    )  # fmt: skip
    marked = replace(told, name="notes", title="Notes", archive="notes.zip", parse=parse_marked)
    monkeypatch.setattr("empcause.data.loading.CORPORA", (PAPERS, Corpus("letters", told, marked)))
    return told, marked


@fault(
    Guard(SOURCE, "    if not ambiguous or _name(root) == dataset.name:\n", "    if True:\n"),
    Guard(SOURCE, "    if other is not None and _name(root) == other.name != dataset.name:\n", "    if False:\n"),
    Guard(SOURCE, "dataset if ambiguous else None", "None"),
    Guard(LOADING, " or [each for each in CORPORA if name in _file_names(each)]", ""),
    Guard(SOURCE, "if other is not None and ambiguous and _name(root) != other.name:", "if False:"),
    cause="files of dialogues and of annotations have the same names, and --data names one of their folders or archives",
    place="every command that reads data",
    promise="each is found in the folder or archive of its data set's name, beside the other one; else refused by name",
)
def test_files_of_the_other_data_set(tmp_path, lines, monkeypatch):
    for name, text in (("letters", "It rains.|Oh."), ("notes", "It rained.")):
        (tmp_path / name).mkdir()
        for split in ("train", "valid", "test"):
            (tmp_path / name / f"{split}.txt").write_text(text)
    monkeypatch.chdir(tmp_path)
    for place in (tmp_path / "letters", "letters", "../" + tmp_path.name + "/letters/", "notes"):
        assert load_dialogues("train", place)[0].turns == ("It rains.", "Oh.")
        assert load_annotations("valid", place)[0].situation == "It rained."
        assert not check_data(place).problems[3:], "no more than that the splits share dialogues"
    monkeypatch.chdir(tmp_path / "letters")
    assert load_annotations("valid", ".")[0].situation == "It rained."

    told, marked = lines
    for dataset, other in (lines, lines[::-1]):
        with pytest.raises(
            UserError, match=r"valid\.txt may be a file of \w+ or of \w+; put it into a folder (letters|notes) or"
        ):
            dataset.load("valid", (tmp_path / "letters").rename(tmp_path / "mixed"), other)
        (tmp_path / "mixed").rename(tmp_path / "letters")
    (tmp_path / "notes" / "valid.txt").unlink()
    with pytest.raises(Missing, match=r"letters has no notes/valid\.txt"):
        load_annotations("valid", tmp_path / "letters")

    texts = [("valid.txt", b"It rains.|Oh.")]
    for archive, files, reads in (
        ("letters.zip", texts, [told]),
        ("notes.zip", texts, [marked]),
        ("both.zip", [(f"notes/{name}", text) for name, text in texts], [marked]),
        ("both.zip", texts, []),
    ):
        (tmp_path / archive).write_bytes(packed(files, "zip"))
        if archive == "notes.zip":
            assert load_annotations("valid", tmp_path / archive)[0].situation == "It rains.|Oh.", (
                "it is known by its name"
            )
        for dataset, other in (lines, lines[::-1]):
            if dataset in reads:
                assert len(dataset.load("valid", tmp_path / archive, other)) == 1
            else:
                with pytest.raises(Missing, match=f"must hold one {dataset.name}/valid.txt; it holds 0"):
                    dataset.load("valid", tmp_path / archive, other)


@fault(
    Guard(
        LOADING,
        "    if problem := _emotions_problem(annotations, corpus):\n        raise",
        "    if problem := 0:\n        raise",
    ),
    Guard(
        LOADING, "            if problem := _emotions_problem(annotations, corpus):\n", "            if problem := 0:\n"
    ),
    cause="annotations have emotions of another set than the dialogues",
    place="empcause data check, train extractor, evaluate extractor",
    promise="the emotions that are not those of the dialogues are named, with those that are",
)
def test_emotions_of_another_set(tmp_path, lines, monkeypatch, capsys):
    told, marked = lines
    sad = replace(
        marked, emotions=("sad",), parse=lambda *given: [replace(each, emotion="sad") for each in parse_marked(*given)]
    )
    monkeypatch.setattr("empcause.data.loading.CORPORA", (PAPERS, Corpus("letters", told, sad)))
    for split in ("train", "valid", "test"):
        for name in ("letters", "notes"):
            (tmp_path / "letters" / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / "letters" / name / f"{split}.txt").write_text(f"It rains in {split}.|Oh.")
    message = "sad are no emotions of Letters, whose names annotations have to use: glad, glum."
    said = refusal(load_annotations, "valid", tmp_path / "letters")
    assert said == f"Notes in {tmp_path}/letters (split valid): {message}"
    assert main(["data", "check", "--data", str(tmp_path / "letters")]) == 1
    assert f"valid.txt: {message}" in capsys.readouterr().out


@fault(
    Guard(LOADING, "if common := len(told[one] & told[other]):", "if common := 0:"),
    cause="validation or test data are the training data, or share dialogues with them",
    place="empcause data check",
    promise="it names the file and how many dialogues it shares with which other",
)
def test_splits_that_share_dialogues(tmp_path, capsys):
    other = {"c:1": ("sad", "Rain", ("All day", "Oh"))}
    for split, dialogues in (
        ("train", DIALOGUES),
        ("valid", {"c:9": DIALOGUES["c:2"]} | other),
        ("test", {"c:2": other["c:1"]}),
    ):
        (tmp_path / f"{split}.csv").write_text(original(rows(dialogues)))
    for split in ("valid", "test"):
        (tmp_path / f"{split}.json").write_text(json.dumps([RECORD]))
    assert main(["data", "check", "--data", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert f"{tmp_path}/valid.csv: 1 of its 2 conversations are in {tmp_path}/train.csv too" in said
    assert f"{tmp_path}/test.csv: 1 of its 1 conversations are in {tmp_path}/valid.csv too" in said
    assert "2 problems" in said


def packed(files, form="tar.gz"):
    """An archive with these files (name and content)."""
    stream = io.BytesIO()
    if form == "zip":
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files:
                archive.writestr(name, content)
        return stream.getvalue()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


@fault(
    Guard(SOURCE, "except _DAMAGED as error:", "except MemoryError as error:"),
    Guard(SOURCE, "while archive.fileobj is not None and archive.fileobj.read(1 << 20):", "while False:"),
    cause="an archive is cut short, or a byte of it is flipped",
    place="reading data from an archive",
    promise="one sentence; no text is used, wherever in the archive the flipped byte is",
)
def test_damaged_archive(tmp_path):
    # Stored without compression, a flipped byte breaks nothing but the checksum at the end.
    content, tail = original(rows()).encode(), random.Random(0).randbytes(100_000)
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, data in (("a/train.csv", content), ("a/tail", tail)):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    whole = gzip.compress(stream.getvalue(), compresslevel=0)
    path = tmp_path / "empatheticdialogues.tar.gz"
    path.write_bytes(whole)
    assert len(load_dialogues("train", path)) == len(DIALOGUES)
    place = whole.index(b"We won the cup")
    for damaged in (
        whole[:-9],
        whole[: place + 10],
        whole[: len(whole) // 2],
        whole.replace(b"We won the", b"We wom the"),
        b"",
    ):
        path.write_bytes(damaged)
        assert f"{path} is damaged, cut short or encrypted" in refusal(load_dialogues, "train", path)
    path = tmp_path / "emocause.zip"
    for damaged in (packed([("emocause/test.json", b"[]")], "zip")[:-5], b"PK nothing"):
        path.write_bytes(damaged)
        assert f"{path} is damaged, cut short or encrypted" in refusal(load_annotations, "test", tmp_path)


@fault(
    Guard(SOURCE, "if len(found) != 1:", "if not found:"),
    cause="an archive holds a split twice, or names that lead out of its folder",
    place="reading data from an archive",
    promise="two files of one name are refused by name; nothing of an archive is ever written to the disk",
)
def test_names_in_an_archive(tmp_path):
    content = original(rows()).encode()
    (tmp_path / "inside").mkdir()
    path = tmp_path / "inside" / "data.zip"
    for form in ("zip", "tar.gz"):
        path = tmp_path / "inside" / f"data.{form}"
        path.write_bytes(packed([("a/train.csv", content), ("b/train.csv", content)], form))
        assert "must hold one train.csv; it holds 2: a/train.csv, b/train.csv" in refusal(load_dialogues, "train", path)
        path.write_bytes(packed([("../../train.csv", content), ("/tmp/x/._train.csv", b"Mac")], form))
        assert len(load_dialogues("train", path)) == len(DIALOGUES)
        assert "it holds 0: none" in refusal(load_dialogues, "valid", path)
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["data.tar.gz", "data.zip", "inside"]


@fault(
    Guard(SOURCE, "if candidate.is_symlink():", "if False:"),
    Guard(SOURCE, 'if data == "":', "if False:"),
    cause="--data is empty, missing, an empty folder, or holds a link to what is gone",
    place="every command that reads data",
    promise="one sentence that says what is not there; never other data than those named",
)
def test_data_that_are_not_there(tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "train.csv").write_text(original(rows()))
    monkeypatch.setenv("EMPCAUSE_DATA_DIR", str(tmp_path / "other"))
    assert len(load_dialogues("train")) == len(DIALOGUES)
    assert "--data is empty" in refusal(load_dialogues, "train", "")
    for path in (tmp_path / "missing", "~nobody-of-this-name/data"):
        assert f"{path} (from --data) does not exist" in refusal(load_dialogues, "train", path)
    (tmp_path / "empty").mkdir()
    assert "has no empatheticdialogues/train.csv" in refusal(load_dialogues, "train", tmp_path / "empty")
    (tmp_path / "empty" / "train.csv").symlink_to(tmp_path / "gone.csv")
    said = refusal(load_dialogues, "train", tmp_path / "empty")
    assert said == f"{tmp_path}/empty/train.csv is a link to {tmp_path}/gone.csv, which is no file."


@fault(
    Guard(
        SOURCE,
        "except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:",
        "except OSError as error:",
    ),
    cause="the data may not be read",
    place="every command that reads data",
    promise="one sentence with the file's name; no other copy is read in its place",
)
def test_unreadable_data(capsys):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "train.csv").write_text(original(rows()))
        (folder / "empatheticdialogues").mkdir(mode=0o700)
        with unprivileged():
            assert main(["data", "check", "--data", name]) == 2
        assert f"{name}/empatheticdialogues/train.csv: Permission denied; choose" in capsys.readouterr().err
        (folder / "empatheticdialogues").rmdir()
        (folder / "train.csv").chmod(0)
        with unprivileged():
            assert main(["data", "check", "--data", name]) == 2
        assert f"{name}/train.csv: Permission denied; choose" in capsys.readouterr().err


BODY = packed(
    [("empatheticdialogues/train.csv", original(rows()).encode()), ("tail", random.Random(0).randbytes(1 << 19))]
)
HALF = len(BODY) // 2


class Server:
    """Answers as `answer` says, on this machine alone.

    `answer(request, start)` gets the request and the first byte that it asks for.
    """

    def __init__(self, answer):
        self.starts, outer = [], self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                asked = self.headers.get("Range")
                outer.starts.append(int(asked[6:-1]) if asked else 0)
                answer(self, outer.starts[-1])

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def __enter__(self):
        url = f"http://127.0.0.1:{self.http.server_port}/data.tar.gz"
        return self, replace(EMPATHETIC_DIALOGUES, url=url, sha256=hashlib.sha256(BODY).hexdigest())

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()


def send(request, body, status=200, length=None, **headers):
    """Send an answer; its stated length may be another than the body's."""
    request.send_response(status)
    for name, value in ({"Content-Length": len(body) if length is None else length} | headers).items():
        request.send_header(name.replace("_", "-"), str(value))
    request.end_headers()
    request.wfile.write(body)


def send_rest(request, start, body=BODY):
    """Send what a server with ranges sends."""
    if start >= len(body):
        send(request, b"", 416)
    elif start:
        send(request, body[start:], 206, Content_Range=f"bytes {start}-{len(body) - 1}/{len(body)}")
    else:
        send(request, body)


@pytest.fixture
def begun(tmp_path):
    """A download of which half has arrived: the file with this half."""
    partial = tmp_path / "empatheticdialogues.tar.gz.part"
    partial.write_bytes(BODY[:HALF])
    return partial


def goes_on(folder):
    """A server that keeps its promises completes the download with the missing half alone, and the archive is right."""
    with Server(send_rest) as (server, dataset):
        path = download(dataset, folder)
    assert path.read_bytes() == BODY
    assert len(load_dialogues("train", folder)) == len(DIALOGUES)
    return server.starts == [HALF]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda request, _: send(request, b"<html>Log in", Content_Type="text/html"), "the login page of a network"),
        (lambda request, _: send(request, b"Log in" * 200_000), "something else than what"),
        (lambda request, _: send(request, b"Log in", 206, Content_Range="bytes 0-5/6"), "another part than the one"),
        (lambda request, _: send(request, BODY[HALF:], 206), "another part than the one asked for"),
        (lambda request, start: send_rest(request, start, BODY[:-100] + b"x" * 100), "is as it was before"),
        (lambda request, _: send(request, b"gone", 404), "404"),
        (lambda request, _: send(request, b"", 302, Location="http://127.0.0.1:9/login"), "Connection refused"),
        (lambda request, _: send(request, b"", 302, Location=request.path), "redirects"),
    ],
)
@fault(
    Guard(SOURCE, 'if "html" in kind:', "if False:"),
    Guard(SOURCE, "if not chunk.startswith(known):", "if False:"),
    Guard(SOURCE, """if not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):""", "if False:"),
    Guard(SOURCE, "os.truncate(partial, start)", "pass"),
    cause="something else than the archive comes: a network's login page, another part or file, an error, a redirection",
    place="empcause data download, with half of the archive there already",
    promise="one sentence says what came; the half is untouched, and the next attempt completes it",
)
def test_wrong_answer(tmp_path, begun, answer, said):
    with Server(answer) as (_, dataset):
        assert said in refusal(download, dataset, tmp_path)
    assert begun.read_bytes() == BODY[:HALF]
    assert goes_on(tmp_path)


@pytest.mark.parametrize("ranges", [True, False])
@fault(
    Guard(SOURCE, "timeout=_TIMEOUT", "timeout=None"),
    Guard(SOURCE, '{"Range": f"bytes={start}-"} if start else {}', "{}"),
    Guard(SOURCE, "file.seek(place)", "file.seek(start)"),
    cause="the connection breaks off, or nothing more comes",
    place="empcause data download",
    promise="what arrived is kept and continued, whether the server can send the rest alone or only the whole archive",
)
def test_broken_connection(tmp_path, monkeypatch, ranges):
    monkeypatch.setattr(data_source, "_TIMEOUT", 0.5)
    partial = tmp_path / "empatheticdialogues.tar.gz.part"
    waiting = threading.Event()

    def breaks_off(request, start):
        send(request, BODY[:HALF], length=len(BODY))
        if not ranges:
            waiting.wait(3)
            with suppress(OSError):
                request.wfile.write(BODY[HALF:])

    with Server(breaks_off) as (_, dataset):
        assert "the same command goes on from there" in refusal(download, dataset, tmp_path)
        waiting.set()
    assert partial.read_bytes() == BODY[: partial.stat().st_size]
    assert partial.stat().st_size > 1 << 16
    partial.write_bytes(BODY[:HALF])
    if ranges:
        assert goes_on(tmp_path)
    else:
        with Server(lambda request, _: send(request, BODY)) as (server, dataset):
            assert download(dataset, tmp_path).read_bytes() == BODY
            assert server.starts == [HALF]


@fault(
    Guard(SOURCE, "if digest == dataset.sha256:", "if True:"),
    Guard(SOURCE, "if complete or not start:", "if False:"),
    cause="the archive that came, or what was kept of it, is not the official one",
    place="empcause data download",
    promise="it is never used; it is removed, and the next attempt starts from the beginning",
)
def test_wrong_checksum(tmp_path):
    target = tmp_path / EMPATHETIC_DIALOGUES.archive
    partial = tmp_path / f"{target.name}.part"
    wrong = BODY[:-1] + bytes([BODY[-1] ^ 1])
    with Server(lambda request, start: send_rest(request, start, wrong)) as (_, dataset):
        assert "SHA-256" in refusal(download, dataset, tmp_path)
        assert not target.exists()
        assert not partial.exists()
    partial.write_bytes(wrong)
    target.write_bytes(wrong)
    with Server(send_rest) as (server, dataset):
        assert "it has been removed" in refusal(download, dataset, tmp_path)
        assert download(dataset, tmp_path).read_bytes() == BODY
        assert download(dataset, tmp_path).read_bytes() == BODY
        assert server.starts == [len(BODY), 0], "a verified file is not fetched again"


@fault(
    Guard(SOURCE, "with _alone(target):", "if True:"),
    cause="two processes download at once",
    place="empcause data download",
    promise="one fetches and the other waits; both end with the one whole file",
)
def test_concurrent_downloads(tmp_path, capsys):
    def slowly(request, start):
        time.sleep(0.5)
        send_rest(request, start)

    paths = []
    with Server(slowly) as (server, dataset):
        threads = [threading.Thread(target=lambda: paths.append(download(dataset, tmp_path))) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert server.starts == [0]
    assert paths == [tmp_path / dataset.archive] * 3
    assert paths[0].read_bytes() == BODY
    assert "Another process is fetching" in capsys.readouterr().out


@fault(
    Guard("empcause/cli/data.py", "except KeyboardInterrupt:", "except MemoryError:"),
    cause="Ctrl-C",
    place="empcause data download",
    promise="exit code 130; what arrived is kept, and the same command goes on from there",
)
def test_interrupted_download(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("EMPCAUSE_CACHE_DIR", str(tmp_path))
    folder = tmp_path / "data"
    partial = folder / "empatheticdialogues.tar.gz.part"
    update = data_source.tqdm.update

    def interrupted(bar, count):
        update(bar, count)
        if bar.n >= HALF:
            raise KeyboardInterrupt

    with Server(send_rest) as (server, dataset):
        monkeypatch.setattr("empcause.data.DATASETS", (dataset,))
        with monkeypatch.context() as patch:
            patch.setattr(data_source.tqdm, "update", interrupted)
            assert main(["data", "download"]) == 130
        assert "interrupted; what arrived is kept, the same command goes on from there" in capsys.readouterr().err
        arrived = partial.stat().st_size
        assert HALF <= arrived < len(BODY)
        assert download(dataset, folder).read_bytes() == BODY
        assert server.starts == [0, arrived]


@fault(
    Guard(SOURCE, 'folder / f"{dataset.archive}.part"', "folder / dataset.archive"),
    cause="the disk is full, or the folder may not be written",
    place="empcause data download",
    promise="one sentence; there is no file of the archive's name, and once there is room the download continues",
)
def test_no_room_for_a_download(monkeypatch, capsys):
    with tempfile.TemporaryDirectory() as name, Server(send_rest) as (_, dataset):
        monkeypatch.setenv("EMPCAUSE_CACHE_DIR", name)
        monkeypatch.setattr("empcause.data.DATASETS", (dataset,))
        Path(name).chmod(0o755)
        with unprivileged():
            assert main(["data", "download"]) == 2
        assert f"{name}/data: Permission denied; choose" in capsys.readouterr().err
        folder = Path(name) / "data"
        folder.mkdir()
        with unprivileged():
            assert main(["data", "download"]) == 2
        assert f"{folder}/{dataset.archive}.lock: Permission denied; choose" in capsys.readouterr().err
        partial = folder / f"{dataset.archive}.part"
        partial.symlink_to("/dev/full")
        assert main(["data", "download"]) == 2
        assert "the disk is full" in capsys.readouterr().err
        assert not (folder / dataset.archive).exists()
        partial.unlink()
        partial.write_bytes(BODY[:HALF])
        assert goes_on(folder)


@fault(
    Guard(SOURCE, "sync(partial)", "pass"),
    Guard(SOURCE, "sync(folder)", "pass"),
    cause="the power goes",
    place="just after empcause data download",
    promise="the archive is there: its content is on the disk before its name is, and then its name",
)
def test_power_loss_after_a_download(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(data_source, "sync", lambda path: synced.append((path, target.exists())))
    with Server(send_rest) as (_, dataset):
        target = tmp_path / dataset.archive
        download(dataset, tmp_path)
    assert synced == [(tmp_path / f"{dataset.archive}.part", False), (tmp_path, True)]


@pytest.fixture(scope="module")
def tokenizer(tiny_gpt2_dir):
    """A tokenizer with a separator and an end of its own."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2_dir)
    tokenizer.add_special_tokens({"sep_token": "[SEP]"})
    return tokenizer


@fault(
    Guard("empcause/data/sequences.py", '"split_special_tokens": True, ', ""),
    Guard("empcause/extractor/encoding.py", "split_special_tokens=True,", ""),
    cause="somebody writes [SEP], </s> or <pad> in a text",
    place="every text that a model reads",
    promise="it is text: as many separators and ends as there are turns, and every character is read",
)
def test_special_tokens_in_texts(tokenizer, tiny_encoder_dir):
    turns = ["I feel [SEP] so</s> lonely", "<s>Why?<pad>", "[SEP]"]
    dialogue = Dialogue(tuple(turns), (0, 1, 0), "Oh </s>[SEP]")
    encoded = encode_dialogue(tokenizer, dialogue, 128)
    special = [index for index in encoded.input_ids.tolist() if index in tokenizer.all_special_ids]
    assert special == [tokenizer.sep_token_id] * 3 + [tokenizer.eos_token_id]
    assert tokenizer.decode(encoded.input_ids) == "[SEP]".join([*turns, "Oh </s>[SEP]</s>"])
    read = {place for first, last in encoded.spans.tolist() for place in range(first, last)}
    text = dialogue.text
    assert read == set(range(len(text))) - {len(turns[0]), len(turns[0]) + 1 + len(turns[1])}

    reader = AutoTokenizer.from_pretrained(tiny_encoder_dir)
    item = encode_text(reader, text, split_words(text), 128)
    assert item["special_tokens_mask"].tolist() == [1] + [0] * (len(item["input_ids"]) - 2) + [1]
    inner = item["input_ids"][1:-1].tolist()
    assert not set(inner) & set(reader.all_special_ids)
    assert reader.decode(inner) == text


@fault(
    Guard("empcause/data/sequences.py", "if room < 2:", "if False:"),
    cause="the longest length is too short for a dialogue, or a dialogue too long for it",
    place="encoding a dialogue",
    promise="never longer than asked: the newest tokens of the context stay, with a separator; or it is refused",
)
def test_length_of_a_dialogue(tokenizer):
    turns = ("I feel so lonely", "Why is that?", "All my friends live in another country")
    dialogue = Dialogue(turns, (0, 1, 0), "Oh no")
    last = tokenizer(turns[2], add_special_tokens=False)["input_ids"]
    answer = tokenizer("Oh no", add_special_tokens=False)["input_ids"]
    for length in range(4):
        assert "at least 4 are needed" in refusal(encode_dialogue, tokenizer, dialogue, length)
    for length in range(4, 12):
        encoded = encode_dialogue(tokenizer, dialogue, length)
        cut = [*answer[: max(1, length // 2 - 1)], tokenizer.eos_token_id]
        context = encoded.input_ids.tolist()[: -len(cut)]
        assert len(encoded.input_ids) == length
        assert encoded.input_ids.tolist()[-len(cut) :] == cut
        assert context == [*last[-(length - len(cut) - 1) :], tokenizer.sep_token_id]
        assert encoded.dropped_turns == 2


@pytest.mark.parametrize("side", ["left", "right"])
@fault(
    Guard("empcause/data/collation.py", "if any(name in item for item in items):", "if name in items[0]:"),
    Guard("empcause/data/collation.py", "if name in item:", "if True:"),
    cause="some dialogues of a batch have causes and others have none",
    place="answering and scoring",
    promise="each keeps its own causes, and the others get none, whichever comes first",
)
def test_causes_of_some_dialogues(side):
    plain = {"input_ids": np.arange(1, 4), "token_type_ids": np.zeros(3, np.int64)}
    biased = plain | {"cause_probs": np.array([0.25, 0.5, 1.0])}
    for items in ([plain, biased], [biased, plain]):
        batch = pad_batch(items, 0, side)
        expected = [item.get("cause_probs", np.zeros(3)).tolist() for item in items]
        assert batch["cause_probs"].tolist() == expected
        assert batch["input_ids"].tolist() == [[1, 2, 3]] * 2
