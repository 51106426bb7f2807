"""Systems: our own two, and what an evaluation does with one that it has never seen."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from empcause.data import EMPATHETIC_DIALOGUES, load_dialogues, response_pairs, split_words
from empcause.errors import UserError
from empcause.evaluation.causes import EvaluateCausesOptions, evaluate_causes
from empcause.evaluation.responses import EvaluateResponsesOptions, evaluate_responses
from empcause.reproduction.figures import read_figures, read_vocabulary
from empcause.systems import Answers, Reading, Reads, Scores, ScoresWords, System, load_system
from empcause.systems.loading import SYSTEMS


def abilities(system):
    return [kind for kind in (System, Reads, Scores, Answers) if isinstance(system, kind)]


def test_our_own_systems(small_extractor, small_generator):
    reader, speaker = load_system(small_extractor), load_system(small_generator, small_extractor)
    assert abilities(reader) == [System, Reads]
    assert abilities(speaker) == [System, Reads, Scores, Answers]
    assert reader.emotions == speaker.emotions == EMPATHETIC_DIALOGUES.emotions
    assert (reader.note, speaker.note) == ("", "biased towards causes (gamma 1)")
    assert speaker.folders == {"model": small_generator, "extractor": small_extractor}
    pair = response_pairs(load_dialogues("test", "sample"))[0]
    (reading,) = speaker.read([pair.text], [split_words(pair.text)], 1)
    assert reading.word_probs.shape == (len(split_words(pair.text)),)
    (encoded,), (target,) = speaker.encode([pair]), speaker.targets([pair])
    assert target == encoded.labels[encoded.labels != -100].tolist()
    ((nll, tokens),) = speaker.score([encoded], 1)
    assert nll > 0
    assert tokens == len(target)
    speaker.check_room(64)
    with pytest.raises(UserError, match="expected 1 to 64"):
        speaker.check_room(65)


def test_folders_that_hold_no_system(small_generator, tiny_gpt2_dir, tmp_path):
    with pytest.raises(UserError, match=r"There is no model at .*: the folder does not exist"):
        load_system(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds a model of type 'gpt2', not a system to evaluate"):
        load_system(tiny_gpt2_dir)
    with pytest.raises(UserError, match="holds a generator, which needs an extractor beside it"):
        load_system(small_generator)


@dataclass
class Stranger:
    """Says of itself what every system says, and can do nothing."""

    folder: Path
    note: str = "a stranger"

    @property
    def folders(self):
        return {"model": self.folder}


class FindsEmotions(Stranger):
    """Takes everybody for sad, and ranks no words."""

    emotions = EMPATHETIC_DIALOGUES.emotions

    def read(self, texts, words, batch_size):
        probs = np.eye(len(self.emotions), dtype=np.float32)[self.emotions.index("sad")]
        return [Reading(emotion_probs=probs) for _ in texts]


class CountsTurns(FindsEmotions):
    """Takes the speakers of long dialogues for annoyed, all others for sad."""

    def read_dialogues(self, dialogues, words, batch_size):
        names = ["annoyed" if len(dialogue.turns) > 2 else "sad" for dialogue in dialogues]
        return [Reading(np.eye(len(self.emotions), dtype=np.float32)[self.emotions.index(name)]) for name in names]

    def check_room(self, max_new_tokens):
        pass

    def answer(self, dialogues, batch_size, max_new_tokens):
        return ["Oh."] * len(dialogues)


class RanksWords(Stranger):
    """Takes longer words for the cause, and knows no emotion."""

    emotions = ()

    def read(self, texts, words, batch_size):
        return [Reading(word_probs=np.array([word.end - word.start for word in each], np.float32)) for each in words]


class AnswersAlone(Stranger):
    """Repeats the last turn."""

    def check_room(self, max_new_tokens):
        assert max_new_tokens == 7

    def answer(self, dialogues, batch_size, max_new_tokens):
        return [dialogue.turns[-1] for dialogue in dialogues]


class ScoresAlone(Stranger):
    """Gives every byte of a response the probability of one half."""

    @dataclass
    class Encoded:
        size: int
        dropped_turns: int = 0
        cut_response: bool = False

        def __len__(self):
            return self.size

    def targets(self, dialogues):
        return [list(dialogue.response.encode()) for dialogue in dialogues]

    def encode(self, dialogues):
        return [self.Encoded(len(dialogue.response.encode())) for dialogue in dialogues]

    def score(self, encoded, batch_size):
        return [(each.size * np.log(2), each.size) for each in encoded]


class ScoresVowels(ScoresAlone):
    """Knows vowels alone; every other byte is the unknown word 0."""

    vocab_size, unknown_id = 6, 0

    def targets(self, dialogues):
        return [[byte if byte in b"aeiou" else 0 for byte in target] for target in super().targets(dialogues)]


@pytest.fixture
def evaluate(tmp_path, monkeypatch):
    """Evaluates a kind of system on the sample; gives its figures, its report and its folder."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "stranger"}))

    def run(kind, options_class, function, **options):
        monkeypatch.setitem(SYSTEMS, "stranger", lambda folder, _: kind(Path(folder)))
        folder = tmp_path / kind.__name__
        made = function(options_class(model=str(model), data="sample", output_dir=str(folder), **options))
        return made, (folder / "report.md").read_text(), folder

    return run


