"""Stage 2: answers that attend to the causes of the emotion."""

import empcause.integration  # noqa: F401  registers attn_implementation="empcause"
from empcause.generator.causes import CauseCache
from empcause.generator.configuration import EmpatheticGPT2Config, EmpatheticLlamaConfig
from empcause.generator.inference import (
    Reply,
    Responder,
    encode_for,
    generate_responses,
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
    "add_separator",
    "encode_for",
    "generate_responses",
    "load_generator",
    "longest_sequence",
    "response_nll",
]
