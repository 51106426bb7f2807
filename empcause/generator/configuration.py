"""Configurations of the generators: that of the base model, and how causes are used."""

from dataclasses import dataclass
from typing import Any, Literal

from transformers import AutoConfig, GPT2Config, LlamaConfig

from empcause.ranges import NOT_NEGATIVE, SHARE, check_values


@dataclass(kw_only=True)
class CauseFields:
    """What a generator adds to its base configuration.

    Attributes:
        gamma: factor of the attention bias; 0 is the base model without bias.
        cause_scope: which turns may hold causes: the whole "context", the "speaker"'s turns, or the speaker's "last" turn.
        cause_threshold: probabilities of at least this value become 1, all others 0; None uses the extractor's as they are.

    Raises:
        UserError: a value is out of range.
    """

    gamma: float = 1.0
    cause_scope: Literal["context", "speaker", "last"] = "context"
    cause_threshold: float | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        check_values(self, {"gamma": NOT_NEGATIVE, "cause_threshold": SHARE})
        super().__post_init__(**kwargs)  # type: ignore[misc]


class EmpatheticGPT2Config(CauseFields, GPT2Config):
    """`GPT2Config` with `CauseFields`."""

    model_type = "empathetic_gpt2"


class EmpatheticLlamaConfig(CauseFields, LlamaConfig):
    """`LlamaConfig` with `CauseFields`."""

    model_type = "empathetic_llama"


AutoConfig.register("empathetic_gpt2", EmpatheticGPT2Config)
AutoConfig.register("empathetic_llama", EmpatheticLlamaConfig)