def test_a_system_that_finds_emotions_alone(evaluate):
    figures, report, folder = evaluate(FindsEmotions, EvaluateCausesOptions, evaluate_causes)
    sad = sum(dialogue.emotion == "sad" for dialogue in load_dialogues("test", "sample"))
    assert figures["accuracy"] == pytest.approx(sad / figures["situations"])
    assert not [name for name in figures if "recall" in name]
    assert "a stranger on" in report
    assert "Recall by variant" not in report
    assert not (folder / "causes.png").exists()


def test_a_system_that_ranks_words_alone(evaluate):
    figures, report, folder = evaluate(RanksWords, EvaluateCausesOptions, evaluate_causes)
    assert 0 < figures["top1_recall"] < figures["top5_recall"] <= 1
    assert "accuracy" not in figures
    assert "| **this model** | – |" in report
    assert (folder / "causes.png").exists()
    again, report, _ = evaluate(RanksWords, EvaluateCausesOptions, evaluate_causes, compare=str(folder))
    assert again["difference"]["top5_recall"] == [0, 0, 0]
    assert "accuracy" not in again["difference"]


def test_a_system_that_answers_alone(evaluate):
    figures, report, folder = evaluate(
        AnswersAlone, EvaluateResponsesOptions, evaluate_responses, max_samples=5, max_new_tokens=7
    )
    assert 0 < figures["distinct_1"] <= 1
    assert not {"perplexity", "emotion_accuracy"} & set(figures)
    answers = json.loads((folder / "responses.json").read_text())
    assert [each["response"] for each in answers] == [each["context"][-1] for each in answers]
    assert "5 generated greedily" in report


def test_a_system_that_reads_the_turns_of_dialogues(evaluate):
    figures, _, _ = evaluate(CountsTurns, EvaluateResponsesOptions, evaluate_responses)
    pairs = response_pairs(load_dialogues("test", "sample"))
    right = [pair.emotion == ("annoyed" if len(pair.turns) > 2 else "sad") for pair in pairs]
    assert figures["emotion_accuracy"] == pytest.approx(np.mean(right))
    assert right != [pair.emotion == "sad" for pair in pairs]


def test_a_system_that_scores_alone(evaluate):
    figures, report, folder = evaluate(ScoresAlone, EvaluateResponsesOptions, evaluate_responses, max_samples=5)
    assert figures["perplexity"] == pytest.approx(2)
    assert figures["bits_per_byte"] == pytest.approx(1)
    assert not {"distinct_1", "emotion_accuracy"} & set(figures)
    assert "0 generated greedily" in report
    assert "| context |" not in report
    options = {"max_samples": 5, "compare": str(folder)}
    again, report, _ = evaluate(ScoresAlone, EvaluateResponsesOptions, evaluate_responses, **options)
    assert again["perplexity_difference"] == [0, 0, 0]


