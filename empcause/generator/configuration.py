"""Configurations of the generators: their base model's, and how causes are used."""

from dataclasses import dataclass
from typing import Literal

from transformers import AutoConfig, GPT2Config, LlamaConfig


@dataclass(kw_only=True)
class CauseFields:
    """What a generator adds to its base configuration.

    Attributes:
        gamma: factor of the attention bias; 0 is the base model without bias.
        cause_scope: which turns may hold causes: the whole "context", the "speaker"'s turns, or the speaker's "last" turn.
        cause_threshold: None uses the extractor's probabilities; a number turns them into 0 and 1 there.
    """

    gamma: float = 1.0
    cause_scope: Literal["context", "speaker", "last"] = "context"
    cause_threshold: float | None = None


class EmpatheticGPT2Config(CauseFields, GPT2Config):
    """`GPT2Config` with `CauseFields`."""

    model_type = "empathetic_gpt2"


class EmpatheticLlamaConfig(CauseFields, LlamaConfig):
    """`LlamaConfig` with `CauseFields`."""

    model_type = "empathetic_llama"


AutoConfig.register("empathetic_gpt2", EmpatheticGPT2Config)
AutoConfig.register("empathetic_llama", EmpatheticLlamaConfig)
