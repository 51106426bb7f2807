"""EmoCause (Kim and others, 2021): JSON of situations of EmpatheticDialogues in which people marked the words of the cause."""

import json
from collections.abc import Sequence
from typing import Any

from empcause.data.annotation import CauseAnnotation
from empcause.data.dataset import Dataset, Report, is_text, refuse
from empcause.data.empathetic_dialogues import EMPATHETIC_DIALOGUES
from empcause.data.words import locate_words
from empcause.errors import UserError

EMOTIONS = EMPATHETIC_DIALOGUES.emotions


def _parse(text: str, name: str, report: Report) -> list[CauseAnnotation]:
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{name}:{error.lineno}: not valid JSON: {error.msg}.") from error
    except (RecursionError, ValueError) as error:
        raise UserError(f"{name}: not valid JSON: {error}.") from error
    if not isinstance(records, list):
        refuse(f"{name}:1", f"expected a JSON list of situations, not a {type(records).__name__}.")
    annotations: dict[str, CauseAnnotation] = {}
    for number, record in enumerate(records, start=1):
        try:
            annotation = _annotation(record)
            if annotation.conv_id in annotations:
                raise UserError(f"the conv_id {annotation.conv_id!r} is that of an earlier record too.")
            annotations[annotation.conv_id] = annotation
        except UserError as error:
            report(f"{name}, record {number}", str(error))
    if not annotations:
        report(f"{name}:1", "the file holds no situation.")
    return [annotation for annotation in annotations.values() if annotation.gold]


def _annotation(record: Any) -> CauseAnnotation:
    needed = ("original_situation", "tokenized_situation", "emotion", "conv_id", "annotation")
    if not isinstance(record, dict):
        raise UserError(f"the record is a {type(record).__name__}, not an object with keys and values.")
    if missing := [key for key in needed if key not in record]:
        raise UserError(f"the record lacks {', '.join(missing)}.")
    situation, tokens, emotion, conv_id, annotated = map(record.get, needed)
    if not isinstance(conv_id, str) or not conv_id:
        raise UserError(f"conv_id is {conv_id!r}, not a text.")
    if not isinstance(situation, str) or not situation.strip():
        raise UserError("the situation is empty.")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise UserError("tokenized_situation is not a list of words.")
    if not is_text(conv_id + situation):
        raise UserError("the situation or conv_id has a NUL byte or half a surrogate pair, which is no text.")
    if not isinstance(emotion, str) or (name := emotion.strip("_")) not in EMOTIONS:
        raise UserError(f"unknown emotion {emotion!r}; expected one of the {len(EMOTIONS)}, written like __sad__.")
    words = locate_words(situation, tokens)
    if not isinstance(annotated, list):
        raise UserError("annotation is not a list.")
    for entry in annotated:
        match entry:
            case [word, index] if type(index) is int and 0 <= index < len(tokens) and tokens[index] == word:
                continue
        raise UserError(f"the annotation {entry!r} is not a word and its index in tokenized_situation.")
    return CauseAnnotation(conv_id, name, situation, tuple(words), tuple(index for _, index in annotated))


def _count(annotations: Sequence[CauseAnnotation]) -> dict[str, int]:
    return {
        "situations": len(annotations),
        "cause words": sum(len(annotation.gold) for annotation in annotations),
        "emotions": len({annotation.emotion for annotation in annotations}),
    }


EMOCAUSE = Dataset(
    name="emocause",
    title="EmoCause",
    emotions=EMOTIONS,
    licence=EMPATHETIC_DIALOGUES.licence,
    language=EMPATHETIC_DIALOGUES.language,
    splits=("valid", "test"),
    extension="json",
    archive="emocause.zip",
    url="https://drive.google.com/uc?id=1LR4B47Fna_l63G1X4DZtuttG-GrinnaY&export=download&confirm=t",
    sha256="f490361039a98ae13a028ae3c7117ae94165fdbf771eb75d6026b63ec9d12a11",
    parse=_parse,
    count=_count,
    published=frozenset(
        (
            "5e8e6e3099f9ab2a335b8a67306083f292d25fc32745d1e678cb0d02c08d8272",
            "0e298938be61306b09db2ed6eb7a1809edcd01d2807dad7ef1e01f4021744515",
        )
    ),
)
