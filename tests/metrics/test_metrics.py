"""Metrics against cases worked out by hand, and against well-known implementations."""

import math

import pytest

from empcause.data import CauseAnnotation, split_words
from empcause.metrics import (
    BertScore,
    bits_per_byte,
    distinct_n,
    emotion_correct,
    lenient_recall,
    nll_per_word,
    perplexity,
    rank_words,
    score_causes,
    strict_recall,
)


def annotation(text, gold):
    words = tuple(split_words(text))
    texts = [word.text for word in words]
    return CauseAnnotation("c", "sad", text, words, tuple(texts.index(word) for word in gold))


class TestRecall:
    def test_ranking_passes_over_stop_words(self):
        words = ["The", "dog", "died", ",", "sadly"]
        assert rank_words(words, [0.9, 0.2, 0.7, 0.8, 0.2]) == [2, 1, 4], "ties: the earlier word first"
        assert rank_words(words, [0.9, 0.2, 0.7, 0.8, 0.2], filtered=False)[:2] == [0, 3]

    def test_if_nothing_is_left_the_best_stays(self):
        assert rank_words(["it", "was", "!"], [0.1, 0.5, 0.3]) == [1]

    def test_blank_words_are_never_ranked(self):
        assert rank_words([" ", "dog"], [0.9, 0.1], filtered=False) == [1]

    def test_words_of_probability_zero_are_not_predicted(self):
        words = ["My", "dog", "died", "yesterday"]
        assert rank_words(words, [0.2, 0.0, 0.7, 0.0]) == [2]
        assert rank_words(words, [0.2, 0.0, 0.7, 0.0], filtered=False) == [2, 0]
        assert rank_words(words, [0.0, 0.0, 0.0, 0.0]) == []
        scores = score_causes([annotation("My dog died", ["dog", "died"])], [[0.0, 0.0, 0.3]]).summary()
        assert scores["top5_recall"] == scores["strict_top5_recall"] == scores["unfiltered_top5_recall"] == 0.5

    @pytest.mark.parametrize(
        ("predicted", "gold", "recall"),
        [
            (["dog", "died"], ["dog", "died"], 1.0),
            (["dog"], ["dog", "died"], 0.5),
            (["dogs"], ["dog"], 1.0),  # starts with the gold word
            (["hotdog"], ["dog"], 1.0),  # ends with it
            (["Dog"], ["dog"], 0.0),  # case counts
            (["dog"], ["dog", "dog"], 0.5),  # repeats count
            (["dog", "dogs"], ["dog", "dog"], 1.0),
            (["exam"], ["example"], 0.0),  # not the other way round
        ],
    )
    def test_lenient(self, predicted, gold, recall):
        assert lenient_recall(predicted, gold) == recall

    def test_strict(self):
        assert strict_recall([1, 4, 5], [4, 7]) == 0.5
        assert strict_recall([], [4]) == 0.0

    def test_scores_of_two_situations(self):
        first = annotation("My dog died in Norway yesterday", ["dog", "died"])
        second = annotation("The exam went badly", ["exam"])
        scores = score_causes([first, second], [[0.9, 0.8, 0.1, 0.0, 0.7, 0.6], [0.9, 0.2, 0.3, 0.4]]).summary()
        assert scores["top1_recall"] == pytest.approx((0.5 + 0) / 2)
        assert scores["top3_recall"] == pytest.approx((0.5 + 1) / 2)
        assert scores["top5_recall"] == pytest.approx(1.0)
        assert scores["strict_top3_recall"] == pytest.approx((0.5 + 1) / 2)
        assert scores["unfiltered_top1_recall"] == 0.0
        assert scores["oracle_top1_recall"] == pytest.approx((0.5 + 1) / 2)
        assert scores["oracle_top3_recall"] == 1.0

    def test_wrong_numbers_are_refused(self):
        first = annotation("My dog died", ["dog"])
        with pytest.raises(ValueError, match="0 entries for 1"):
            score_causes([first], [])
        with pytest.raises(ValueError, match="probabilities for 3 words"):
            score_causes([first], [[0.1]])


def test_emotion_accuracy_is_over_items():
    assert emotion_correct([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]], [1, 1, 1]).tolist() == [1, 0, 1]


def test_perplexity_is_one_figure_for_the_corpus():
    assert perplexity([2.0, 10.0], [1, 9]) == pytest.approx(math.exp(1.2))
    assert perplexity([2.0, 10.0], [1, 9]) != pytest.approx((math.exp(2) + math.exp(10 / 9)) / 2)


def test_perplexity_equals_torchmetrics_definition():
    """Against cross-entropy of torch over the same tokens."""
    import torch

    logits, targets = torch.randn(30, 50), torch.randint(0, 50, (30,))
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none").double()
    nll = [float(losses[:10].sum()), float(losses[10:].sum())]
    assert perplexity(nll, [10, 20]) == pytest.approx(float(losses.mean().exp()))


def test_units_that_compare_over_tokenizers():
    assert nll_per_word([6.0], ["I can't go"]) == pytest.approx(6 / 4)
    assert bits_per_byte([math.log(2) * 8], ["äa"]) == pytest.approx(8 / 3)


def test_distinct_over_the_corpus():
    responses = ["that is great", "That is sad"]
    assert distinct_n(responses, 1) == pytest.approx(4 / 6)
    assert distinct_n(responses, 2) == pytest.approx(3 / 4)
    assert distinct_n(["one"], 2) == 0.0
    assert distinct_n(["a b", "ab"], 1, str.split) == 1.0, "n-grams are tuples of words"


class TestBertScore:
    @pytest.fixture(scope="class")
    def encoder(self, tiny_encoder_dir):
        pytest.importorskip("bert_score")
        return str(tiny_encoder_dir)

    def test_equals_the_formula_and_empty_responses_score_zero(self, encoder):
        from transformers import AutoModel, AutoTokenizer

        response, reference = "That sounds hard.", "I'm so sorry to hear that."
        bertscore = BertScore(encoder, 1)
        assert "_L1_no-idf" in bertscore.setting
        assert encoder not in bertscore.setting, "a path of this machine"
        scores = bertscore([response, ""], [reference, reference])
        assert scores[1].tolist() == [0, 0, 0]
        import torch

        tokenizer = AutoTokenizer.from_pretrained(encoder)
        model = AutoModel.from_pretrained(encoder).eval()

        def embed(text):
            hidden = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states[1][0]
            return torch.nn.functional.normalize(hidden, dim=-1)

        similarity = embed(response) @ embed(reference).T
        # Words are matched with any token, and averaged without the special ones.
        precision = float(similarity.amax(1)[1:-1].mean().detach())
        recall = float(similarity.amax(0)[1:-1].mean().detach())
        assert scores[0, 0] == pytest.approx(precision, abs=2e-3)
        assert scores[0, 1] == pytest.approx(recall, abs=2e-3)
        f = 2 * precision * recall / (precision + recall)
        assert scores[0, 2] == pytest.approx(f, abs=2e-3)


@pytest.mark.parametrize(
    "measure",
    [
        lambda: perplexity([1.0, 2.0, 3.0], [1]),
        lambda: perplexity([math.nan], [1]),
        lambda: perplexity([], []),
        lambda: nll_per_word([1.0, 2.0], ["a"]),
        lambda: bits_per_byte([math.inf], ["a"]),
        lambda: emotion_correct([[0.1, 0.9]], [31]),
    ],
)
def test_what_does_not_fit_is_refused(measure):
    with pytest.raises(ValueError, match=r"is not a finite number for each|is none of 2"):
        measure()
