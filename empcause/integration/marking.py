"""Emphasis by words: `emphasis` encodes texts or chats, and marks the tokens of chosen words for `steer`."""

import math
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

import regex
import torch
from torch import Tensor
from transformers import BatchEncoding, PreTrainedTokenizerBase

# Characters that continue a word. Scripts that put no spaces between words have none: there a match may stand anywhere.
_WORD_CHARACTER = regex.compile(
    r"[[\p{L}\p{M}\p{N}_\u00ad\u200c\u200d\u2060]--[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]]",
    regex.V1,
)


@dataclass(frozen=True)
class Passage:
    """Words to mark, and where they may stand.

    Attributes:
        words: a word or several, as they stand in the text; or the span `(start, end)` of characters of one text or message.
        role: only in messages of this role.
        turn: only in the message of this number, from 0 on, or from -1 on counted from the last one.
        occurrence: only this occurrence, from 0 on, or from -1 on counted from the last one; None: all.
    """

    words: str | tuple[int, int]
    role: str | None = None
    turn: int | None = None
    occurrence: int | None = None

    def __str__(self) -> str:
        limits = {"role": self.role, "turn": self.turn, "occurrence": self.occurrence}
        return " ".join(
            [repr(self.words), *(f"{name} {value!r}" for name, value in limits.items() if value is not None)]
        )


class Emphasis(NamedTuple):
    """What `emphasis` returns.

    Attributes:
        inputs: the encoded texts, for the model: `input_ids` and `attention_mask` `[batch, tokens]`.
        causes: `[batch, tokens]` fp32, for `steer`: the value of each marked token, 0 elsewhere.
    """

    inputs: BatchEncoding
    causes: Tensor


