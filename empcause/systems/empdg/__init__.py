"""EmpDG, a published system that answers by the emotion and the emotion words of a dialogue (Li et al., COLING 2020)."""

from empcause.systems.empdg.configuration import EmpDGConfig
from empcause.systems.empdg.discriminators import (
    AdversarialEmpDG,
    AdversarialEmpDGConfig,
    Discriminator,
    gradient_penalty,
)
from empcause.systems.empdg.encoding import SPECIAL_TOKENS, EncodedPair, Encoder, collate, spell, stack
from empcause.systems.empdg.modeling import EmpDG, EmpDGContext, EmpDGOutput, copy_weights, mix_copies
from empcause.systems.empdg.system import EmpDGRanking, EmpDGSystem, measure_pairs

__all__ = [
    "SPECIAL_TOKENS",
    "AdversarialEmpDG",
    "AdversarialEmpDGConfig",
    "Discriminator",
    "EmpDG",
    "EmpDGConfig",
    "EmpDGContext",
    "EmpDGOutput",
    "EmpDGRanking",
    "EmpDGSystem",
    "EncodedPair",
    "Encoder",
    "collate",
    "copy_weights",
    "gradient_penalty",
    "measure_pairs",
    "mix_copies",
    "spell",
    "stack",
]
