"""Files in, dialogues and annotations out; every mistake named by file and line."""

import csv
import gzip
import json
import lzma
import tarfile

import pytest

from empcause.cli import main
from empcause.data import (
    EMPATHETIC_DIALOGUES,
    check_data,
    emotion_id,
    load_annotations,
    load_dialogues,
    response_pairs,
    split_words,
)
from empcause.errors import UserError

HEADER = "conv_id,utterance_idx,context,prompt,speaker_idx,utterance,selfeval,tags\n"
ROWS = (
    'c:1,1,sad,My dog_comma_ "Rex"_comma_ died.,9,He was old.,,\n'
    'c:1,2,sad,My dog_comma_ "Rex"_comma_ died.,4,I\'m sorry_comma_ truly.,,\n'
    'c:1,3,sad,My dog_comma_ "Rex"_comma_ died.,9,Thanks.,,\n'
    "c:2,1,joyful,We won!,1,We won the cup!,,,candidate|other\n"
    "c:2,2,joyful,We won!,2,Great!,,\n"
)
RECORD = {
    "original_situation": "My dog died.",
    "tokenized_situation": ["My", "dog", "died", "."],
    "emotion": "__sad__",
    "conv_id": "c:1",
    "annotation": [["dog", 1], ["died", 2]],
    "labels": ["dog", "died"],
}


@pytest.fixture
def folder(tmp_path):
    for name in ("empatheticdialogues", "emocause"):
        (tmp_path / name).mkdir()
    for split in ("train", "valid", "test"):
        rows = ROWS.replace("Thanks.", f"Thanks_comma_ {split}.").replace("Great!", f"Great_comma_ {split}!")
        (tmp_path / "empatheticdialogues" / f"{split}.csv").write_text(HEADER + rows)
    for split in ("valid", "test"):
        (tmp_path / "emocause" / f"{split}.json").write_text(json.dumps([RECORD]))
    return tmp_path


def test_rows_become_dialogues(folder):
    first, second = load_dialogues("train", folder)
    assert first.situation == 'My dog, "Rex", died.', "quotes are letters, _comma_ is a comma"
    assert first.turns == ("He was old.", "I'm sorry, truly.", "Thanks, train.")
    assert first.roles == (0, 1, 0), "parity of utterance_idx, not speaker_idx"
    assert (second.emotion, second.conv_id) == ("joyful", "c:2")


def test_response_pairs(folder):
    pairs = response_pairs(load_dialogues("train", folder))
    assert [(pair.turns, pair.response) for pair in pairs] == [
        (("He was old.",), "I'm sorry, truly."),
        (("We won the cup!",), "Great, train!"),
    ]


def test_annotations(folder):
    (annotation,) = load_annotations("test", folder)
    assert annotation.emotion == "sad"
    assert [annotation.words[index].text for index in annotation.gold] == ["dog", "died"]
    assert annotation.words[1] == ("dog", 3, 6)


@pytest.mark.parametrize("packing", ["gz", "xz", "tar.gz", "archive file"])
def test_packings(folder, packing):
    plain = load_dialogues("valid", folder)
    source = folder / "empatheticdialogues"
    if packing in ("gz", "xz"):
        opener = gzip.open if packing == "gz" else lzma.open
        for file in list(source.glob("*.csv")):
            with opener(f"{file}.{packing}", "wb") as packed:
                packed.write(file.read_bytes())
            file.unlink()
        assert load_dialogues("valid", folder) == plain
        return
    archive = folder / "empatheticdialogues.tar.gz"
    with tarfile.open(archive, "w:gz") as packed:
        packed.add(source, "empatheticdialogues")
    for file in source.glob("*.csv"):
        file.unlink()
    assert load_dialogues("valid", archive if packing == "archive file" else folder) == plain