def emphasis(
    tokenizer: PreTrainedTokenizerBase,
    texts: str | Sequence[Any],
    marks: Mapping[Any, float] | Sequence[Mapping[Any, float]],
    *,
    template_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> Emphasis:
    """Encode texts or chats for a model, and mark the tokens of chosen words for `steer`.

        inputs, causes = empcause.emphasis(tokenizer, "We moved back to Norway.", {"Norway": 1.0})
        with empcause.steer(model, causes):
            model.generate(**inputs)

    With a value of 1 and gamma 1, the last layer attends twice as much to a marked token before attention is normalised. A
    negative value makes a model attend less; -1 removes a token only in a layer whose strength is 1.

    Words are found where they stand as whole words in the text or in the content of a message, never in what a chat template
    adds. Both are compared in Unicode's composed form (NFC), and otherwise as they are: case counts, and so does every space. In
    scripts without spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese) a match may stand anywhere. Every token
    that has a character of a match is marked.

    Args:
        tokenizer: a fast tokenizer, with a chat template if there are messages.
        texts: a text; or messages, mappings with "role" and "content" (a text); or a sequence of texts, or of such lists.
        marks: the value of each word, several words, span `(start, end)` of characters, or `Passage`; for all texts, or one
            mapping per text. What is marked must occur in every text that a mapping is for. A span without a turn needs a text,
            or one message.
        template_options: of `apply_chat_template`, for example `tools` or `enable_thinking`; `add_generation_prompt` is True
            unless given.
        **options: of the tokenizer's call, for example `truncation` and `max_length`. `padding` is True for several texts.

    Returns:
        The encoded texts, and the causes of their tokens.

    Raises:
        ValueError: a word does not occur, a span is out of range or was truncated, two overlapping matches have different
            values, a value is not a finite number, or the chat template changes the contents of messages.
        TypeError: an argument is of another kind.
    """
    if not tokenizer.is_fast:
        raise TypeError(f"{type(tokenizer).__name__} gives no character offsets; load the fast tokenizer.")
    for name in ("return_tensors", "return_offsets_mapping", "add_special_tokens", "text_pair", "is_split_into_words"):
        if name in options:
            raise TypeError(f"emphasis sets {name} itself; leave it out.")
    batch = _batch(texts)
    chats = [not isinstance(each, str) for each in batch]
    if any(chats) and not all(chats):
        raise TypeError("texts mixes texts and lists of messages; pass one kind.")
    if template_options is not None and not all(chats):
        raise TypeError("template_options are for messages; texts go through no template.")
    documents = [
        _render(tokenizer, each, {"add_generation_prompt": True} | dict(template_options or {}))
        if not isinstance(each, str)
        else _Document(each, (_Part(None, None, 0, each),))
        for each in batch
    ]
    per_text = [marks] * len(batch) if isinstance(marks, Mapping) else list(marks)
    if len(per_text) != len(batch):
        raise ValueError(
            f"There are {len(per_text)} mappings of marks for {len(batch)} texts; pass one for all, or one each."
        )
    inputs = tokenizer(
        [document.text for document in documents],
        add_special_tokens=not any(chats),  # a template writes them itself
        return_tensors="pt",
        return_offsets_mapping=True,
        **({"padding": len(batch) > 1} | options),
    )
    offsets = inputs.pop("offset_mapping")
    if len(offsets) != len(batch):
        raise ValueError("return_overflowing_tokens makes several rows of a text; leave it out.")
    causes = torch.zeros(offsets.shape[:2])
    for row, document, wanted, spans in zip(causes, documents, per_text, offsets.tolist(), strict=True):
        _mark(row, document, wanted, spans)
    return Emphasis(inputs, causes)


class _Part(NamedTuple):
    """A text that may be marked: a whole text, or the content of a message, from character `start` of its document on."""

    role: str | None
    turn: int | None
    start: int
    text: str


class _Document(NamedTuple):
    """A text as it is encoded, and its parts."""

    text: str
    parts: tuple[_Part, ...]


def _batch(texts: Any) -> list[Any]:
    """Return a list of texts or of lists of messages."""
    if isinstance(texts, str):
        return [texts]
    if not isinstance(texts, Sequence) or not len(texts):
        raise TypeError(
            f"texts must be a text, messages, or a sequence of them that is not empty, not {type(texts).__name__}."
        )
    batch = [texts] if isinstance(texts[0], Mapping) else list(texts)
    for each in batch:
        messages = [] if isinstance(each, str) or not isinstance(each, Sequence) else each
        if isinstance(each, str) or (messages and all(isinstance(message, Mapping) for message in messages)):
            continue
        raise TypeError("texts must be texts, or lists of messages with role and content.")
    return batch


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], options: dict[str, Any]
) -> _Document:
    """Write messages with the tokenizer's chat template, and find where their contents stand.

    The template is also run with a placeholder in the place of each content, which tells what it puts before and after them.
    """
    for message in messages:
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise TypeError("Each message needs role and content, both texts.")
    contents = [message["content"] for message in messages]
    mark = "\ue000"  # a character of private use
    while any(mark in content for content in contents):
        mark += "\ue000"
    marked = [{**message, "content": f"{mark}{turn}\ue001"} for turn, message in enumerate(messages)]
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
    frame = tokenizer.apply_chat_template(marked, tokenize=False, **options)
    parts, place = [], 0
    for turn, (message, stand_in) in enumerate(zip(messages, marked, strict=True)):
        before, found, frame = frame.partition(stand_in["content"])
        content = message["content"]
        trimmed = content if text.startswith(content, place + len(before)) else content.strip()
        start = place + len(before)
        if not found or not text.startswith(before, place) or not text.startswith(trimmed, start):
            raise ValueError(
                f"The chat template of the tokenizer changes the content of message {turn} or leaves it out; write the text "
                "by apply_chat_template(..., tokenize=False), and pass it as a text."
            )
        # Characters that the template trims at the beginning shift the spans of a message.
        cut = content.index(trimmed) if trimmed else 0
        parts.append(_Part(message["role"], turn, start - cut, content))
        place = start + len(trimmed)
    if text[place:] != frame:
        raise ValueError(
            "The chat template of the tokenizer depends on the contents of messages in a way that hides them."
        )
    return _Document(text, tuple(parts))


