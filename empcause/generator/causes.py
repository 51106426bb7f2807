"""Causes of the generator's dialogues, computed once per text by a frozen extractor."""

import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from filelock import FileLock
from transformers.utils import logging

from empcause.data import Causes, cache_dir
from empcause.extractor import extract, load_extractor, longest_input
from empcause.files import replacing

logger = logging.get_logger(__name__)

SAVED_AT_A_TIME = 4096  # number of texts, which take a CPU some minutes


class CauseCache:
    """Causes of texts found by one extractor, kept in a file so that they are computed once, not once per epoch or run.

    A damaged file is replaced; without a file that can be written, nothing is kept.

    Args:
        extractor: folder of the extractor. The file's name depends on its weights, configuration and tokenizer.
        folder: folder of the file; default is the cache folder.

    Attributes:
        digest: digest of everything that the causes of a text depend on.

    Raises:
        UserError: there is no extractor, or it is damaged.
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

    def get(self, texts: Sequence[str], progress: bool = False) -> list[Causes]:
        """Give the causes of texts; those that are not known yet are extracted and added to the file.

        Where several processes train together, all of them call this with the same texts. Each extracts its share and gets the
        others' from them, and one of each node writes the file.

        Raises:
            UserError: the extractor's probabilities are not finite.
        """
        state = PartialState()
        share = (state.process_index, state.num_processes)
        # The processes may have read different files, on different nodes or at different times.
        unknown = set(gather_object([key for key in map(self._key, texts) if key not in self._known]))
        missing = [text for text in dict.fromkeys(texts) if self._key(text) in unknown]
        for start in range(0, len(missing), SAVED_AT_A_TIME):
            part = missing[start : start + SAVED_AT_A_TIME]
            shown = progress and state.is_local_main_process
            mine = extract(self.model, self.tokenizer, part, progress=shown, share=share)
            together = dict(gather_object([(found.text, found.causes) for found in mine]))
            self._known |= {self._key(text): together[text] for text in part}
            if not state.is_local_main_process:
                continue
            try:
                self._save()
            except OSError as error:
                logger.warning(f"The causes cannot be kept for the next run: {self.path}: {error.strerror or error}.")
        return [self._known[self._key(text)] for text in texts]

    @staticmethod
    def _key(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()

    def _load(self) -> dict[str, Causes]:
        try:
            with np.load(self.path, allow_pickle=False) as stored:
                bounds = np.cumsum(stored["lengths"])[:-1]
                spans, probs = np.split(stored["spans"], bounds), np.split(stored["probs"], bounds)
                return {str(key): Causes(*value) for key, *value in zip(stored["keys"], spans, probs, strict=True)}
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
