"""Which data a model or a figure comes from: the paper's, the embedded sample, or somebody's own."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from empcause.data.dialogue import Dialogue
from empcause.data.records import CauseAnnotation
from empcause.data.source import SAMPLE, resolve_data
from empcause.text import code

# `_fingerprint` of every split of EmpatheticDialogues (train, valid, test) and EmoCause (valid, test).
_PAPERS = {
    "ab0ebfd3de74d71b1c270d983bfadffa1a8cf6a81999bbc7f34d4631c4e5207d",
    "acf298b30f16436f9faa6e62f442de89406d8d71b6f9fc084451dc345d4ead34",
    "3ebb145f0e3aba0943cdd1b40d17d2cb2ca2bb5e9761cd24246b9ced45296a7b",
    "5e8e6e3099f9ab2a335b8a67306083f292d25fc32745d1e678cb0d02c08d8272",
    "0e298938be61306b09db2ed6eb7a1809edcd01d2807dad7ef1e01f4021744515",
}


class Origin(NamedTuple):
    """Data in words of a report.

    Attributes:
        name: what they are, in Markdown, within a sentence.
        terms: what their licence means for a model trained on them.
        licence: its identifier in a model card's front matter.
        published: they are whole splits of the paper's data, so that its figures may stand beside figures on them.
    """

    name: str
    terms: str
    licence: str
    published: bool


def origin(data: str | os.PathLike[str] | None, *splits: Sequence[Dialogue] | Sequence[CauseAnnotation]) -> Origin:
    """What loaded splits are. The paper's data are known by what is in them, not by the name of their folder.

    Args:
        data: where they were loaded from, as `load_dialogues` takes it.
        *splits: each with everything that was loaded.

    Raises:
        UserError: there is no such data.
    """
    path = resolve_data(data)
    if path == SAMPLE:
        return Origin("the sample embedded in empcause", "Apache-2.0", "apache-2.0", False)
    if all(_fingerprint(split) in _PAPERS for split in splits):
        kinds = {"EmoCause" if isinstance(split[0], CauseAnnotation) else "EmpatheticDialogues" for split in splits}
        terms = "CC BY-NC 4.0: non-commercial use only, which a model trained on it inherits"
        return Origin(" and ".join(sorted(kinds, reverse=True)), terms, "cc-by-nc-4.0", True)
    terms = "its licence is that of its owner, and a model trained on it inherits its terms"
    return Origin(f"the user's own data {code(Path(os.path.abspath(path)).name)}", terms, "unknown", False)


def _fingerprint(split: Sequence[Dialogue] | Sequence[CauseAnnotation]) -> str:
    """SHA-256 of who says what and, in EmoCause, what caused it; not of white space and punctuation, in which copies differ."""
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
