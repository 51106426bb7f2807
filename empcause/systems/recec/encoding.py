"""Contexts and responses as RecEC reads them, and which of their tokens belong to causes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from empcause.data import SPEAKER, Dialogue, align_max
from empcause.data.collation import pad_batch
from empcause.data.sequences import IGNORED
from empcause.errors import UserError
from empcause.systems.recec.configuration import RecECReasonerConfig
from empcause.systems.vocabulary import encode_words


@dataclass(frozen=True)
class EncodedPair:
    """A context `<CLS> u1 <SEP> u2 <SEP> ...` with its response `y1 ... ym <EOS>`, as token ids.

    Attributes:
        input_ids: `[S]` int64, the context.
        spans: `[S, 2]` int64, characters in the dialogue's `text`; empty at special tokens.
        cause_labels: `[S]` int64, 1 where the turn of a token or separator is a cause, else 0; -100 at the class token, and
            everywhere where causes come from an extractor.
        labels: `[T]` int64, the response with its end token; without a response the end token alone.
        cause_probs: `[S]` float32, the largest probability of the extractor that overlaps a token, 0 at special tokens; None
            where causes do not come from an extractor, or the dialogue has none yet.
        dropped_turns: oldest turns left out because the context was too long.
        cut_response: the response lost its end because it was too long.
    """

    input_ids: NDArray[np.int64]
    spans: NDArray[np.int64]
    cause_labels: NDArray[np.int64]
    labels: NDArray[np.int64]
    cause_probs: NDArray[np.float32] | None = None
    dropped_turns: int = 0
    cut_response: bool = False

    def __len__(self) -> int:
        """Number of tokens of the context or of the response, whichever has more."""
        return max(len(self.input_ids), len(self.labels))

    @property
    def context(self) -> dict[str, Any]:
        """The arguments of the generator's `forward` that the context has, by name."""
        probs = {} if self.cause_probs is None else {"cause_probs": self.cause_probs}
        return {"input_ids": self.input_ids, **probs}

    @property
    def item(self) -> dict[str, Any]:
        """The arguments of the generator's `forward` that the context and the response have, by name."""
        return self.context | {"labels": self.labels}


def turn_causes(dialogue: Dialogue, causes: str) -> list[int]:
    """Say which turns of a context are labelled as causes, in place of a recogniser of causes.

    Args:
        dialogue: the context.
        causes: "speaker": every turn of the speaker; "last": the last turn; "extractor": none has a label, because the
            extractor's probabilities take the place of both labels and predictions.

    Returns:
        Per turn 1, 0, or -100 for no label.
    """
    if causes == "speaker":
        return [int(role == SPEAKER) for role in dialogue.roles]
    last = len(dialogue.turns) - 1
    return [int(turn == last) if causes == "last" else IGNORED for turn in range(len(dialogue.turns))]


def encode_pair(tokenizer: PreTrainedTokenizerBase, dialogue: Dialogue, config: RecECReasonerConfig) -> EncodedPair:
    """Encode a context with its response. What does not fit into `max_tokens` tokens is left out, the oldest turns first.

    Args:
        tokenizer: the model's tokenizer.
        dialogue: the context, with or without a response.
        config: says which turns are causes, how long texts may be, and whether class and separator are as published.

    Raises:
        UserError: the dialogue has no turn.
    """
    if not dialogue.turns:
        raise UserError("A dialogue is empty; at least one turn is needed.")
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    if config.published:
        cls = sep = tokenizer.unk_token_id
    room = config.max_tokens - 1
    pieces: list[tuple[list[int], list[tuple[int, int]], int]] = []
    *words, answer = encode_words(tokenizer, [*dialogue.turns, dialogue.response])
    turns = zip(words, turn_causes(dialogue, config.causes), dialogue.turn_spans, strict=True)
    for (_, ids, offsets), cause, (start, _) in reversed(list(turns)):
        if len(ids) + 1 > room:
            if pieces:
                break
            ids, offsets = ids[-(room - 1) :], offsets[-(room - 1) :]
        pieces.append(([*ids, sep], [*((start + first, start + last) for first, last in offsets), (0, 0)], cause))
        room -= len(ids) + 1
    pieces.reverse()
    spans = np.array([(0, 0), *(span for _, offsets, _ in pieces for span in offsets)], np.int64)
    probs = None
    if config.causes == "extractor" and dialogue.causes is not None:
        probs = align_max(dialogue.causes.spans, dialogue.causes.probs, spans)
    return EncodedPair(
        input_ids=np.array([cls, *(token for ids, _, _ in pieces for token in ids)], np.int64),
        spans=spans,
        cause_labels=np.array([IGNORED, *(cause for ids, _, cause in pieces for _ in ids)], np.int64),
        labels=np.array([*answer.ids[: config.max_tokens - 1], tokenizer.eos_token_id], np.int64),
        cause_probs=probs,
        dropped_turns=len(dialogue.turns) - len(pieces),
        cut_response=len(answer.ids) >= config.max_tokens,
    )


def collate(items: Sequence[Mapping[str, Any]], pad_token_id: int) -> dict[str, Tensor]:
    """Make a batch of items: contexts are padded as `pad_batch` does it, and responses (`labels`) by themselves.

    Args:
        items: arguments of a model's `forward`, `[S]` or `[T]` arrays and single values.
        pad_token_id: padding value of `input_ids`.

    Returns:
        Tensors `[B, S]` and `[B]`, `attention_mask` `[B, S]`, and `labels` `[B, T]` with -100 behind their ends.
    """
    batch = pad_batch([{name: item[name] for name in item if name != "labels"} for item in items], pad_token_id)
    if "labels" in items[0]:
        rows = [torch.from_numpy(item["labels"]) for item in items]
        batch["labels"] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORED)
    return batch
