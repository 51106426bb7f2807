"""Metrics: pure functions of a system's outputs and the references."""

from empcause.metrics.bertscore import BertScore
from empcause.metrics.causes import (
    RECALL_CUTS,
    RECALL_KINDS,
    CauseScores,
    lenient_recall,
    rank_words,
    score_causes,
    strict_recall,
)
from empcause.metrics.emotions import emotion_correct
from empcause.metrics.responses import bits_per_byte, distinct_n, nll_per_word, perplexity

__all__ = [
    "RECALL_CUTS",
    "RECALL_KINDS",
    "BertScore",
    "CauseScores",
    "bits_per_byte",
    "distinct_n",
    "emotion_correct",
    "lenient_recall",
    "nll_per_word",
    "perplexity",
    "rank_words",
    "score_causes",
    "strict_recall",
]
