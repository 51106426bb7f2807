"""Answering and scoring with a trained generator."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from empcause.checkpoints import load_own_tokenizer, load_pretrained, read_config
from empcause.data import Dialogue, Word, live_dialogue
from empcause.data.batching import length_batches
from empcause.data.collation import pad_batch
from empcause.data.sequences import IGNORED, EncodedDialogue, encode_dialogue
from empcause.errors import UserError
from empcause.extractor import CauseExtractor, extract
from empcause.extractor.inference import longest_input
from empcause.generator.modeling import GENERATORS
from empcause.text import visible


@dataclass(frozen=True)
class Reply:
    """Answer to a dialogue, and what it is based on.

    Attributes:
        emotion: the speaker's most probable emotion.
        probability: probability of this emotion.
        causes: the words of the dialogue with their cause probabilities, in order.
        text: the dialogue as one text, to which the words' spans refer.
        response: the answer.
        unread_turns: number of the oldest turns that did not fit into the models; they are not in `text`.
    """

    emotion: str
    probability: float
    causes: list[tuple[Word, float]]
    text: str
    response: str
    unread_turns: int = 0


def load_generator(path: str | os.PathLike[str]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a trained generator and its tokenizer, in evaluation mode, with biased attention.

    Raises:
        UserError: the folder does not exist, holds another kind of model, or is damaged.
    """
    found = str(read_config(path, "generator", "empcause train generator").get("model_type"))
    known: dict[str, type[PreTrainedModel]] = {config.model_type: model for config, model in GENERATORS.values()}
    if found not in known:
        raise UserError(f"{path} holds a model of type {found!r}, not a generator ({', '.join(known)}).")
    model = load_pretrained(known[found], path, "generator", "empcause train generator", found)
    model.set_attn_implementation("empcause")
    return model.eval(), load_own_tokenizer(model, path, needed=["pad_token", "eos_token", "sep_token"])


def longest_sequence(model: PreTrainedModel) -> int:
    """Number of tokens that the generator can read and write altogether."""
    return int(model.config.max_position_embeddings)


def longest_context(model: PreTrainedModel, max_new_tokens: int) -> int:
    """Number of tokens that a dialogue may have, to leave room for an answer of `max_new_tokens` tokens.

    Raises:
        UserError: the answer would be longer than half of what the generator can read and write.
    """
    longest = longest_sequence(model)
    if not 1 <= max_new_tokens <= longest // 2:
        raise UserError(
            f"max_new_tokens is {max_new_tokens}; expected 1 to {longest // 2}, half of what this generator reads and writes."
        )
    return longest - max_new_tokens


def encode_for(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dialogue: Dialogue, max_length: int
) -> EncodedDialogue:
    """Encode a dialogue for this generator (see `encode_dialogue`), with its causes if the attention is biased.

    Args:
        model: the generator.
        tokenizer: its tokenizer.
        dialogue: the dialogue, with or without a response and causes.
        max_length: greatest number of tokens.

    Raises:
        UserError: the dialogue is empty, or `max_length` too short for it.
    """
    config = model.config
    if not config.gamma:
        dialogue = replace(dialogue, causes=None)
    scope, threshold = config.cause_scope, config.cause_threshold
    return encode_dialogue(tokenizer, dialogue, max_length, cause_scope=scope, cause_threshold=threshold)


def generate_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dialogues: Sequence[Dialogue],
    *,
    batch_size: int = 16,
    max_new_tokens: int = 40,
    progress: bool = False,
    **generation: Any,
) -> list[str]:
    """Answer dialogues, greedily unless `generation` says otherwise.

    Args:
        model: the generator.
        tokenizer: its tokenizer.
        dialogues: what was said; a response that they have is not looked at.
        batch_size: dialogues per batch; batches hold dialogues of similar length.
        max_new_tokens: longest answer in tokens.
        progress: show a progress bar.
        **generation: options of `generate`.

    Raises:
        UserError: `max_new_tokens` leaves the dialogue no room, or the options ask for several answers per dialogue.
    """
    if generation.get("num_return_sequences", 1) != 1:
        raise UserError("num_return_sequences must be 1: every context gets one answer.")
    limit = longest_context(model, max_new_tokens)
    encoded = [encode_for(model, tokenizer, replace(dialogue, response=""), limit) for dialogue in dialogues]
    responses: dict[int, str] = {}
    for indices, batch in _batches(model, tokenizer, encoded, batch_size, "left", "answering", progress):
        with torch.inference_mode():
            output = model.generate(**batch, max_new_tokens=max_new_tokens, **{"do_sample": False} | generation)
        texts = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        responses |= dict(zip(indices, (text.strip() for text in texts), strict=True))
    return [responses[index] for index in range(len(encoded))]


