"""A dialogue and what is known about it: who said what, how it was answered, which of its words caused the emotion."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# Roles of turns: who tells what happened, and who answers.
SPEAKER, LISTENER = 0, 1


class Causes(NamedTuple):
    """Cause probabilities of a text.

    Attributes:
        spans: `[T, 2]` int64 character spans `(start, end)`.
        probs: `[T]` float32, one probability per span.
    """

    spans: NDArray[np.int64]
    probs: NDArray[np.float32]


@dataclass(frozen=True)
class Dialogue:
    """Turns in order, and what is known about them; `dataclasses.replace` adds what becomes known later.

    What is not known is empty; unknown `causes` are None.

    Attributes:
        turns: what was said, oldest first.
        roles: `SPEAKER` or `LISTENER` per turn.
        response: the listener's answer to the turns, where one is to be learned or scored.
        conv_id: the data set's identifier.
        emotion: the speaker's emotion, by its name in the data set.
        situation: what happened, in the speaker's words.
        causes: probabilities of the words of `text`, once an extractor has read it.
    """

    turns: tuple[str, ...]
    roles: tuple[int, ...]
    response: str = ""
    conv_id: str = ""
    emotion: str = ""
    situation: str = ""
    causes: Causes | None = field(default=None, compare=False, repr=False)

    @cached_property
    def text(self) -> str:
        """The turns joined by one space, as the extractor reads them."""
        return " ".join(self.turns)

    @cached_property
    def turn_spans(self) -> tuple[tuple[int, int], ...]:
        """Character span of every turn in `text`."""
        spans, start = [], 0
        for turn in self.turns:
            spans.append((start, start + len(turn)))
            start += len(turn) + 1
        return tuple(spans)


def live_dialogue(turns: Sequence[str]) -> Dialogue:
    """Make a dialogue of turns in which speaker and listener alternate; the last turn is the speaker's."""
    roles = tuple(SPEAKER if (len(turns) - index) % 2 else LISTENER for index in range(len(turns)))
    return Dialogue(tuple(turns), roles)


def response_pairs(dialogues: Iterable[Dialogue]) -> list[Dialogue]:
    """Make a dialogue of every listener's turn that answers something: that is its `response`, those before are its turns."""
    return [
        replace(dialogue, turns=dialogue.turns[:turn], roles=dialogue.roles[:turn], response=response)
        for dialogue in dialogues
        for turn, (response, role) in enumerate(zip(dialogue.turns, dialogue.roles, strict=True))
        if role == LISTENER and turn > 0
    ]
