"""Dialogues as the generator reads them: `u1 [SEP] u2 [SEP] ... un [SEP] y1 ... ym [EOS]`."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from empcause.data.alignment import align_max
from empcause.data.dialogue import LISTENER, SPEAKER, Dialogue
from empcause.errors import UserError

# The label of a token that no loss counts.
IGNORED = -100

# Tokens of the shortest sequence: one of the context, a separator, one of the response, and the end token.
MIN_LENGTH = 4

# Options of the tokenizer. "[SEP]" or "</s>" in a turn is ordinary text, not the special token of this name.
_PLAIN = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}

CauseScope = Literal["context", "speaker", "last"]


@dataclass(frozen=True)
class EncodedDialogue:
    """A dialogue, with or without its response, as token ids.

    Attributes:
        input_ids: `[S]` int64.
        token_type_ids: `[S]` int64, the roles: 0 speaker and 1 listener. A separator has the role of the turn that it opens,
            so the last one has the listener's, and generated tokens continue it.
        spans: `[S, 2]` int64, characters in the dialogue's `text`; empty at separators and in the response.
        labels: `[S]` int64, -100 outside the response and its end token; None without a response.
        cause_probs: `[S]` float32, the largest cause probability that overlaps a token, 0 at separators and in the response;
            None where the dialogue has no causes.
        dropped_turns: oldest turns left out because the whole was too long.
        cut_response: the response lost its end because it was too long by itself.
        cut_turn: the last turn lost its beginning for the same reason.
    """

    input_ids: NDArray[np.int64]
    token_type_ids: NDArray[np.int64]
    spans: NDArray[np.int64]
    labels: NDArray[np.int64] | None = None
    cause_probs: NDArray[np.float32] | None = None
    dropped_turns: int = 0
    cut_response: bool = False
    cut_turn: bool = False

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.input_ids)

    @property
    def item(self) -> dict[str, NDArray]:
        """The arguments of the generator's `forward` that the dialogue has, by name."""
        names = ("input_ids", "token_type_ids", "labels", "cause_probs")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


def encode_response(tokenizer: PreTrainedTokenizerBase, response: str, max_length: int) -> tuple[list[int], bool]:
    """Tokenize a response.

    Returns:
        Its token ids with the end token, at most half of `max_length` (but at least two), and whether its end was cut off.
    """
    ids = tokenizer(response, **_PLAIN)["input_ids"]
    answer = [*ids[: max(1, max_length // 2 - 1)], tokenizer.eos_token_id]
    return answer, len(ids) >= len(answer)


def encode_dialogue(
    tokenizer: PreTrainedTokenizerBase,
    dialogue: Dialogue,
    max_length: int,
    *,
    cause_scope: CauseScope = "context",
    cause_threshold: float | None = None,
) -> EncodedDialogue:
    """Encode a dialogue with its causes and, where it has one, its response.

    Args:
        tokenizer: has a separator token and an end token.
        dialogue: the dialogue; it needs a turn.
        max_length: greatest number of tokens. The oldest turns are dropped until the dialogue fits. If the last turn alone is too
            long, its beginning is cut off; if the response is longer than half of this, its end is.
        cause_scope: which turns may hold causes: the whole "context", the "speaker"'s turns, or the speaker's "last" turn.
        cause_threshold: probabilities of at least this value become 1, all others 0; None leaves them as they are.

    Raises:
        UserError: the dialogue is empty, or `max_length` too short for one token of it and one of the response.
    """
    if not any(turn.strip() for turn in dialogue.turns):
        raise UserError("The dialogue is empty; at least one turn is needed.")
    answer: list[int] = []
    cut_turn = cut_response = False
    if dialogue.response:
        answer, cut_response = encode_response(tokenizer, dialogue.response, max_length)
    room = max_length - len(answer)
    if room < 2:
        raise UserError(f"A dialogue does not fit into {max_length} tokens; at least {MIN_LENGTH} are needed.")
    pieces: list[tuple[list[int], list[tuple[int, int]], int]] = []
    used = 0
    for turn, role, (start, _) in reversed(list(zip(dialogue.turns, dialogue.roles, dialogue.turn_spans, strict=True))):
        encoded = tokenizer(turn, return_offsets_mapping=True, **_PLAIN)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        if used + len(ids) + 1 > room:
            if pieces:
                break
            cut_turn = True
            ids, offsets = ids[-(room - 1) :], offsets[-(room - 1) :]
        pieces.insert(0, (ids, [(start + first, start + last) for first, last in offsets], role))
        used += len(ids) + 1
    input_ids: list[int] = []
    token_roles: list[int] = []
    token_spans: list[tuple[int, int]] = []
    for place, (ids, offsets, role) in enumerate(pieces):
        opens = pieces[place + 1][2] if place + 1 < len(pieces) else LISTENER
        input_ids += [*ids, tokenizer.sep_token_id]
        token_roles += [role] * len(ids) + [opens]
        token_spans += [*offsets, (0, 0)]
    labels = np.array([IGNORED] * len(input_ids) + answer, np.int64) if answer else None
    spans = np.array(token_spans + [(0, 0)] * len(answer), np.int64).reshape(-1, 2)
    return EncodedDialogue(
        input_ids=np.array(input_ids + answer, np.int64),
        token_type_ids=np.array(token_roles + [LISTENER] * len(answer), np.int64),
        spans=spans,
        labels=labels,
        cause_probs=_cause_probs(dialogue, spans, cause_scope, cause_threshold),
        dropped_turns=len(dialogue.turns) - len(pieces),
        cut_response=cut_response,
        cut_turn=cut_turn,
    )


def _cause_probs(
    dialogue: Dialogue, spans: NDArray[np.int64], scope: CauseScope, threshold: float | None
) -> NDArray[np.float32] | None:
    """The largest cause probability that overlaps each token's span: `[S]` float32; None where the dialogue has no causes."""
    if dialogue.causes is None:
        return None
    probs = dialogue.causes.probs
    if threshold is not None:
        probs = (probs >= threshold).astype(np.float32)
    cause_probs = align_max(dialogue.causes.spans, probs, spans)
    if scope == "context":
        return cause_probs
    allowed = [span for span, role in zip(dialogue.turn_spans, dialogue.roles, strict=True) if role == SPEAKER]
    inside = np.zeros(len(cause_probs), bool)
    for start, end in allowed[-1:] if scope == "last" else allowed:
        inside |= (spans[:, 0] >= start) & (spans[:, 1] <= end)
    return np.where(inside, cause_probs, np.float32(0))
