"""Configuration of the emotion cause extractor."""

from typing import Any, ClassVar, Literal

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from empcause.data import EMPATHETIC_DIALOGUES
from empcause.errors import UserError
from empcause.ranges import COUNT, NOT_NEGATIVE, SHARE, check_values


class CauseExtractorConfig(PreTrainedConfig):
    """Configuration of an extractor: its encoder, and how its losses are computed and combined.

    Args:
        encoder: configuration of a transformers encoder (BERT, RoBERTa, XLM-R, ELECTRA, MPNet, DistilBERT, ...).
        cause_from: where cause probabilities come from: the detection "head" (eq 6), or the "attention" of the first
            token, scaled to a maximum of 1 per text (the paper's RoBERTa_Att).
        attention_pooling: how the heads of that attention are combined, "mean" or "max".
        automatic_top_k: how many words per text the automatic labels mark as causes.
        emotion_weight, cause_weight, aux_weight: weights of the three losses (eq 9).
        cause_reduction: cause loss as the "mean" over real tokens, or their "sum" per batch of texts.
        aux_form: auxiliary loss as the "complement" `1 - <Att, C1>`, or "literal" `<Att, C1>` (eq 8).
        head_dropout: dropout probability before both heads.
        max_length: length in tokens to which texts are cut in training; the trained extractor reads as much as its encoder can.
        id2label: names of the emotions by their ids; default is those of EmpatheticDialogues.

    Raises:
        UserError: a value is out of range, or the encoder's type is unknown.
    """

    model_type = "empcause_extractor"
    sub_configs: ClassVar = {"encoder": AutoConfig}

    encoder: dict | PreTrainedConfig | None = None
    cause_from: Literal["head", "attention"] = "head"
    attention_pooling: Literal["mean", "max"] = "mean"
    automatic_top_k: int = 3
    emotion_weight: float = 1 / 3
    cause_weight: float = 1.0
    aux_weight: float = 1.0
    cause_reduction: Literal["mean", "sum"] = "mean"
    aux_form: Literal["complement", "literal"] = "complement"
    head_dropout: float = 0.1
    max_length: int = 128

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.encoder, dict):
            values = dict(self.encoder)
            try:
                self.encoder = AutoConfig.for_model(values.pop("model_type", None), **values)
            except (ValueError, TypeError, StrictDataclassError) as error:
                raise UserError(f"encoder: {' '.join(str(error).split())[:200]}") from error
        weights = dict.fromkeys(("emotion_weight", "cause_weight", "aux_weight"), NOT_NEGATIVE)
        check_values(self, weights | {"automatic_top_k": COUNT, "head_dropout": SHARE, "max_length": COUNT})
        if self.id2label is None:  # type: ignore[has-type]
            self.id2label = dict(enumerate(EMPATHETIC_DIALOGUES.emotions))
        self.label2id = {name: int(index) for index, name in self.id2label.items()}
        if sorted(self.label2id.values()) != list(range(len(self.id2label))):
            raise UserError(
                f"id2label is {self.id2label}; expected the names of emotions by the ids 0, 1, ..., each once."
            )
        super().__post_init__(**kwargs)


AutoConfig.register("empcause_extractor", CauseExtractorConfig)
