"""The two models of this package as systems: the extractor alone, and the generator with the extractor beside it."""

import os
from collections.abc import Sequence
from pathlib import Path

from empcause.data import Dialogue, Word
from empcause.data.sequences import EncodedDialogue, encode_response
from empcause.errors import UserError
from empcause.extractor import extract, load_extractor
from empcause.generator import encode_for, generate_responses, load_generator, longest_sequence, response_nll
from empcause.generator.inference import longest_context
from empcause.systems.protocol import Reading


class ExtractorSystem:
    """The emotion cause extractor, which finds emotions and causes.

    Args:
        folder: the extractor's folder.

    Raises:
        UserError: there is no extractor in it, or it is damaged.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folders = {"model": Path(folder)}
        self.note = ""
        self.model, self.tokenizer = load_extractor(folder)

    @property
    def emotions(self) -> tuple[str, ...]:
        """Names of the emotions that it knows, by their ids."""
        return self.model.emotions

    def read(self, texts: Sequence[str], words: Sequence[Sequence[Word]], batch_size: int) -> list[Reading]:
        """Emotions and causes of texts (see `Reads`)."""
        found = extract(self.model, self.tokenizer, texts, words=words, batch_size=batch_size)
        return [Reading(each.emotion_probs, each.word_probs, each.causes) for each in found]


class GeneratorSystem:
    """The conversation generator with an extractor, which finds emotions and causes, scores responses and answers dialogues.

    Args:
        folder: the generator's folder.
        extractor: the extractor's folder.

    Raises:
        UserError: one of them is missing or damaged.
    """

    def __init__(self, folder: str | os.PathLike[str], extractor: str | os.PathLike[str]) -> None:
        if not extractor:
            raise UserError(
                f"{folder} holds a generator, which needs an extractor beside it; give the extractor's folder."
            )
        self.folders = {"model": Path(folder), "extractor": Path(extractor)}
        self.model, self.tokenizer = load_generator(folder)
        self.extractor = ExtractorSystem(extractor)
        gamma = self.model.config.gamma
        self.note = f"biased towards causes (gamma {gamma:g})" if gamma else "without bias (gamma 0)"

    @property
    def emotions(self) -> tuple[str, ...]:
        """Names of the emotions that its extractor knows, by their ids."""
        return self.extractor.emotions

    def read(self, texts: Sequence[str], words: Sequence[Sequence[Word]], batch_size: int) -> list[Reading]:
        """Emotions and causes of texts, by the extractor (see `Reads`)."""
        return self.extractor.read(texts, words, batch_size)

    def targets(self, dialogues: Sequence[Dialogue]) -> list[list[int]]:
        """Ids of the tokens of each response that are scored (see `Scores`)."""
        limit = longest_sequence(self.model)
        return [encode_response(self.tokenizer, dialogue.response, limit)[0] for dialogue in dialogues]

    def encode(self, dialogues: Sequence[Dialogue]) -> list[EncodedDialogue]:
        """Encode dialogues for `score` (see `Scores`)."""
        limit = longest_sequence(self.model)
        return [encode_for(self.model, self.tokenizer, dialogue, limit) for dialogue in dialogues]

    def score(self, encoded: Sequence[EncodedDialogue], batch_size: int) -> list[tuple[float, int]]:
        """Summed negative log-likelihood of each response, and its number of tokens (see `Scores`)."""
        nll, tokens = response_nll(self.model, self.tokenizer, encoded, batch_size=batch_size)
        return list(zip(nll.tolist(), tokens.tolist(), strict=True))

    def check_room(self, max_new_tokens: int) -> None:
        """Refuse a length of answers that leaves no room for the dialogue (see `Answers`)."""
        longest_context(self.model, max_new_tokens)

    def answer(self, dialogues: Sequence[Dialogue], batch_size: int, max_new_tokens: int) -> list[str]:
        """Greedy answers (see `Answers`)."""
        return generate_responses(
            self.model, self.tokenizer, dialogues, batch_size=batch_size, max_new_tokens=max_new_tokens
        )
