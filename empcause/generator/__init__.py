"""Stage 2: answers that attend to the causes of the emotion."""

import empcause.integration  # noqa: F401  registers attn_implementation="empcause"
from empcause.generator.causes import CauseCache, TextCauses, token_causes
from empcause.generator.configuration import EmpatheticGPT2Config, EmpatheticLlamaConfig
from empcause.generator.inference import (
    Reply,
    Responder,
    generate_responses,
    generator_item,
    load_generator,
    longest_sequence,
    response_nll,
)
from empcause.generator.modeling import (
    GENERATORS,
    EmpatheticGPT2LMHeadModel,
    EmpatheticLlamaForCausalLM,
    EmpatheticMixin,
    GeneratorOutput,
    add_separator,
)

__all__ = [
    "GENERATORS",
    "CauseCache",
    "EmpatheticGPT2Config",
    "EmpatheticGPT2LMHeadModel",
    "EmpatheticLlamaConfig",
    "EmpatheticLlamaForCausalLM",
    "EmpatheticMixin",
    "GeneratorOutput",
    "Reply",
    "Responder",
    "TextCauses",
    "add_separator",
    "generate_responses",
    "generator_item",
    "load_generator",
    "longest_sequence",
    "response_nll",
    "token_causes",
]
