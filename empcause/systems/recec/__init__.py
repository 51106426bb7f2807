"""RecEC (Gao and others, 2021): a generator that attends to the causes that an emotion reasoner recognises."""

from empcause.systems.recec.configuration import CAUSES, RecECConfig, RecECReasonerConfig
from empcause.systems.recec.encoding import EncodedPair, collate, encode_pair, turn_causes
from empcause.systems.recec.modeling import RecEC, RecECReasoner
from empcause.systems.recec.system import (
    RecECGreedy,
    RecECSystem,
    answer_pairs,
    load_reasoner,
    load_recec,
    pair_nll,
    published_perplexity,
    read_pairs,
)

__all__ = [
    "CAUSES",
    "EncodedPair",
    "RecEC",
    "RecECConfig",
    "RecECGreedy",
    "RecECReasoner",
    "RecECReasonerConfig",
    "RecECSystem",
    "answer_pairs",
    "collate",
    "encode_pair",
    "load_reasoner",
    "load_recec",
    "pair_nll",
    "published_perplexity",
    "read_pairs",
    "turn_causes",
]
