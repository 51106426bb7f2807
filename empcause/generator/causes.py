"""Cause probabilities for the generator's tokens, from a frozen extractor, computed once per text."""

import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from transformers.utils import logging

from empcause.data import SPEAKER, align_max, cache_dir, join_turns
from empcause.data.sequences import EncodedDialogue
from empcause.extractor import extract, load_extractor, longest_input
from empcause.files import replacing

logger = logging.get_logger(__name__)

SAVED_AT_A_TIME = 4096  # texts: minutes of a processor's work


class TextCauses(NamedTuple):
    """Cause probabilities of one text: `spans` `[T, 2]` characters, `probs` `[T]` float32."""

    spans: NDArray[np.int64]
    probs: NDArray[np.float32]


class CauseCache:
    """Causes of texts by one extractor, kept in a file so that they are computed once, not once per epoch or run.

    A file that is damaged is made anew; one that cannot be written is done without.

    Args:
        extractor: folder of the extractor. Its weights, configuration and tokenizer name the file.
        folder: where the file lies; default is the cache folder.

    Attributes:
        digest: of all that decides the causes of a text.

    Raises:
        UserError: there is no extractor.
    """

    def __init__(self, extractor: str | os.PathLike[str], folder: Path | None = None) -> None:
        self.model, self.tokenizer = load_extractor(extractor)
        digest = hashlib.sha256()
        for file in sorted([*Path(extractor).glob("*.safetensors"), Path(extractor) / "config.json"]):
            digest.update(file.read_bytes())
        digest.update(self.tokenizer.backend_tokenizer.to_str().encode())
        digest.update(str(longest_input(self.model, self.tokenizer)).encode())
        self.digest = digest.hexdigest()[:32]
        self.path = (folder or cache_dir() / "causes") / f"{self.digest}.npz"
        self._known = self._load()

    def get(self, texts: Sequence[str], progress: bool = False) -> list[TextCauses]:
        """Causes of the texts; what is not known yet is extracted and added to the file."""
        missing = [text for text in dict.fromkeys(texts) if self._key(text) not in self._known]
        for start in range(0, len(missing), SAVED_AT_A_TIME):
            part = missing[start : start + SAVED_AT_A_TIME]
            for found in extract(self.model, self.tokenizer, part, progress=progress):
                self._known[self._key(found.text)] = TextCauses(found.token_spans, found.token_probs)
            try:
                self._save()
            except OSError as error:
                logger.warning(f"The causes cannot be kept for the next run: {self.path}: {error.strerror or error}.")
        return [self._known[self._key(text)] for text in texts]

    @staticmethod
    def _key(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()

    def _load(self) -> dict[str, TextCauses]:
        try:
            with np.load(self.path, allow_pickle=False) as stored:
                bounds = np.cumsum(stored["lengths"])[:-1]
                spans, probs = np.split(stored["spans"], bounds), np.split(stored["probs"], bounds)
                return {str(key): TextCauses(*value) for key, *value in zip(stored["keys"], spans, probs, strict=True)}
        except FileNotFoundError:
            return {}
        except Exception as error:  # readers of damaged files raise errors of many kinds
            logger.warning_once(f"The kept causes {self.path} cannot be read and are made anew: {error}.")
            return {}

    def _save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_suffix(".lock")):
            known = self._load() | self._known  # another run may have added texts
            content = io.BytesIO()
            np.savez(
                content,
                keys=np.array(list(known)),
                lengths=np.array([len(causes.probs) for causes in known.values()]),
                spans=np.concatenate([causes.spans for causes in known.values()]),
                probs=np.concatenate([causes.probs for causes in known.values()]),
            )
            with replacing(self.path) as file:
                file.write(content.getbuffer())


def token_causes(
    config: Any, encoded: EncodedDialogue, context: Sequence[str], roles: Sequence[int], causes: TextCauses
) -> NDArray[np.float32]:
    """C of the generator's tokens: the largest probability among the extractor's tokens that overlap them.

    Args:
        config: the generator's; `cause_scope` and `cause_threshold` apply.
        encoded: the generator's tokens.
        context: the turns; `causes` belongs to their joined text.
        roles: the turns' roles.
        causes: the extractor's.

    Returns:
        `[S]` float32; 0 at separators and in the response.
    """
    probs = causes.probs
    if config.cause_threshold is not None:
        probs = (probs >= config.cause_threshold).astype(np.float32)
    values = align_max(causes.spans, probs, encoded.spans)
    if config.cause_scope == "context":
        return values
    _, turn_spans = join_turns(context)
    speaker_turns = [index for index, role in enumerate(roles) if role == SPEAKER]
    allowed = speaker_turns[-1:] if config.cause_scope == "last" else speaker_turns
    inside = np.zeros(len(values), bool)
    for index in allowed:
        start, end = turn_spans[index]
        inside |= (encoded.spans[:, 0] >= start) & (encoded.spans[:, 1] <= end)
    return np.where(inside, values, np.float32(0))
