"""RecEC as a system: it finds emotions and causes, scores responses and answers dialogues."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from empcause.checkpoints import load_own_tokenizer, load_pretrained, read_config
from empcause.data import SPEAKER, Dialogue, Word, align_max
from empcause.data.batching import length_batches
from empcause.data.sequences import IGNORED
from empcause.errors import UserError
from empcause.systems.own import ExtractorSystem
from empcause.systems.protocol import Reading
from empcause.systems.recec.encoding import EncodedPair, collate, encode_pair
from empcause.systems.recec.modeling import RecEC, RecECReasoner

# Seed of what sampling and the published hard gate draw.
SEED = 1024

# Attributes of the tokenizer with the special tokens that both models need.
SPECIAL_TOKENS = ("pad_token", "bos_token", "eos_token", "unk_token", "cls_token", "sep_token")

_CAUSES = {"speaker": "the speaker's turns", "last": "the last turns", "extractor": "an extractor"}
_DIVERGED = "RecEC's probabilities are not numbers (NaN): its training diverged or its files are damaged."


def load_recec(path: str | os.PathLike[str]) -> tuple[RecEC, PreTrainedTokenizerBase]:
    """Load a trained RecEC and its tokenizer, in evaluation mode.

    Raises:
        UserError: the folder does not exist, holds another kind of model, or is damaged.
    """
    model = load_pretrained(RecEC, path, "RecEC", "empcause train recec", "recec")
    return model.eval(), load_own_tokenizer(model, path, needed=SPECIAL_TOKENS)


def load_reasoner(path: str | os.PathLike[str]) -> tuple[RecECReasoner, PreTrainedTokenizerBase]:
    """Load a trained emotion reasoner and its tokenizer, in evaluation mode.

    Raises:
        UserError: the folder does not exist, holds another kind of model, or is damaged.
    """
    model = load_pretrained(RecECReasoner, path, "emotion reasoner", "empcause train recec", "recec_reasoner")
    return model.eval(), load_own_tokenizer(model, path, needed=SPECIAL_TOKENS)


@contextmanager
def seeded() -> Iterator[None]:
    """Draw random numbers with the seed `SEED` until the block ends; torch's generators are as before then."""
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        yield


def _batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Sequence[dict[str, Any]]
) -> dict[str, Tensor]:
    """Make a batch of items on the model's device."""
    batch = collate(items, tokenizer.pad_token_id)
    return {name: value.to(model.device) for name, value in batch.items()}


@torch.inference_mode()
def pair_nll(
    model: RecEC, tokenizer: PreTrainedTokenizerBase, encoded: Sequence[EncodedPair], batch_size: int
) -> list[tuple[float, int]]:
    """Compute the negative log-likelihood of responses.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        encoded: contexts with their responses.
        batch_size: pairs per batch; batches hold pairs of similar length.

    Returns:
        Per pair the NLL in nats, summed over the tokens of the response, and their number, the end token included.

    Raises:
        UserError: the model's probabilities are not finite.
    """
    found: dict[int, tuple[float, int]] = {}
    was_training = model.training
    model.eval()
    for indices in length_batches([len(each) for each in encoded], batch_size):
        batch = _batch(model, tokenizer, [encoded[index].item for index in indices])
        with seeded():
            losses = model(**batch).token_losses.double().sum(1)
        counts = (batch["labels"] != IGNORED).sum(1)
        found |= dict(zip(indices, zip(losses.tolist(), counts.tolist(), strict=True), strict=True))
    model.train(was_training)
    if not np.isfinite([nll for nll, _ in found.values()]).all():
        raise UserError(_DIVERGED)
    return [found[index] for index in range(len(encoded))]