def response_nll(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Sequence[EncodedDialogue],
    *,
    batch_size: int = 16,
    progress: bool = False,
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Compute the negative log-likelihood of responses (the sum of eq 12 without its mean).

    Args:
        model: the generator.
        tokenizer: its tokenizer.
        encoded: dialogues with their responses.
        batch_size: dialogues per batch.
        progress: show a progress bar.

    Returns:
        Per dialogue, the summed NLL in nats `[n]` float64, and the number of response tokens `[n]`, the end token included.

    Raises:
        ValueError: a dialogue has no response.
        UserError: the generator's probabilities are not finite.
    """
    if any(each.labels is None for each in encoded):
        raise ValueError("a dialogue has no response that could be scored.")
    totals, counts = np.zeros(len(encoded)), np.zeros(len(encoded), np.int64)
    was_training = model.training
    model.eval()
    for indices, batch in _batches(model, tokenizer, encoded, batch_size, "right", "scoring", progress):
        with torch.inference_mode():
            losses = model(**batch).token_losses
        counted = batch["labels"] != IGNORED
        counted[:, 0] = False  # nothing predicts the first token
        losses = losses[counted].double().cpu()
        rows = counted.nonzero()[:, 0].cpu()
        totals[indices] = torch.zeros(len(indices), dtype=torch.float64).index_add_(0, rows, losses).numpy()
        counts[indices] = counted.sum(1).cpu().numpy()
    model.train(was_training)
    if not np.isfinite(totals).all():
        raise UserError(
            "The generator's probabilities are not numbers (NaN): its training diverged or its files are damaged."
        )
    return totals, counts


def _batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Sequence[EncodedDialogue],
    batch_size: int,
    side: str,
    description: str,
    progress: bool,
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Yield the indices of dialogues of similar length, and their batch on the model's device."""
    batches = length_batches([len(each) for each in encoded], batch_size)
    for indices in tqdm(batches, desc=description, disable=not progress):
        batch = pad_batch([encoded[index].item for index in indices], tokenizer.pad_token_id, side)
        yield indices, {name: value.to(model.device) for name, value in batch.items()}


def check_turns(turns: Sequence[str]) -> None:
    """Refuse a dialogue that cannot be read.

    Raises:
        UserError: it has no turn, or a turn is empty or holds bytes that are not UTF-8.
    """
    if not turns or not all(turn.strip() for turn in turns):
        raise UserError('A turn is empty; write what was said, for example "I miss my dog.".')
    for turn in turns:
        if any("\ud800" <= character <= "\udfff" for character in turn):
            raise UserError(f"A turn is not valid UTF-8 text: {visible(turn[:80])}; write it in UTF-8.")


class Responder:
    """Answers dialogues, and tells the emotion and the causes on which the answer is based.

    Args:
        extractor: an emotion cause extractor.
        extractor_tokenizer: its tokenizer.
        generator: an empathetic generator.
        tokenizer: its tokenizer.
    """

    def __init__(
        self,
        extractor: CauseExtractor,
        extractor_tokenizer: PreTrainedTokenizerBase,
        generator: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self.extractor, self.extractor_tokenizer = extractor, extractor_tokenizer
        self.generator, self.tokenizer = generator, tokenizer

    def __call__(self, turns: Sequence[str], *, max_new_tokens: int = 40, **generation: Any) -> Reply:
        """Answer a dialogue. The oldest turns of one that is too long for the models are left out, and counted.

        Args:
            turns: what was said, oldest first, speaker and listener alternating; the last turn is the speaker's.
            max_new_tokens: longest answer in tokens.
            **generation: options of `generate`, such as `do_sample`, `top_p`.

        Raises:
            UserError: a turn is empty or is not text, the last turn alone is too long, or `max_new_tokens` leaves no room for it.
        """
        check_turns(turns)
        said = [turn.strip() for turn in turns]
        dialogue = self._readable(said, longest_context(self.generator, max_new_tokens))
        found = extract(self.extractor, self.extractor_tokenizer, [dialogue.text])[0]
        dialogue = replace(dialogue, causes=found.causes)
        generation["max_new_tokens"] = max_new_tokens
        response = generate_responses(self.generator, self.tokenizer, [dialogue], **generation)[0]
        best = int(found.emotion_probs.argmax())
        probs = found.word_probs.tolist()
        return Reply(
            self.extractor.emotions[best],
            float(found.emotion_probs[best]),
            list(zip(found.words, probs, strict=True)),
            dialogue.text,
            response,
            len(said) - len(dialogue.turns),
        )

    def _readable(self, turns: list[str], room: int) -> Dialogue:
        """The newest turns that both models can read whole."""
        counts = [_tokens(self.tokenizer, turn, room, add_special_tokens=False) + 1 for turn in turns]
        limit = longest_input(self.extractor, self.extractor_tokenizer)
        for first in range(len(turns)):
            dialogue = live_dialogue(turns[first:])
            if sum(counts[first:]) <= room and _tokens(self.extractor_tokenizer, dialogue.text, limit) <= limit:
                return dialogue
        raise UserError(
            f"The last turn is too long for these models, which read at most {min(room, limit)} tokens; shorten it."
        )


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str, limit: int, **options: Any) -> int:
    """Number of tokens of a text, counted up to one more than `limit`."""
    return len(tokenizer(text, truncation=True, max_length=limit + 1, **options)["input_ids"])