def test_variable_and_missing_folder(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("EMPCAUSE_DATA_DIR", str(folder))
    assert load_dialogues("test")
    with pytest.raises(UserError, match="does not exist"):
        load_dialogues("test", tmp_path / "nowhere")
    monkeypatch.delenv("EMPCAUSE_DATA_DIR")
    monkeypatch.setenv("EMPCAUSE_CACHE_DIR", str(tmp_path / "empty"))
    with pytest.raises(UserError, match="empcause data download"):
        load_dialogues("test")
    with pytest.raises(UserError, match="Unknown split 'dev'"):
        load_dialogues("dev", folder)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("c:3,1,sad,Text.,1\n", "5 fields; expected 8"),
        ("c:3,1,sad,Text, with a comma, and more,1,Hello.,,\n", "fields; expected 8"),
        ("c:3,x,sad,Text.,1,Hello.,,\n", "utterance_idx is 'x'"),
        ("c:3,1,gloomy,Text.,1,Hello.,,\n", "unknown emotion 'gloomy'"),
        ("c:3,1,sad, ,1,Hello.,,\n", "situation"),
        ("c:3,1,sad,Text.,1,,,\n", "utterance is empty"),
        (",1,sad,Text.,1,Hello.,,\n", "conv_id is empty"),
        ("c:2,2,joyful,We won!,2,Again!,,\n", "utterance_idx is 2, but 3 comes next"),
        ("c:2,3,sad,We won!,2,Again!,,\n", "earlier in the same conversation"),
        ("c:2,3,joyful,We lost!,2,Again!,,\n", "differs from the one earlier in the same conversation"),
    ],
)
def test_malformed_rows_are_named(folder, row, message):
    file = folder / "empatheticdialogues" / "train.csv"
    file.write_text(HEADER + ROWS + row)
    with pytest.raises(UserError, match=rf"train\.csv:7: .*{message}"):
        load_dialogues("train", folder)


def test_missing_column_and_empty_file(folder):
    file = folder / "empatheticdialogues" / "train.csv"
    file.write_text(HEADER.replace("prompt,", "") + ROWS)
    with pytest.raises(UserError, match=r"train\.csv:1: the header lacks prompt"):
        load_dialogues("train", folder)
    file.write_text(HEADER)
    with pytest.raises(UserError, match="holds no dialogue"):
        load_dialogues("train", folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"emotion": "__gloomy__"}, "unknown emotion"),
        ({"original_situation": " "}, "situation is empty"),
        ({"annotation": [["cat", 1]]}, "is not a word and its index"),
        ({"annotation": [["dog", 9]]}, "is not a word and its index"),
        ({"tokenized_situation": ["My", "bird"]}, "'bird' does not occur"),
        ({"conv_id": None, "drop": "conv_id"}, "lacks conv_id"),
    ],
)
def test_malformed_records_are_named(folder, change, message):
    record = RECORD | change
    record.pop(record.pop("drop", ""), None)
    (folder / "emocause" / "test.json").write_text(json.dumps([RECORD, record]))
    with pytest.raises(UserError, match=rf"test\.json, record 2: .*{message}"):
        load_annotations("test", folder)


def test_damaged_files(folder):
    (folder / "emocause" / "test.json").write_text("[{]")
    with pytest.raises(UserError, match=r"test\.json:1: not valid JSON"):
        load_annotations("test", folder)
    packed = folder / "empatheticdialogues" / "train.csv.gz"
    packed.write_bytes(gzip.compress((HEADER + ROWS * 1).encode())[:-20])
    (folder / "empatheticdialogues" / "train.csv").unlink()
    with pytest.raises(UserError, match="cut short"):
        load_dialogues("train", folder)


def test_check_counts_and_names_every_problem(folder, capsys):
    assert main(["data", "check", "--data", str(folder)]) == 0
    assert "No malformed row" in capsys.readouterr().out
    file = folder / "empatheticdialogues" / "valid.csv"
    file.write_text(HEADER + ROWS + "c:3,1,gloomy,Text.,1,Hello.,,\nshort\n")
    result = check_data(folder)
    assert [problem.split(": ")[0].rsplit("/", 1)[1] for problem in result.problems] == ["valid.csv:7", "valid.csv:8"]
    assert result.counts["EmpatheticDialogues valid"]["conversations"] == 2
    assert main(["data", "check", "--data", str(folder)]) == 1


def test_unknown_emotion():
    assert emotion_id("afraid", EMPATHETIC_DIALOGUES.emotions) == 0
    with pytest.raises(UserError, match="Unknown emotion 'glum'; expected one of these 32: afraid, "):
        emotion_id("glum", EMPATHETIC_DIALOGUES.emotions)


