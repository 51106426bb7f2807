"""Data sets as objects: what `--data` means, and a second one that brings all that is its own."""

import json
from dataclasses import replace

import pytest

from empcause.data import (
    EMOCAUSE,
    EMPATHETIC_DIALOGUES,
    CauseAnnotation,
    Corpus,
    Dataset,
    Dialogue,
    Licence,
    check_data,
    find_corpus,
    load_annotations,
    load_dialogues,
    split_words,
)
from empcause.data.loading import EMBEDDED, PAPERS
from empcause.data.origin import origin
from empcause.data.source import SAMPLE
from empcause.errors import UserError


def parse(text, name, report):
    """One dialogue a line: its emotion and its two turns."""
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        emotion, *turns = line.split("|")
        if emotion not in LETTERS.emotions:
            report(f"{name}:{number}", f"unknown emotion {emotion!r}.")
        else:
            found.append(Dialogue(tuple(turns), (0, 1), conv_id=str(number), emotion=emotion))
    return found


LETTERS = Dataset(
    name="letters",
    title="Letters",
    emotions=("glad", "glum"),
    licence=Licence("cc0-1.0", "CC0: no conditions"),
    splits=("train", "valid", "test"),
    extension="txt",
    archive="letters.zip",
    url="http://localhost/letters.zip",
    sha256="",
    parse=parse,
    count=lambda dialogues: {"letters": len(dialogues)},
    published=frozenset(),
)
CORPUS = Corpus("letters", LETTERS, None)


@pytest.fixture
def letters(tmp_path, monkeypatch):
    monkeypatch.setattr("empcause.data.loading.CORPORA", (PAPERS, CORPUS))
    folder = tmp_path / "letters"
    folder.mkdir()
    for split in LETTERS.splits:
        (folder / f"{split}.txt").write_text(f"glad|Spring of {split}!|Good.\nglum|Rain.|Oh.\n")
    return folder


def test_a_second_data_set(letters, monkeypatch):
    assert find_corpus(letters) == (CORPUS, letters)
    assert load_dialogues("train", letters)[0].turns == ("Spring of train!", "Good.")
    assert check_data(letters).counts["Letters test"] == {"letters": 2}
    with pytest.raises(UserError, match="Letters has no annotated causes"):
        load_annotations("test", letters)
    (letters / "train.txt").write_text("sad|Rain.|Oh.\n")
    with pytest.raises(UserError, match=r"train\.txt:1: unknown emotion 'sad'"):
        load_dialogues("train", letters)


def test_by_its_name_it_is_at_the_usual_place(letters, tmp_path, monkeypatch):
    monkeypatch.setenv("EMPCAUSE_DATA_DIR", str(tmp_path))
    assert find_corpus("letters") == (CORPUS, tmp_path)
    assert len(load_dialogues("test", "letters")) == 2
    monkeypatch.chdir(tmp_path)
    assert find_corpus("letters")[1].samefile(letters), "a folder of that name comes first"


def test_its_licence_goes_with_it(letters, monkeypatch):
    from empcause.data.origin import fingerprint

    dialogues = load_dialogues("train", letters)
    assert origin(letters, dialogues).licence == "unknown", "whoever changes the data may not claim their licence"
    published = replace(LETTERS, published=frozenset({fingerprint(dialogues)}))
    monkeypatch.setattr("empcause.data.loading.CORPORA", (PAPERS, Corpus("letters", published, None)))
    assert origin(letters, dialogues) == ("Letters", "CC0: no conditions", "cc0-1.0", ())
    notes = replace(published, title="Notes", licence=Licence("mit", "MIT"), language="de")
    monkeypatch.setattr("empcause.data.loading.CORPORA", (PAPERS, Corpus("letters", published, notes)))
    both = ("Letters and Notes", "CC0: no conditions; MIT", "other", ("de",))
    assert origin(letters, dialogues) == both, "of two licences none is dropped"


def annotated_by(emotions, extension):
    """A data set of notes with one annotated situation per emotion, whatever is in its file."""

    def parse_annotations(text, name, report):
        words = tuple(split_words(text))
        return [CauseAnnotation(str(number), emotion, text, words, (0,)) for number, emotion in enumerate(emotions)]

    options = {"name": "notes", "title": "Notes", "archive": "notes.zip", "count": lambda items: {"notes": len(items)}}
    return replace(LETTERS, extension=extension, parse=parse_annotations, **options)


def test_its_emotions_are_those_of_the_extractor(letters, tiny_encoder_dir, tmp_path, monkeypatch):
    from empcause.extractor import load_extractor
    from empcause.training.extractor import ExtractorTrainingArguments, train_extractor

    annotated = annotated_by(LETTERS.emotions, "md")
    told = replace(LETTERS, parse=lambda *given: [replace(each, situation=each.turns[0]) for each in parse(*given)])
    monkeypatch.setattr("empcause.data.loading.CORPORA", (PAPERS, Corpus("letters", told, annotated)))
    for split in LETTERS.splits:
        (letters / f"{split}.md").write_text(f"Rain on the {split}.")
    train_extractor(
        ExtractorTrainingArguments(
            output_dir=str(tmp_path / "out"), data=str(letters), model_name_or_path=str(tiny_encoder_dir), max_steps=1
        )
    )
    model, _ = load_extractor(tmp_path / "out")
    assert model.emotions == LETTERS.emotions
    assert model.emotion_head.out_features == 2
    assert json.loads((tmp_path / "out" / "config.json").read_text())["id2label"] == {"0": "glad", "1": "glum"}


def test_what_data_means(tmp_path, monkeypatch):
    monkeypatch.setenv("EMPCAUSE_DATA_DIR", str(tmp_path))
    assert find_corpus("sample") == find_corpus(SAMPLE) == (EMBEDDED, SAMPLE)
    assert find_corpus(None) == find_corpus() == find_corpus("empatheticdialogues") == (PAPERS, tmp_path)
    own = tmp_path / "sample"
    own.mkdir()
    assert find_corpus(own) == (PAPERS, own), "a folder of the sample's name is not the sample"
    with pytest.raises(UserError, match=r"nowhere \(from --data\) does not exist"):
        find_corpus("nowhere")


def test_the_papers_data_sets():
    assert len(EMPATHETIC_DIALOGUES.emotions) == 32
    assert EMOCAUSE.emotions == EMPATHETIC_DIALOGUES.emotions
    assert EMPATHETIC_DIALOGUES.licence.identifier == EMOCAUSE.licence.identifier == "cc-by-nc-4.0"
    with pytest.raises(UserError, match="Unknown split 'train' of EmoCause; expected one of valid, test"):
        EMOCAUSE.load("train", SAMPLE)