def test_a_system_with_a_vocabulary_of_words(evaluate):
    assert not isinstance(ScoresAlone(Path()), ScoresWords)
    figures, report, folder = evaluate(ScoresVowels, EvaluateResponsesOptions, evaluate_responses)
    responses = [pair.response for pair in response_pairs(load_dialogues("test", "sample"))]
    unknown = [sum(byte not in b"aeiou" for byte in response.encode()) for response in responses]
    share = sum(unknown) / sum(len(response.encode()) for response in responses)
    assert (figures["vocab_size"], figures["unknown_share"]) == (6, pytest.approx(share))
    assert f"The vocabulary has 6 tokens, and {share:.1%} of the scored tokens are unknown words" in report
    items = json.loads((folder / "items.json").read_text())
    assert (items["vocab_size"], items["unknown"]) == (6, unknown)
    assert read_vocabulary(folder) == {"size": 6, "unknown_share": pytest.approx(share)}
    assert read_figures("generator", [folder]).keys() == {"perplexity", "bits_per_byte"}
    figures, report, folder = evaluate(ScoresAlone, EvaluateResponsesOptions, evaluate_responses)
    assert not {"vocab_size", "unknown_share"} & set(figures)
    assert "The vocabulary" not in report
    assert read_vocabulary(folder) is None


@pytest.mark.parametrize(
    ("kind", "function", "options", "message"),
    [
        (Stranger, evaluate_causes, EvaluateCausesOptions, "finds neither emotions nor causes"),
        (AnswersAlone, evaluate_causes, EvaluateCausesOptions, "finds neither emotions nor causes"),
        (FindsEmotions, evaluate_responses, EvaluateResponsesOptions, "neither scores nor answers dialogues"),
    ],
)
def test_a_system_that_cannot_do_what_is_measured(evaluate, kind, function, options, message):
    with pytest.raises(UserError, match=message):
        evaluate(kind, options, function)


def test_emotions_that_a_system_does_not_know(evaluate, monkeypatch):
    monkeypatch.setattr(FindsEmotions, "emotions", ("joyful", "sad"))
    with pytest.raises(
        UserError, match=r"model knows other emotions \(joyful, sad\) than .*; evaluate it on data with"
    ):
        evaluate(FindsEmotions, EvaluateCausesOptions, evaluate_causes)


@pytest.mark.parametrize(
    ("readings", "message"),
    [
        (lambda count, words: [Reading()] * (count - 1), "readings of"),
        (
            lambda count, words: [Reading(word_probs=np.zeros(1000, np.float32))] * count,
            r"word probabilities of shape \(1000,\)",
        ),
        (lambda count, words: [Reading(word_probs=np.full(len(each), np.nan)) for each in words], "not finite"),
        (
            lambda count, words: [Reading(emotion_probs=np.ones(2, np.float32))] * count,
            "expected 32 finite probabilities",
        ),
    ],
    ids=["too few", "of another text", "NaN", "of other emotions"],
)
def test_readings_that_do_not_fit_are_not_kept(evaluate, monkeypatch, readings, message):
    """The system's mistake is named, and once it is mended the same evaluation is right."""
    right = FindsEmotions.read
    monkeypatch.setattr(FindsEmotions, "read", lambda self, texts, words, batch_size: readings(len(texts), words))
    with pytest.raises(UserError, match=message):
        evaluate(FindsEmotions, EvaluateCausesOptions, evaluate_causes)
    monkeypatch.setattr(FindsEmotions, "read", right)
    figures, _, _ = evaluate(FindsEmotions, EvaluateCausesOptions, evaluate_causes)
    assert figures["accuracy"] > 0


def test_scores_that_are_not_finite_are_not_kept(evaluate, monkeypatch):
    right = ScoresAlone.score
    monkeypatch.setattr(ScoresAlone, "score", lambda self, encoded, batch_size: [(float("nan"), 3)] * len(encoded))
    with pytest.raises(UserError, match=r"expected \d+ pairs of a finite number and a count"):
        evaluate(ScoresAlone, EvaluateResponsesOptions, evaluate_responses, max_samples=5)
    monkeypatch.setattr(ScoresAlone, "score", right)
    figures, _, _ = evaluate(ScoresAlone, EvaluateResponsesOptions, evaluate_responses, max_samples=5)
    assert figures["perplexity"] == pytest.approx(2)


def test_options_for_what_a_system_cannot_do(evaluate):
    _, _, folder = evaluate(ScoresAlone, EvaluateResponsesOptions, evaluate_responses, max_samples=5)
    options = {"max_samples": 5, "max_new_tokens": 7, "compare": str(folder)}
    with pytest.raises(UserError, match="scores no responses, and scores are what --compare compares"):
        evaluate(AnswersAlone, EvaluateResponsesOptions, evaluate_responses, **options)
