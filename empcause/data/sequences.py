"""Dialogues as the generator reads them: `u1 [SEP] u2 [SEP] ... un [SEP] y1 ... ym [EOS]`."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from empcause.data.alignment import join_turns
from empcause.data.records import LISTENER
from empcause.errors import UserError

IGNORED = -100

# One token each of context and response, and what ends them.
MIN_LENGTH = 4


@dataclass(frozen=True)
class EncodedDialogue:
    """A context, with or without its response, as token ids.

    Attributes:
        input_ids: `[S]` int64.
        roles: `[S]` int64, 0 speaker and 1 listener. A separator has the role of the turn that it opens, so the last one
            has the listener's, and generated tokens continue it.
        labels: `[S]` int64, -100 outside the response and its end token.
        spans: `[S, 2]` int64, characters in the text of `join_turns(context)`; empty at separators and in the response.
        dropped_turns: oldest turns left out because the whole was too long.
        cut_response: the response lost its end because it was too long by itself.
        cut_turn: the last turn lost its beginning for the same reason.
    """

    input_ids: NDArray[np.int64]
    roles: NDArray[np.int64]
    labels: NDArray[np.int64]
    spans: NDArray[np.int64]
    dropped_turns: int = 0
    cut_response: bool = False
    cut_turn: bool = False


def encode_dialogue(
    tokenizer: PreTrainedTokenizerBase,
    context: Sequence[str],
    roles: Sequence[int],
    response: str | None,
    max_length: int,
) -> EncodedDialogue:
    """Encode a context and, for training and scoring, its response.

    Text is text: "[SEP]" or "</s>" in a turn is spelled out and is not the token of this name.

    Args:
        tokenizer: has a separator token and an end token.
        context: turns, oldest first.
        roles: 0 (speaker) or 1 (listener) per turn.
        response: the listener's answer, or None to generate one.
        max_length: in tokens; the oldest turns are dropped until it fits, and if one turn alone is too long, its
            beginning is; a response that is too long by itself loses its end.

    Raises:
        UserError: the context is empty, or `max_length` too short for one token of it and one of the response.
    """
    if not context or not any(turn.strip() for turn in context):
        raise UserError("The dialogue is empty; at least one turn is needed.")
    separator, end = tokenizer.sep_token_id, tokenizer.eos_token_id
    plain = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    answer: list[int] = []
    cut_turn = cut_response = False
    if response is not None:
        ids = tokenizer(response, **plain)["input_ids"]
        answer = [*ids[: max(1, max_length // 2 - 1)], end]
        cut_response = len(ids) >= len(answer)
    _, turn_spans = join_turns(context)
    room = max_length - len(answer)
    if room < 2:
        raise UserError(f"A dialogue does not fit into {max_length} tokens; at least {MIN_LENGTH} are needed.")
    pieces: list[tuple[list[int], list[tuple[int, int]], int]] = []
    used = 0
    for index in range(len(context) - 1, -1, -1):
        encoded = tokenizer(context[index], return_offsets_mapping=True, **plain)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        if used + len(ids) + 1 > room:
            if pieces:
                break
            cut_turn = True
            ids, offsets = ids[-(room - 1) :], offsets[-(room - 1) :]
        start = turn_spans[index][0]
        pieces.insert(0, (ids, [(start + first, start + last) for first, last in offsets], roles[index]))
        used += len(ids) + 1
    input_ids: list[int] = []
    token_roles: list[int] = []
    spans: list[tuple[int, int]] = []
    for place, (ids, offsets, role) in enumerate(pieces):
        opens = pieces[place + 1][2] if place + 1 < len(pieces) else LISTENER
        input_ids += [*ids, separator]
        token_roles += [role] * len(ids) + [opens]
        spans += [*offsets, (0, 0)]
    prompt = len(input_ids)
    return EncodedDialogue(
        np.array(input_ids + answer, np.int64),
        np.array(token_roles + [LISTENER] * len(answer), np.int64),
        np.array([IGNORED] * prompt + answer, np.int64),
        np.array(spans + [(0, 0)] * len(answer), np.int64).reshape(-1, 2),
        len(context) - len(pieces),
        cut_response,
        cut_turn,
    )
