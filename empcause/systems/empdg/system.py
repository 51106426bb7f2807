"""EmpDG as a system: it tells emotions, ranks emotion words as causes, scores responses and answers dialogues."""

import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from empcause.checkpoints import load_own_tokenizer, load_pretrained, read_config
from empcause.data import Dialogue, Word, align_max, is_content_word
from empcause.data.batching import length_batches
from empcause.data.dialogue import SPEAKER
from empcause.data.sequences import IGNORED
from empcause.errors import UserError
from empcause.systems.empdg.configuration import EmpDGConfig
from empcause.systems.empdg.encoding import EncodedPair, Encoder, collate, spell
from empcause.systems.empdg.modeling import CONTEXT, EmpDG, EmpDGContext
from empcause.systems.lexicon import load_tagger
from empcause.systems.protocol import Reading


class EmpDGSystem:
    """EmpDG, a published comparison system (Li et al., COLING 2020).

    As causes of an emotion, the paper that compares with it takes its emotion words. `ranking`, `fill` and `ranking_seed` of the
    configuration say how they are ranked.

    Args:
        folder: the folder of a finished training.
        **ranking: entries of the configuration that take the place of the folder's.

    Raises:
        UserError: there is no EmpDG in it, it is damaged, the tagger that it was trained with is missing, or an entry is out of
            range.
    """

    def __init__(self, folder: str | os.PathLike[str], **ranking: Any) -> None:
        self.folders = {"model": Path(folder)}
        self.model = load_pretrained(
            EmpDG, folder, "EmpDG model", "empcause train empdg", EmpDGConfig.model_type
        ).eval()
        self.tokenizer: Any = load_own_tokenizer(self.model, folder, needed=["unk_token", "pad_token", "eos_token"])
        config = self.model.config = EmpDGConfig(**self.model.config.to_dict() | ranking)
        tagger = None
        if config.adjectives is not None:
            tagger = load_tagger(config.adjectives)
            self.folders["adjectives"] = Path(config.adjectives)
        self.encode = Encoder(self.tokenizer, config.emotion_words or (), tagger)
        causes = {
            "random": f"emotion words in random order (seed {config.ranking_seed})",
            "order": "emotion words in the order of the text",
            "attention": "emotion words by the attention to them",
            "context": "content words by the attention to them",
        }[config.ranking]
        rest = ", then other content words in random order" if config.fill else ""
        used = "with" if config.discriminators else "without"
        self.note = f"{used} discriminators, with {config.vocab_size:,} words; its causes are {causes}{rest}"

    @property
    def emotions(self) -> tuple[str, ...]:
        """Names of the emotions that it knows, by their ids."""
        return self.model.emotions

    def read(self, texts: Sequence[str], words: Sequence[Sequence[Word]], batch_size: int) -> list[Reading]:
        """Emotions of texts, each read as one turn of the speaker, and the ranks of their words (see `Reads`)."""
        return self.read_dialogues([Dialogue((text,), (SPEAKER,)) for text in texts], words, batch_size)

    @torch.inference_mode()
    def read_dialogues(
        self, dialogues: Sequence[Dialogue], words: Sequence[Sequence[Word]], batch_size: int
    ) -> list[Reading]:
        """Emotions of dialogues and the ranks of their words (see `ReadsDialogues`)."""
        encoded = self.encode([replace(dialogue, response="") for dialogue in dialogues])
        found: dict[int, Reading] = {}
        for indices, batch in _batches(self.model, encoded, batch_size):
            output = self._contexts(batch)
            probs = output.emotion_logits.float().softmax(-1).cpu().numpy()  # type: ignore[union-attr]
            by_context = self.model.config.ranking == "context"
            attention: Any = output.context_attention if by_context else output.emotion_attention
            for row, values in enumerate(attention[:, 1:].float().cpu().numpy()):
                index = indices[row]
                ranks = self._rank(dialogues[index].text, words[index], encoded[index], values)
                found[index] = Reading(probs[row], ranks)
        return [found[index] for index in range(len(dialogues))]

    def _rank(
        self, text: str, words: Sequence[Word], encoded: EncodedPair, attention: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Scores of the words of a text: those ranked first above 1, words that fill up from 0 to 1, 0 for words not predicted.

        Args:
            text, words, encoded: a text, its words and how it is encoded.
            attention: the attention to its emotion words or, where all content words are ranked, to its words; then padding.
        """
        config = self.model.config
        random = np.random.default_rng((config.ranking_seed, zlib.crc32(text.encode("utf-8", "surrogatepass"))))
        content = np.array([is_content_word(word.text) for word in words], bool)
        places = range(len(encoded.spans)) if config.ranking == "context" else encoded.emotion_places
        scores: NDArray[Any] = attention[: len(places)]
        if config.ranking == "random":
            scores = random.permutation(len(places))
        elif config.ranking == "order":
            scores = np.arange(len(places))[::-1]
        spans = np.array([encoded.spans[place] for place in places], np.int64).reshape(-1, 2)
        own = np.array([(word.start, word.end) for word in words], np.int64).reshape(-1, 2)
        found = align_max(spans, 2 + scores.astype(np.float32), own)
        rest = (1 + random.permutation(len(words))).astype(np.float32) / max(1, len(words))
        rest = np.where(content & config.fill, rest, 0)
        first = content if config.ranking == "context" else found > 0
        return np.where(first, found, rest).astype(np.float32)

    @property
    def vocab_size(self) -> int:
        """Number of tokens of its vocabulary (see `ScoresWords`)."""
        return self.model.config.vocab_size

    @property
    def unknown_id(self) -> int:
        """Id of the unknown word (see `ScoresWords`)."""
        return self.tokenizer.unk_token_id  # type: ignore[no-any-return]

    def targets(self, dialogues: Sequence[Dialogue]) -> list[list[int]]:
        """Ids of the tokens of each response that are scored (see `Scores`)."""
        return [each.labels.tolist() for each in self.encode(dialogues)]

    def score(self, encoded: Sequence[EncodedPair], batch_size: int) -> list[tuple[float, int]]:
        """Summed negative log-likelihood of each response, and its number of tokens (see `Scores`).

        A word that is neither in the vocabulary nor in the context is scored as the unknown word.
        """
        return measure_pairs(self.model, encoded, batch_size)[0]

    def check_room(self, max_new_tokens: int) -> None:
        """Refuse nothing: EmpDG reads and writes texts of any length (see `Answers`)."""

    @torch.inference_mode()
    def answer(self, dialogues: Sequence[Dialogue], batch_size: int, max_new_tokens: int) -> list[str]:
        """Greedy answers: lower-cased words with spaces between them; unknown words are left out (see `Answers`)."""
        encoded = self.encode([replace(dialogue, response="") for dialogue in dialogues])
        answers: dict[int, str] = {}
        for indices, batch in _batches(self.model, encoded, batch_size):
            output = self.model.answer_greedily(self._contexts(batch), batch["extra_words"], max_new_tokens)
            for row, index in enumerate(indices):
                answers[index] = self.words(output[row].tolist(), encoded[index].unknown)
        return [answers[index] for index in range(len(dialogues))]

    def words(self, ids: Sequence[int], unknown: Sequence[str]) -> str:
        """The words of an answer up to its end token, without unknown ones, with spaces between them.

        Args:
            ids: the answer's tokens; V, V+1, ... are the dialogue's words outside of the vocabulary.
            unknown: these words (`EncodedPair.unknown`).
        """
        special = set(self.tokenizer.all_special_ids)
        return " ".join(word for each, word in spell(self.tokenizer, ids, unknown) if each not in special)

    def _contexts(self, batch: Mapping[str, Any]) -> EmpDGContext:
        return self.model.encode(**{name: batch[name] for name in CONTEXT})


class EmpDGRanking(EmpDGSystem):
    """EmpDG whose emotion words are ranked in another way than its own folder says.

    Args:
        folder: a folder made by hand, whose `config.json` has the `model_type` "empdg_ranking", the path `empdg` of EmpDG's own
            folder (relative to this one), and any of `ranking`, `fill` and `ranking_seed` (see `EmpDGConfig`).

    Raises:
        UserError: there is no EmpDG at that path, or an entry is none of these or out of range.
    """

    model_type = "empdg_ranking"

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        values = read_config(folder, "model", "empcause train")
        known = ("ranking", "fill", "ranking_seed")
        chosen = {name: value for name, value in values.items() if name not in ("model_type", "empdg")}
        if (unknown := next((name for name in chosen if name not in known), None)) or "empdg" not in values:
            what = f"has an entry {unknown}" if unknown else "has no entry empdg"
            raise UserError(f"{Path(folder) / 'config.json'} {what}; expected empdg and any of {', '.join(known)}.")
        super().__init__(Path(folder) / str(values["empdg"]), **chosen)
        self.folders = {"model": Path(folder), "empdg": self.folders.pop("model")} | self.folders


def _batches(
    model: EmpDG, encoded: Sequence[EncodedPair], batch_size: int
) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """Yield the indices of pairs of similar length, and their batch on the model's device."""
    for indices in length_batches([len(each) for each in encoded], batch_size):
        batch = collate([encoded[index].item() for index in indices], model.config.pad_token_id)
        yield (
            indices,
            {name: value if isinstance(value, int) else value.to(model.device) for name, value in batch.items()},
        )


@torch.inference_mode()
def measure_pairs(
    model: EmpDG, encoded: Sequence[EncodedPair], batch_size: int
) -> tuple[list[tuple[float, int]], list[int]]:
    """Score responses, and tell the emotions of their contexts.

    Args:
        model: the generator.
        encoded: dialogues with their responses.
        batch_size: dialogues per batch.

    Returns:
        Per dialogue, the negative log-likelihood of its response in nats and the number of tokens, the end token included; then
        per dialogue, the id of the most probable emotion.

    Raises:
        UserError: the model's probabilities are not finite.
    """
    scores: dict[int, tuple[float, int]] = {}
    emotions: dict[int, int] = {}
    was_training = model.training
    model.eval()
    for indices, batch in _batches(model, encoded, batch_size):
        output = model(**batch)
        sums = output.token_losses.double().sum(1).tolist()
        counts = (batch["labels"] != IGNORED).sum(1).tolist()
        scores |= zip(indices, zip(sums, counts, strict=True), strict=True)
        emotions |= zip(indices, output.emotion_logits.argmax(1).tolist(), strict=True)
    model.train(was_training)
    if not np.isfinite([nll for nll, _ in scores.values()]).all():
        raise UserError("EmpDG's probabilities are not numbers (NaN): its training diverged or its files are damaged.")
    places = range(len(encoded))
    return [scores[place] for place in places], [emotions[place] for place in places]