@torch.inference_mode()
def published_perplexity(
    model: RecEC, tokenizer: PreTrainedTokenizerBase, encoded: Sequence[EncodedPair], batch_size: int, smoothing: float
) -> float:
    """Compute what the published code calls perplexity: exp of the smoothed cross-entropy, averaged over batches.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        encoded: contexts with their responses.
        batch_size: pairs per batch.
        smoothing: share of every label that is spread over the other tokens.
    """
    losses = []
    was_training = model.training
    model.eval()
    for indices in length_batches([len(each) for each in encoded], batch_size):
        batch = _batch(model, tokenizer, [encoded[index].item for index in indices])
        with seeded():
            losses.append(model(**batch, smoothing=smoothing).loss.item())
    model.train(was_training)
    return float(np.exp(np.mean(losses)))


def answer_pairs(
    model: RecEC,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Sequence[EncodedPair],
    batch_size: int,
    max_new_tokens: int,
) -> list[str]:
    """Answer contexts as the model's generation configuration says: as published, sampling with top-k 3 and temperature 0.6.

    The same batch gets the same answers, because every batch is sampled with the same seed.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        encoded: contexts; a response that they have is not looked at.
        batch_size: contexts per batch; batches hold contexts of similar length.
        max_new_tokens: longest answer in tokens.
    """
    found: dict[int, str] = {}
    was_training = model.training
    model.eval()
    for indices in length_batches([len(each.input_ids) for each in encoded], batch_size):
        batch = _batch(model, tokenizer, [encoded[index].context for index in indices])
        with torch.inference_mode(), seeded():
            output = model.generate(**batch, max_new_tokens=max_new_tokens)
        texts = tokenizer.batch_decode(output[:, 1:], skip_special_tokens=True)
        found |= dict(zip(indices, (text.strip() for text in texts), strict=True))
    model.train(was_training)
    return [found[index] for index in range(len(encoded))]


