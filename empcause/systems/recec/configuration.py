"""Configurations of RecEC: of its emotion reasoner alone, and of the whole system."""

from dataclasses import fields
from typing import Any, Literal

from transformers import AutoConfig, PreTrainedConfig

from empcause.data import EMPATHETIC_DIALOGUES
from empcause.errors import UserError
from empcause.ranges import COUNT, SHARE, Range, check_values

# Turns that count as causes of the emotion, or the extractor's probabilities in place of turns.
CAUSES = ("speaker", "last", "extractor")

# Tokens of the shortest context: the class token, one token of a turn, and its separator.
SHORTEST = 3


class RecECReasonerConfig(PreTrainedConfig):
    """Configuration of the emotion reasoner (stage 1), which is a part of the generator's too.

    Args:
        vocab_size: number of tokens.
        hidden_size: width of a token's state, an even number.
        attention_size: width of queries, keys and values, all heads together.
        ffn_size: inner width of the feed-forward layers.
        dropout: probability with which embeddings, attention weights and the results of layers are dropped.
        causes: what the causes are: every turn of the "speaker", the "last" turn, or what the "extractor" says of each token.
        published: whether the system is that of the authors' code with its faults. The reasoner is then one attention layer
            without residual connection, positions or feed-forward layer; class and separator tokens are the unknown token.
        max_tokens: length in tokens to which contexts and responses are cut.
        id2label: names of the emotions by their ids; default is those of EmpatheticDialogues.

    Raises:
        UserError: a value is out of range.
    """

    model_type = "recec_reasoner"

    vocab_size: int = 11193
    hidden_size: int = 300
    attention_size: int = 512
    ffn_size: int = 1200
    dropout: float = 0.1
    causes: Literal["speaker", "last", "extractor"] = "speaker"
    published: bool = False
    max_tokens: int = 512
    pad_token_id: int = 0
    bos_token_id: int = 1
    eos_token_id: int = 2

    def __post_init__(self, **kwargs: Any) -> None:
        counts = dict.fromkeys(("vocab_size", "hidden_size", "attention_size", "ffn_size"), COUNT)
        check_values(self, counts | {"dropout": SHARE, "max_tokens": Range(SHORTEST)})
        if self.hidden_size % 2:
            raise UserError(f"hidden_size is {self.hidden_size}; positions need an even number.")
        if self.id2label is None:  # type: ignore[has-type]
            self.id2label = dict(enumerate(EMPATHETIC_DIALOGUES.emotions))
        self.label2id = {name: int(index) for index, name in self.id2label.items()}
        if sorted(self.label2id.values()) != list(range(len(self.id2label))):
            raise UserError(
                f"id2label is {self.id2label}; expected the names of emotions by the ids 0, 1, ..., each once."
            )
        super().__post_init__(**kwargs)


class RecECConfig(RecECReasonerConfig):
    """Configuration of RecEC (Gao and others, 2021), the emotion reasoner included.

    Args:
        gate: how the decoder attends to causes: "soft" weighs the states of the context by their cause probability, "hard"
            attends to causes alone.
        num_layers: number of blocks of the encoder, and of the decoder.
        num_heads: number of attention heads in these blocks; the reasoner has one.
        others: see `RecECReasonerConfig`.

    Raises:
        UserError: a value is out of range.
    """

    model_type = "recec"

    gate: Literal["soft", "hard"] = "soft"
    num_layers: int = 2
    num_heads: int = 2
    is_encoder_decoder: bool = True
    decoder_start_token_id: int = 1
    use_cache: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        check_values(self, {"num_layers": COUNT, "num_heads": COUNT})
        if self.attention_size % self.num_heads:
            raise UserError(
                f"attention_size is {self.attention_size}; expected a multiple of num_heads ({self.num_heads})."
            )
        super().__post_init__(**kwargs)

    def reasoner_config(self) -> RecECReasonerConfig:
        """The configuration of the emotion reasoner alone."""
        return RecECReasonerConfig(**{name: getattr(self, name) for name in REASONER_FIELDS})


# Names of what the two configurations share.
REASONER_FIELDS = (
    *sorted({each.name for each in fields(RecECReasonerConfig)} - {each.name for each in fields(PreTrainedConfig)}),
    "id2label",
)

AutoConfig.register("recec_reasoner", RecECReasonerConfig)
AutoConfig.register("recec", RecECConfig)
