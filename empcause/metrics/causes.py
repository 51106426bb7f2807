"""Top-k recall: how many of the annotated words are among the words with the highest cause probability."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from empcause.data import CauseAnnotation, is_content_word

RECALL_CUTS = (1, 3, 5)
# Prefixes of the recalls: lenient, by position, lenient without the stop-word filter, and the highest possible recall.
RECALL_KINDS = ("", "strict_", "unfiltered_", "oracle_")


@dataclass(frozen=True)
class CauseScores:
    """Recall per situation by name, such as `items["top5_recall"]`: `[n]` float64 in [0, 1], in the order of the annotations."""

    items: dict[str, NDArray[np.float64]]

    def summary(self) -> dict[str, float]:
        """Mean over situations of every figure."""
        return {name: float(values.mean()) for name, values in self.items.items()}


def rank_words(words: Sequence[str], probs: ArrayLike, *, filtered: bool = True) -> list[int]:
    """Order words by decreasing probability; of equal ones, the earlier word comes first.

    Blank words are left out, and words of probability 0, which are not predicted.

    Args:
        words: the words of a text.
        probs: `[W]` cause probabilities of the words.
        filtered: leave out stop words and punctuation; if there is nothing else, the most probable one stays.

    Returns:
        Indices of the words.
    """
    values = np.asarray(probs, np.float64)
    order = np.argsort(-values, kind="stable").tolist()
    order = [index for index in order if words[index].strip() and values[index] != 0]
    if not filtered:
        return order
    return [index for index in order if is_content_word(words[index])] or order[:1]


def lenient_recall(predicted: Sequence[str], gold: Sequence[str]) -> float:
    """Recall as EmoCause's authors compute it: by word; positions are ignored, case and repeated words count.

    For each annotated word, every predicted word that starts or ends with it counts as that word.

    Args:
        predicted: the predicted words.
        gold: the annotated words, at least one.
    """
    matched = list(predicted)
    for word in gold:
        matched = [word if other.startswith(word) or other.endswith(word) else other for other in matched]
    return sum((Counter(matched) & Counter(gold)).values()) / len(gold)


def strict_recall(predicted: Iterable[int], gold: Iterable[int]) -> float:
    """Share of the annotated positions that are among the predicted ones.

    Args:
        predicted: indices of the predicted words.
        gold: indices of the annotated words, at least one.
    """
    positions = set(gold)
    return len(positions & set(predicted)) / len(positions)


def score_causes(
    annotations: Sequence[CauseAnnotation], word_probs: Sequence[ArrayLike], k: Sequence[int] = RECALL_CUTS
) -> CauseScores:
    """Compute the Top-k recall of cause words.

    Args:
        annotations: situations with their annotated words.
        word_probs: for each situation `[W]` probabilities, one per word; a word of probability 0 is not predicted.
        k: numbers of the most probable words that count as predicted.

    Returns:
        For each k: `topK_recall` (lenient), `strict_topK_recall` (by position), `unfiltered_topK_recall` (lenient, without
        the stop-word filter), and `oracle_topK_recall` (that of a perfect ranking).

    Raises:
        ValueError: numbers of situations or words do not fit, no word is annotated, or a probability is not finite.
    """
    if len(annotations) != len(word_probs):
        raise ValueError(f"word_probs has {len(word_probs)} entries for {len(annotations)} annotations.")
    items: dict[str, list[float]] = {}
    for annotation, probs in zip(annotations, word_probs, strict=True):
        words = [word.text for word in annotation.words]
        if np.shape(probs) != (len(words),):
            raise ValueError(f"{annotation.conv_id}: {np.shape(probs)} probabilities for {len(words)} words.")
        if not annotation.gold or not np.isfinite(probs).all():
            what = "no annotated word" if not annotation.gold else "a probability that is not a finite number"
            raise ValueError(f"{annotation.conv_id} has {what}.")
        gold = [words[index] for index in annotation.gold]
        ranking, everything = rank_words(words, probs), rank_words(words, probs, filtered=False)
        for cut in k:
            scores = {
                "": lenient_recall([words[index] for index in ranking[:cut]], gold),
                "strict_": strict_recall(ranking[:cut], annotation.gold),
                "unfiltered_": lenient_recall([words[index] for index in everything[:cut]], gold),
                "oracle_": min(cut, len(gold)) / len(gold),
            }
            for kind, score in scores.items():
                items.setdefault(f"{kind}top{cut}_recall", []).append(score)
    return CauseScores({name: np.array(values) for name, values in items.items()})