@torch.inference_mode()
def read_pairs(
    reasoner: RecECReasoner, tokenizer: PreTrainedTokenizerBase, encoded: Sequence[EncodedPair], batch_size: int
) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Find emotions and causes of contexts with the emotion reasoner.

    Args:
        reasoner: the reasoner, or that of a generator.
        tokenizer: its tokenizer.
        encoded: contexts; a response that they have is not looked at.
        batch_size: contexts per batch; batches hold contexts of similar length.

    Returns:
        Per context `[E]` float32 probabilities of the emotions, and `[S]` float32 cause probabilities of the tokens, special
        tokens included.

    Raises:
        UserError: the reasoner's probabilities are not finite.
    """
    found: dict[int, tuple[NDArray[np.float32], NDArray[np.float32]]] = {}
    was_training = reasoner.training
    reasoner.eval()
    for indices in length_batches([len(each.input_ids) for each in encoded], batch_size):
        batch = _batch(reasoner, tokenizer, [{"input_ids": encoded[index].input_ids} for index in indices])
        output = reasoner(**batch)
        emotion_probs = output.emotion_logits.float().softmax(-1).cpu().numpy()
        cause_probs = output.cause_logits.float().softmax(-1)[..., 1].cpu().numpy()
        if not (np.isfinite(emotion_probs).all() and np.isfinite(cause_probs).all()):
            raise UserError(_DIVERGED)
        for row, index in enumerate(indices):
            found[index] = emotion_probs[row], cause_probs[row, : len(encoded[index].input_ids)]
    reasoner.train(was_training)
    return [found[index] for index in range(len(encoded))]


class RecECSystem:
    """RecEC: its reasoner finds emotions and causes, its generator scores responses and answers dialogues.

    Args:
        folder: the folder of the trained system.
        extractor: the folder of an extractor, for a system whose causes come from one.
        greedy: answer greedily, whatever the generation configuration in the folder says.

    Raises:
        UserError: a model is missing or damaged, or an extractor is needed and not given.
    """

    def __init__(
        self, folder: str | os.PathLike[str], extractor: str | os.PathLike[str] = "", *, greedy: bool = False
    ) -> None:
        self.folders = {"model": Path(folder)}
        self.model, self.tokenizer = load_recec(folder)
        self.extractor: ExtractorSystem | None = None
        if self.model.config.causes == "extractor":
            if not extractor:
                raise UserError(
                    f"{folder} holds a RecEC whose causes come from an extractor; give the extractor's folder."
                )
            self.folders["extractor"] = Path(extractor)
            self.extractor = ExtractorSystem(extractor)
        if greedy:
            self.model.answer_greedily()
        config, generation = self.model.config, self.model.generation_config
        self.note = f"RecEC with the {config.gate} gate and causes from {_CAUSES[config.causes]}"
        if config.published:
            self.note += ", as published"
        self.decoding = "greedily"
        if generation.do_sample:
            self.decoding = f"by sampling (top-k {generation.top_k}, temperature {generation.temperature}, seed {SEED})"

    @property
    def emotions(self) -> tuple[str, ...]:
        """Names of the emotions that it knows, by their ids."""
        return self.model.emotions

    def read(self, texts: Sequence[str], words: Sequence[Sequence[Word]], batch_size: int) -> list[Reading]:
        """Emotions by the reasoner, and causes by the reasoner or the extractor; a text is one turn (see `Reads`)."""
        return self.read_dialogues([Dialogue((text,), (SPEAKER,)) for text in texts], words, batch_size)

    def read_dialogues(
        self, dialogues: Sequence[Dialogue], words: Sequence[Sequence[Word]], batch_size: int
    ) -> list[Reading]:
        """Emotions by the reasoner, and causes by the reasoner or the extractor (see `ReadsDialogues`)."""
        encoded = self.encode(dialogues)
        found = read_pairs(self.model.encoder.reasoner, self.tokenizer, encoded, batch_size)
        if self.extractor is not None:
            causes = self.extractor.read([dialogue.text for dialogue in dialogues], words, batch_size)
            return [replace(each, emotion_probs=probs) for each, (probs, _) in zip(causes, found, strict=True)]
        return [
            Reading(emotion_probs, align_max(each.spans, cause_probs, [(word.start, word.end) for word in of_text]))
            for each, (emotion_probs, cause_probs), of_text in zip(encoded, found, words, strict=True)
        ]

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

    def encode(self, dialogues: Sequence[Dialogue]) -> list[EncodedPair]:
        """Encode dialogues for `score` (see `Scores`)."""
        return [encode_pair(self.tokenizer, dialogue, self.model.config) for dialogue in dialogues]

    def score(self, encoded: Sequence[EncodedPair], batch_size: int) -> list[tuple[float, int]]:
        """Summed negative log-likelihood of each response, and its number of tokens (see `Scores`)."""
        return pair_nll(self.model, self.tokenizer, encoded, batch_size)

    def check_room(self, max_new_tokens: int) -> None:
        """Accept every length of answers: positions are computed, so that they have no end (see `Answers`)."""

    def answer(self, dialogues: Sequence[Dialogue], batch_size: int, max_new_tokens: int) -> list[str]:
        """Answers as the generation configuration in the folder says (see `answer_pairs`)."""
        return answer_pairs(self.model, self.tokenizer, self.encode(dialogues), batch_size, max_new_tokens)


class RecECGreedy(RecECSystem):
    """RecEC that answers greedily, whatever the generation configuration in its own folder says.

    Args:
        folder: a folder made by hand, whose `config.json` has the `model_type` "recec_greedy" and the path `recec` of RecEC's own
            folder (relative to this one).
        extractor: the folder of an extractor, for a system whose causes come from one.

    Raises:
        UserError: there is no RecEC at that path, `config.json` has other entries, or an extractor is needed and not given.
    """

    model_type = "recec_greedy"

    def __init__(self, folder: str | os.PathLike[str], extractor: str | os.PathLike[str] = "") -> None:
        values = read_config(folder, "model", "empcause train recec")
        if values.keys() != {"model_type", "recec"}:
            raise UserError(
                f"{Path(folder) / 'config.json'} has the entries {', '.join(values)}; expected model_type and recec."
            )
        super().__init__(Path(folder) / str(values["recec"]), extractor, greedy=True)
        self.folders = {"model": Path(folder), "recec": self.folders.pop("model")} | self.folders