def test_the_facts_of_the_real_data(real_data):
    result = check_data(real_data)
    assert not result.problems
    facts = {
        split: list(result.counts[f"EmpatheticDialogues {split}"].values()) for split in ("train", "valid", "test")
    }
    assert facts == {
        "train": [19533, 84169, 40254, 32],
        "valid": [2770, 12078, 5738, 32],
        "test": [2547, 10973, 5259, 32],
    }
    assert result.counts["EmoCause valid"]["situations"] == 2247
    assert result.counts["EmoCause test"]["situations"] == 2366
    own = {split: {dialogue.conv_id for dialogue in load_dialogues(split, real_data)} for split in ("valid", "test")}
    for split, ids in own.items():
        assert all(annotation.conv_id in ids for annotation in load_annotations(split, real_data))


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
def test_the_real_data_rewritten_as_ordinary_csv(real_data, tmp_path, quoting):
    for split in ("valid", "test"):
        dialogues = load_dialogues(split, real_data)
        with (tmp_path / f"{split}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, quoting=quoting)
            writer.writerow(HEADER.strip().split(","))
            for dialogue in dialogues:
                for index, turn in enumerate(dialogue.turns, start=1):
                    writer.writerow([dialogue.conv_id, index, dialogue.emotion, dialogue.situation, 0, turn, "", ""])
        assert load_dialogues(split, tmp_path) == dialogues


class TestSample:
    def test_size_and_balance(self):
        dialogues = [dialogue for split in ("train", "valid", "test") for dialogue in load_dialogues(split, "sample")]
        counts = [
            sum(dialogue.emotion == emotion for dialogue in dialogues) for emotion in EMPATHETIC_DIALOGUES.emotions
        ]
        assert min(counts) >= 10
        assert all(2 <= len(dialogue.turns) <= 6 for dialogue in dialogues)
        assert len({dialogue.conv_id for dialogue in dialogues}) == len(dialogues)

    def test_every_situation_is_annotated(self):
        for split in ("train", "valid", "test"):
            situations = {dialogue.conv_id: dialogue.situation for dialogue in load_dialogues(split, "sample")}
            annotations = load_annotations(split, "sample")
            assert {annotation.conv_id for annotation in annotations} == set(situations)
            assert all(situations[annotation.conv_id] == annotation.situation for annotation in annotations)

    def test_it_is_varied(self):
        dialogues = [dialogue for split in ("train", "valid", "test") for dialogue in load_dialogues(split, "sample")]
        openings = [" ".join(dialogue.situation.split()[:3]).lower() for dialogue in dialogues]
        assert len(set(openings)) > 0.9 * len(openings)
        texts = [text for dialogue in dialogues for text in (dialogue.situation, *dialogue.turns)]
        assert len(set(texts)) == len(texts)
        assert len({word.text.lower() for text in texts for word in split_words(text)}) > 2000

    def test_check(self):
        assert not check_data("sample").problems


def test_splits_with_nothing_to_learn_or_to_measure(folder, small_extractor, small_generator, tmp_path, capsys):
    """Sound files, in which no turn is answered and no word is marked."""
    for split in ("train", "valid", "test"):
        row = f"c:{split},1,sad,My dog died.,9,He was {split}.,,\n"
        (folder / "empatheticdialogues" / f"{split}.csv").write_text(HEADER + row)
    for split in ("valid", "test"):
        record = RECORD | {"annotation": [], "labels": []}
        (folder / "emocause" / f"{split}.json").write_text(json.dumps([record]))
    with pytest.raises(UserError, match=r"No word is marked as a cause in .* \(split valid\)"):
        load_annotations("valid", folder)
    models = ["--model", str(small_generator), "--extractor", str(small_extractor)]
    evaluated = ["evaluate", "generator", *models, "--output_dir", str(tmp_path / "evaluation")]
    trained = ["train", "generator", "--model_name_or_path", str(small_generator), "--gamma", "0"]
    for command in (evaluated, [*trained, "--output_dir", str(tmp_path / "training")]):
        assert main([*command, "--data", str(folder)]) == 2
        assert "No turn is answered in the split t" in capsys.readouterr().err
