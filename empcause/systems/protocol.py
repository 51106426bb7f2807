"""What an evaluation may ask of a system.

A system is a `System`, and besides any of `Reads`, `Scores` and `Answers`: `isinstance` tells which, by the methods that it has.
An evaluation asks for what the system can do, and for no more.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from empcause.data import Causes, Dialogue, Word


@dataclass(frozen=True)
class Reading:
    """What a system finds in one text; None is what it does not find.

    Attributes:
        emotion_probs: `[E]` float32, in the order of the system's `emotions`.
        word_probs: `[W]` float32, the cause probability of every word. Only their order is scored.
        causes: cause probabilities of pieces of the text, which the system wants to have in the dialogue (`Dialogue.causes`)
            when it is to score or to answer it.
    """

    emotion_probs: NDArray[np.float32] | None = None
    word_probs: NDArray[np.float32] | None = None
    causes: Causes | None = None


@runtime_checkable
class System(Protocol):
    """What every system says of itself.

    Attributes:
        folders: where it was loaded from, "model" first; all that decides its results lies in these folders.
        note: what a report should say of it, as part of a sentence; may be empty.
    """

    folders: dict[str, Path]
    note: str


@runtime_checkable
class Reads(System, Protocol):
    """Finds emotions, causes or both in texts."""

    @property
    def emotions(self) -> Sequence[str]:
        """Names of the emotions that it knows, by their ids."""
        ...

    def read(self, texts: Sequence[str], words: Sequence[Sequence[Word]], batch_size: int) -> list[Reading]:
        """Read texts.

        Args:
            texts: raw texts; of a dialogue, its joined text.
            words: the words of each.
            batch_size: texts per batch.
        """
        ...


@runtime_checkable
class Encoded(Protocol):
    """A dialogue with its response, as a system scores it.

    Attributes:
        dropped_turns: oldest turns that did not fit.
        cut_response: the response lost its end, which is then not scored.
    """

    dropped_turns: int
    cut_response: bool

    def __len__(self) -> int:
        """Number of tokens."""
        ...


@runtime_checkable
class Scores(System, Protocol):
    """Knows how probable the responses of dialogues are."""

    def targets(self, dialogues: Sequence[Dialogue]) -> list[list[int]]:
        """Ids of the tokens of each response that are scored; systems are compared only where these are the same."""
        ...

    def encode(self, dialogues: Sequence[Dialogue]) -> Sequence[Encoded]:
        """The dialogues as `score` takes them, made once."""
        ...

    def score(self, encoded: Sequence[Any], batch_size: int) -> list[tuple[float, int]]:
        """Summed negative log-likelihood of each response, in nats, and its number of tokens."""
        ...


@runtime_checkable
class Answers(System, Protocol):
    """Answers dialogues."""

    def check_room(self, max_new_tokens: int) -> None:
        """Before the work: whether it can write answers of that length.

        Raises:
            UserError: it cannot.
        """
        ...

    def answer(self, dialogues: Sequence[Dialogue], batch_size: int, max_new_tokens: int) -> list[str]:
        """The most probable answer to each dialogue, whose own response is not looked at.

        Args:
            dialogues: what was said.
            batch_size: dialogues per batch.
            max_new_tokens: longest answer in tokens.
        """
        ...
