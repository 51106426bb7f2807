"""Which data a model or a figure comes from: a published data set, the embedded sample, or the user's own data."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from empcause.data.annotation import CauseAnnotation
from empcause.data.dialogue import Dialogue
from empcause.data.loading import find_corpus
from empcause.text import code


class Origin(NamedTuple):
    """How reports and model cards describe data.

    Attributes:
        name: what the data are called, in Markdown, as a part of a sentence. It is the title of a data set only if they are whole
            splits of it as they were published, so that published figures may stand beside figures measured on them.
        terms: what their licence means for a model trained on them.
        licence: the licence's identifier in the front matter of a model card.
        languages: ISO 639 codes of their languages; empty where these are not known.
    """

    name: str
    terms: str
    licence: str
    languages: tuple[str, ...] = ()


def origin(data: str | os.PathLike[str] | None, *splits: Sequence[Dialogue] | Sequence[CauseAnnotation]) -> Origin:
    """Tell which data loaded splits are. Published data are recognised by their content, not by the name of their folder.

    Args:
        data: where they were loaded from, as `load_dialogues` takes it.
        *splits: each with everything that was loaded.

    Raises:
        UserError: there is no such data.
    """
    corpus, place = find_corpus(data)
    if corpus.licence is not None:
        return Origin(corpus.title, corpus.licence.terms, corpus.licence.identifier, (corpus.dialogues.language,))
    prints = [fingerprint(split) for split in splits]
    datasets = [each for each in (corpus.dialogues, corpus.annotations) if each]
    if all(any(one in each.published for each in datasets) for one in prints):
        found = [each for each in datasets if each.published.intersection(prints)]
        licences = list(dict.fromkeys(each.licence for each in found))
        identifier = licences[0].identifier if len(licences) == 1 else "other"
        terms = "; ".join(licence.terms for licence in licences)
        languages = tuple(dict.fromkeys(each.language for each in found if each.language))
        return Origin(" and ".join(each.title for each in found), terms, identifier, languages)
    terms = "its licence is that of its owner, and a model trained on it inherits its terms"
    name = code(Path(os.path.abspath(place)).name)
    return Origin(f"the user's own data {name}", terms, "unknown")


def fingerprint(split: Sequence[Dialogue] | Sequence[CauseAnnotation]) -> str:
    """SHA-256 of a split's items: identifiers, emotions, texts, annotated words; without white space and punctuation, in which
    copies of the same data differ."""
    digest = hashlib.sha256()
    items: list[Dialogue | CauseAnnotation] = sorted(split, key=_conv_id)
    for each in items:
        said = each.turns if isinstance(each, Dialogue) else ()
        caused = each.gold if isinstance(each, CauseAnnotation) else ()
        texts = ["".join(filter(str.isalnum, text)) for text in (each.situation, *said)]
        digest.update(json.dumps([each.conv_id, each.emotion, texts, sorted(caused)]).encode())
    return digest.hexdigest()


def _conv_id(item: Dialogue | CauseAnnotation) -> str:
    return item.conv_id
