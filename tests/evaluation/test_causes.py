"""The evaluation of causes: what rankings without a system attain, and how many words a system predicts."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from empcause.data import CauseAnnotation, load_annotations, split_words
from empcause.evaluation.causes import EvaluateCausesOptions, chance_recalls, evaluate_causes
from empcause.metrics import score_causes
from empcause.systems import Reading
from empcause.systems.loading import SYSTEMS


def annotation(text, *gold):
    words = tuple(split_words(text))
    texts = [word.text for word in words]
    return CauseAnnotation("c", "sad", text, words, tuple(texts.index(word) for word in gold))


def test_rankings_without_a_system_by_hand():
    """Three content words of which one is the cause: a third of the random orders begin with it; the first word is another."""
    number = 400
    scores = chance_recalls([annotation("The dog ate my homework.", "homework")] * number)
    assert {name: values.shape for name, values in scores.items()} == {
        f"{kind}_top{k}_recall": (number,) for kind in ("random", "first") for k in (1, 3, 5)
    }
    assert scores["random_top1_recall"].mean() == pytest.approx(1 / 3, abs=0.04)
    assert np.ptp(scores["random_top1_recall"]) > 0.3, "every situation has draws of its own"
    assert scores["first_top1_recall"].max() == 0
    for name in ("random_top3_recall", "random_top5_recall", "first_top3_recall", "first_top5_recall"):
        assert scores[name].min() == 1
    again = chance_recalls([annotation("The dog ate my homework.", "homework")] * number)
    assert all(np.array_equal(scores[name], again[name]) for name in scores)


def test_chance_and_ceiling_on_emocause(real_data):
    annotations = load_annotations("test", str(real_data))
    chance = {name: values.mean() for name, values in chance_recalls(annotations).items()}
    ceiling = score_causes(annotations, [np.ones(len(each.words)) for each in annotations]).summary()
    for prefix, figures, expected in (
        ("random_", chance, (0.147, 0.420, 0.623)),
        ("first_", chance, (0.118, 0.471, 0.698)),
        ("oracle_", ceiling, (0.423, 0.871, 0.972)),
    ):
        found = [figures[f"{prefix}top{k}_recall"] for k in (1, 3, 5)]
        assert found == pytest.approx(expected, abs=0.005), prefix


@dataclass
class LongestWord:
    """Predicts the longest word of a text and no other."""

    folder: Path
    note: str = ""
    emotions = ()

    @property
    def folders(self):
        return {"model": self.folder}

    def read(self, texts, words, batch_size):
        return [
            Reading(word_probs=np.eye(len(each), dtype=np.float32)[np.argmax([word.end - word.start for word in each])])
            for each in words
        ]


def test_a_report_has_chance_and_the_number_of_words(tmp_path, monkeypatch):
    monkeypatch.setitem(SYSTEMS, "longest", lambda folder, _: LongestWord(Path(folder)))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "longest"}))
    folder = tmp_path / "evaluation"
    figures = evaluate_causes(
        EvaluateCausesOptions(model=str(tmp_path / "model"), data="sample", output_dir=str(folder))
    )
    assert figures["predicted_words"] == 1
    assert figures["top1_recall"] == figures["top5_recall"]
    assert 0 < figures["random_top1_recall"] < figures["random_top5_recall"] < figures["oracle_top5_recall"]
    items = json.loads((folder / "items.json").read_text())
    assert len(items["first_top3_recall"]) == len(items["predicted_words"]) == figures["situations"]
    report = (folder / "report.md").read_text()
    assert "| random content words |" in report
    assert "| first content words |" in report
    assert "ranks 1.000 [1.000, 1.000] content words per situation" in report
