"""What an evaluation may ask of a system.

Every system is a `System`, and any of `Reads`, `Scores` and `Answers`; `isinstance` tells which by the methods that it has.
`ReadsDialogues` and `ScoresWords` say more of systems that read or score.
An evaluation measures what the system can do, and leaves out the rest.
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
    """What a system finds in one text; what it does not look for is None.

    Attributes:
        emotion_probs: `[E]` float32, probabilities in the order of the system's `emotions`.
        word_probs: `[W]` float32, the cause probability of every word, 0 for a word that the system does not predict. Only their
            order is scored.
        causes: cause probabilities of pieces of the text. The dialogues that the system scores and answers have them
            (`Dialogue.causes`).
    """

    emotion_probs: NDArray[np.float32] | None = None
    word_probs: NDArray[np.float32] | None = None
    causes: Causes | None = None


@runtime_checkable
class System(Protocol):
    """What every system says about itself.

    Attributes:
        folders: the folders that it was loaded from, "model" first. Everything that its results depend on lies in them: an
            evaluation that is repeated notices a change of any file there, and of nothing else.
        note: what a report should say about it, as part of a sentence; may be empty.
    """

    folders: dict[str, Path]
    note: str


@runtime_checkable
class Reads(System, Protocol):
    """Finds emotions, causes or both in texts."""

    @property
    def emotions(self) -> Sequence[str]:
        """Names of the emotions that it knows, by their ids; empty if it finds no emotions."""
        ...

    def read(self, texts: Sequence[str], words: Sequence[Sequence[Word]], batch_size: int) -> list[Reading]:
        """Find emotions and causes in texts.

        Args:
            texts: raw texts; for a dialogue, its `text`.
            words: the words of each text.
            batch_size: texts per batch.

        Returns:
            One reading per text.
        """
        ...


@runtime_checkable
class ReadsDialogues(Reads, Protocol):
    """Reads a dialogue otherwise than as one text, because it matters to it where turns end or who says them."""

    def read_dialogues(
        self, dialogues: Sequence[Dialogue], words: Sequence[Sequence[Word]], batch_size: int
    ) -> list[Reading]:
        """Find emotions and causes in dialogues.

        Args:
            dialogues: what was said; a response that they have is not looked at.
            words: the words of each dialogue's `text`.
            batch_size: dialogues per batch.

        Returns:
            One reading per dialogue.
        """
        ...


@runtime_checkable
class Encoded(Protocol):
    """A dialogue with its response, as a system scores it.

    Attributes:
        dropped_turns: number of the oldest turns that did not fit.
        cut_response: whether the end of the response did not fit, so that it is not scored.
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
class ScoresWords(Scores, Protocol):
    """Scores words of a vocabulary in which all other words are one unknown word, so that these are easily predicted."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens of the vocabulary."""
        ...

    @property
    def unknown_id(self) -> int:
        """Id that `targets` has in the place of an unknown word."""
        ...


@runtime_checkable
class Answers(System, Protocol):
    """Answers dialogues: greedily, or else an attribute `decoding` says how, as part of a sentence ("by sampling")."""

    def check_room(self, max_new_tokens: int) -> None:
        """Check before any work whether it can write answers of this length.

        Args:
            max_new_tokens: longest answer in tokens.

        Raises:
            UserError: it cannot.
        """
        ...

    def answer(self, dialogues: Sequence[Dialogue], batch_size: int, max_new_tokens: int) -> list[str]:
        """Answer each dialogue, twice in the same way.

        Args:
            dialogues: what was said; a response that they have is not looked at.
            batch_size: dialogues per batch.
            max_new_tokens: longest answer in tokens.
        """
        ...
