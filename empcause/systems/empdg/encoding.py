"""Dialogues as EmpDG reads them."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from empcause.data import Dialogue
from empcause.data.dialogue import SPEAKER
from empcause.data.sequences import IGNORED
from empcause.systems.lexicon import emotion_words
from empcause.systems.vocabulary import encode_words

# In the order of their ids: unknown word, padding, end, start, the turns of speaker and listener, context, emotion words.
SPECIAL_TOKENS = {
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "bos_token": "<s>",
    "speaker": "<usr>",
    "listener": "<sys>",
    "cls_token": "<cls>",
    "emotions": "<lab>",
}
_SPEAKER, _LISTENER, _CONTEXT, _EMOTIONS = range(4, 8)


@dataclass(frozen=True)
class EncodedPair:
    """A dialogue with its response as EmpDG reads it; words outside of the vocabulary have the ids V, V+1, ... of this item.

    Attributes:
        input_ids: `[n + 1]` int64, a token for the context, then the words of all turns.
        token_type_ids: `[n + 1]` int64, the same first token, then the token of each word's role.
        emotion_ids: `[m + 1]` int64, a token for the emotions, then the context's emotion words.
        labels: `[T]` int64, the words of the response and the end token. A word outside of the vocabulary has the id of its place
            in the context, or that of unknown words if it is not there.
        emotion_places: `[m]` index of each emotion word among the context's words.
        spans: `[n]` character span of each word in the dialogue's `text`.
        unknown: the item's words outside of the vocabulary, by their ids minus V.
    """

    input_ids: NDArray[np.int64]
    token_type_ids: NDArray[np.int64]
    emotion_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    emotion_places: list[int]
    spans: list[tuple[int, int]]
    unknown: list[str]
    dropped_turns: int = 0
    cut_response: bool = False

    def __len__(self) -> int:
        """Number of tokens of the context and the response."""
        return len(self.input_ids) + len(self.labels)

    def item(self, emotion: int | None = None) -> dict[str, Any]:
        """The item of a batch (see `collate`).

        Args:
            emotion: id of the emotion, where it is to be learned.
        """
        names = ("input_ids", "token_type_ids", "emotion_ids", "labels")
        item = {name: getattr(self, name) for name in names} | {"extra_words": len(self.unknown)}
        return item if emotion is None else item | {"emotion_labels": emotion}


class Encoder:
    """Encodes dialogues for EmpDG.

    Args:
        tokenizer: the word-level tokenizer, with `SPECIAL_TOKENS`.
        lexicon: the emotion words.
        tagger: what `load_tagger` gives, or None.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        lexicon: Collection[str],
        tagger: Callable[[Sequence[str]], list[bool]] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.lexicon = frozenset(lexicon)
        self.tagger = tagger

    def __call__(self, dialogues: Sequence[Dialogue]) -> list[EncodedPair]:
        """Encode dialogues with their responses, which may be empty; a text that several of them have is read once."""
        texts = list(dict.fromkeys(text for each in dialogues for text in (*each.turns, each.response)))
        turns = list(dict.fromkeys(turn for each in dialogues for turn in each.turns))
        words = dict(zip(texts, encode_words(self.tokenizer, texts), strict=True))
        emotional = {turn: emotion_words(words[turn].words, self.lexicon, self.tagger) for turn in turns}
        size, unk = len(self.tokenizer), self.tokenizer.unk_token_id
        encoded = []
        for dialogue in dialogues:
            unknown: dict[str, int] = {}
            ids, roles, emotions, places = [_CONTEXT], [_CONTEXT], [_EMOTIONS], []
            spans: list[tuple[int, int]] = []
            for turn, role, (begin, _) in zip(dialogue.turns, dialogue.roles, dialogue.turn_spans, strict=True):
                found = words[turn]
                numbered = [
                    known if known != unk else unknown.setdefault(word, size + len(unknown))
                    for word, known in zip(found.words, found.ids, strict=True)
                ]
                places += [len(spans) + place for place in emotional[turn]]
                emotions += [numbered[place] for place in emotional[turn]]
                ids += numbered
                roles += [_SPEAKER if role == SPEAKER else _LISTENER] * len(numbered)
                spans += [(begin + start, begin + end) for start, end in found.spans]
            response = words[dialogue.response]
            labels = [
                known if known != unk else unknown.get(word, unk)
                for word, known in zip(response.words, response.ids, strict=True)
            ]
            encoded.append(
                EncodedPair(
                    input_ids=np.array(ids, np.int64),
                    token_type_ids=np.array(roles, np.int64),
                    emotion_ids=np.array(emotions, np.int64),
                    labels=np.array([*labels, self.tokenizer.eos_token_id], np.int64),
                    emotion_places=places,
                    spans=spans,
                    unknown=list(unknown),
                )
            )
        return encoded


def collate(items: Sequence[Mapping[str, Any]], pad_token_id: int) -> dict[str, Any]:
    """Make a batch of items, padded on the right.

    Args:
        items: mappings as `EncodedPair.item` gives them.
        pad_token_id: the padding token.

    Returns:
        The arguments of `EmpDG.forward` by name: int64 tensors, and `extra_words`.
    """
    batch: dict[str, Any] = {}
    fills = {"input_ids": pad_token_id, "token_type_ids": pad_token_id, "emotion_ids": pad_token_id, "labels": IGNORED}
    for name, fill in fills.items():
        batch[name] = stack([item[name] for item in items], fill)
    masks = {"attention_mask": "input_ids", "emotion_mask": "emotion_ids"}
    for name, of in masks.items():
        batch[name] = stack([np.ones_like(item[of]) for item in items], 0)
    if "emotion_labels" in items[0]:
        batch["emotion_labels"] = torch.tensor([int(item["emotion_labels"]) for item in items])
    batch["extra_words"] = max(item["extra_words"] for item in items)
    return batch


def stack(rows: Sequence[NDArray[np.int64]], fill: int) -> Tensor:
    """Stack rows of different lengths to `[B, L]` int64, filled up on the right; `[0, 0]` where there are none."""
    stacked = np.full((len(rows), max(map(len, rows), default=0)), fill, np.int64)
    for place, row in zip(stacked, rows, strict=True):
        place[: len(row)] = row
    return torch.from_numpy(stacked)


def spell(tokenizer: Any, ids: Sequence[int], unknown: Sequence[str]) -> list[tuple[int, str]]:
    """The tokens of an answer up to its end token, each with the word that it stands for.

    Args:
        tokenizer: the word-level tokenizer.
        ids: the answer's tokens; V, V+1, ... are the dialogue's words outside of the vocabulary.
        unknown: these words (`EncodedPair.unknown`).
    """
    end, size = tokenizer.eos_token_id, len(tokenizer)
    ids = ids[: ids.index(end)] if end in ids else ids
    known = tokenizer.convert_ids_to_tokens([min(each, size - 1) for each in ids])
    return [(each, unknown[each - size] if each >= size else word) for each, word in zip(ids, known, strict=True)]