def _mark(row: Tensor, document: _Document, marks: Mapping[Any, float], offsets: list[list[int]]) -> None:
    """Write the values of marks into a row of causes.

    Args:
        row: `[tokens]`, zeros.
        document: the text of the row.
        marks: the values.
        offsets: span of characters of each token; empty for padding and special tokens.
    """
    kept = [(start, end) for start, end in offsets if start < end]
    first, last = min((start for start, _ in kept), default=0), max((end for _, end in kept), default=0)
    marked: dict[int, Passage] = {}
    for key, value in marks.items():
        passage = key if isinstance(key, Passage) else Passage(key)
        if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
            raise ValueError(f"The value of {passage} must be a finite number, not {value!r}.")
        for start, end in _spans(document, passage):
            tokens = [token for token, (begin, stop) in enumerate(offsets) if begin < end and stop > start]
            if start < first or end > last or not tokens:
                raise ValueError(f"{passage} was truncated; give a larger max_length, or leave the mark out.")
            for token in tokens:
                if token in marked and row[token] != torch.tensor(value, dtype=row.dtype):
                    raise ValueError(f"{marked[token]} and {passage} mark the same token with different values.")
                marked[token], row[token] = passage, value


def _spans(document: _Document, passage: Passage) -> list[tuple[int, int]]:
    """Return the spans of characters of the document that a passage names.

    Raises:
        ValueError: there are none.
    """
    parts = [
        part
        for part in document.parts
        if passage.role in (None, part.role)
        and (passage.turn is None or part.turn in (passage.turn, passage.turn + len(document.parts)))
    ]
    if not parts:
        roles = ", ".join(sorted({str(part.role) for part in document.parts}))
        raise ValueError(f"No message fits {passage}; there are {len(document.parts)}, with the roles {roles}.")
    if isinstance(passage.words, str):
        found = [
            (part.start + start, part.start + end) for part in parts for start, end in _find(part.text, passage.words)
        ]
        if not found:
            raise ValueError(f"{passage} does not occur as a whole word in {_shown(parts)}.")
    else:
        found = [_checked_span(passage, parts)]
    if passage.occurrence is None:
        return found
    if not -len(found) <= passage.occurrence < len(found):
        raise ValueError(f"{passage} asks for an occurrence that is not there; there are {len(found)}.")
    return [found[passage.occurrence]]


def _checked_span(passage: Passage, parts: list[_Part]) -> tuple[int, int]:
    if len(parts) > 1:
        raise ValueError(
            f"The span {passage} may be in {len(parts)} messages; say in which by Passage(span, turn=...)."
        )
    try:
        start, end = map(int, passage.words)
    except (TypeError, ValueError) as error:
        raise TypeError(f"A mark is a text, a span (start, end) or a Passage, not {passage.words!r}.") from error
    text = parts[0].text
    if not 0 <= start < end <= len(text):
        raise ValueError(f"The span {passage} must lie within 0 and {len(text)} and have a character.")
    piece = text[start:end]
    if not piece.strip():
        raise ValueError(f"The span {passage} has only white space.")
    # A template may trim white space at the ends of a message; what it writes there instead must not be marked.
    start += len(piece) - len(piece.lstrip())
    return parts[0].start + start, parts[0].start + start + len(piece.strip())


def _find(text: str, words: str) -> Iterator[tuple[int, int]]:
    """Yield the spans of characters where words stand as whole words, both compared in NFC."""
    wanted = unicodedata.normalize("NFC", words)
    if not wanted or wanted != wanted.strip():
        raise ValueError(f"The words {words!r} must not be empty or begin or end with white space.")
    composed, spans = _composed(text)
    place = composed.find(wanted)
    while place >= 0:
        end = place + len(wanted)
        if not _joined(composed, place) and not _joined(composed, end):
            yield spans[place][0], spans[end - 1][1]
            place = composed.find(wanted, end)
        else:
            place = composed.find(wanted, place + 1)


def _joined(text: str, place: int) -> bool:
    """Return whether the characters before and after a place belong to one word."""
    sides = text[max(place - 1, 0) : place + 1]
    return 0 < place < len(text) and all(_WORD_CHARACTER.match(side) for side in sides)


def _composed(text: str) -> tuple[str, list[tuple[int, int]]]:
    """Return a text in NFC, and for each of its characters the span of characters that it comes from."""
    pieces, spans = [], []
    for match in regex.finditer(r"\X", text):
        piece = unicodedata.normalize("NFC", match.group())
        pieces.append(piece)
        if piece == match.group():
            spans += [(place, place + 1) for place in range(match.start(), match.end())]
        else:
            spans += [match.span()] * len(piece)
    return "".join(pieces), spans


def _shown(parts: list[_Part]) -> str:
    text = " / ".join(part.text for part in parts)
    return repr(text if len(text) <= 100 else f"{text[:100]}...")
